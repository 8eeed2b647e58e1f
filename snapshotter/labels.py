"""Names of containerd snapshot labels and of the annotations of sealed and Nydus layers.

containerd hands a layer descriptor's `containerd.io/snapshot/` annotations to Prepare as labels, so every value here is
input from whoever made the image.
"""

SNAPSHOT_REF = "containerd.io/snapshot.ref"  # chain id of the layer being prepared
PARENT_CHAIN_ID = "containerd.io/snapshot/parent-chain-id"  # of the layer below it (containerd 2.3+)
CRI_IMAGE_REF = "containerd.io/snapshot/cri.image-ref"
CRI_LAYER_DIGEST = "containerd.io/snapshot/cri.layer-digest"
CRI_MANIFEST_DIGEST = "containerd.io/snapshot/cri.manifest-digest"
CRI_IMAGE_LAYERS = "containerd.io/snapshot/cri.image-layers"  # this layer and those above, possibly cut
UID_MAPPING = "containerd.io/snapshot/uidmapping"
GID_MAPPING = "containerd.io/snapshot/gidmapping"

NYDUS_BLOB = "containerd.io/snapshot/nydus-blob"
NYDUS_BOOTSTRAP = "containerd.io/snapshot/nydus-bootstrap"
NYDUS_FS_VERSION = "containerd.io/snapshot/nydus-fs-version"

# Hints that the converter repeats in each layer's annotations, for clients that send no CRI labels.
HINT_REPOSITORY = "containerd.io/snapshot/coco.repository"  # host[:port]/repo
HINT_LAYER_DIGEST = "containerd.io/snapshot/coco.layer-digest"
HINT_BOOTSTRAP_DIGEST = "containerd.io/snapshot/coco.bootstrap-digest"

ENC_PREFIX = "org.opencontainers.image.enc."
ENC_PUBOPTS = ENC_PREFIX + "pubopts"
ENC_KEYS_PREFIX = ENC_PREFIX + "keys."
ENC_KEYS_JWE = ENC_KEYS_PREFIX + "jwe"
ENC_KEYS_PKCS7 = ENC_KEYS_PREFIX + "pkcs7"

MEDIA_NYDUS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
MEDIA_LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
MEDIA_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
MEDIA_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
ENCRYPTED_SUFFIX = "+encrypted"
MEDIA_LAYER_GZIP_ENCRYPTED = MEDIA_LAYER_GZIP + ENCRYPTED_SUFFIX
MEDIA_DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
MEDIA_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_OCI_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MEDIA_DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
MEDIA_DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
