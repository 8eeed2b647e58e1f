"""From a reference to a layer plan that is authentic and whose chain ids are its own: steps 0–3 of the order of trust.

A chain id is a claim: containerd takes it from the image's config and then answers "already there" from its records. An
image that claims another image's `diff_ids` would otherwise make that other image run its files. So chain ids are
computed here from what a layer *is*, and an image is refused if it claims others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import FailedPrecondition, IntegrityError, MalformedImage, NotFound, PolicyDenied
from snapshotter.image.claim import SEND_LABELS, LayerClaim
from snapshotter.image.manifest import Descriptor, Manifest, chain_ids, fetch_image, image_digests
from snapshotter.image.origin import Origin
from snapshotter.image.policy import Admission
from snapshotter.registry.reference import Reference
from snapshotter.registry.transport import ImageSource


@dataclass(frozen=True, slots=True)
class LazyImage:
    """A Nydus or sealed image as its manifest states it: data blobs, one bootstrap, ordinary layers above."""

    reference: Reference  # as it was asked for
    source: Reference  # repository and manifest digest: where everything else is fetched
    manifest_digest: Digest
    blobs: tuple[Descriptor, ...]
    bootstrap: Descriptor
    config: dict[str, Any]
    admission: Admission
    documents: tuple[Digest, ...] = ()  # manifest, config, and an index on the way

    @property
    def encrypted(self) -> bool:
        return is_encrypted(self.bootstrap)

    def chain(self, bootstrap_diff_id: str) -> list[str]:
        """Chain ids of the data blobs and the bootstrap, bottom first (OCI image-spec config.md, Layer ChainID)."""
        return chain_ids(self._diff_ids(bootstrap_diff_id))

    def check_claims(self, bootstrap_diff_id: str | None = None) -> None:
        """Raises IntegrityError(chain-mismatch) unless the config's diff_ids are those of the layers.

        None: only of the data blobs, before the bootstrap can be opened.
        """
        own = [blob.digest for blob in self.blobs] if bootstrap_diff_id is None else self._diff_ids(bootstrap_diff_id)
        if self.config["rootfs"]["diff_ids"][: len(own)] != own:
            raise IntegrityError(
                f"image {self.reference}: its config claims diff_ids that are not those of its layers",
                reason="chain-mismatch",
            )

    def _diff_ids(self, bootstrap_diff_id: str) -> list[str]:
        return [*(blob.digest for blob in self.blobs), bootstrap_diff_id]


@dataclass(frozen=True, slots=True)
class OrdinaryImage:
    """Every layer is a tar: containerd unpacks it and compares the diff_ids itself."""

    manifest_digest: Digest
    admission: Admission


@dataclass(frozen=True, slots=True)
class EncryptedLayer:
    """A layer that is encrypted as a whole (ocicrypt), and what its archive must hash to."""

    source: Reference
    descriptor: Descriptor
    diff_id: Digest
    admission: Admission


@dataclass(frozen=True, slots=True)
class EncryptedImage:
    """An ordinary image some of whose layers are encrypted as a whole. `diff_ids` are those of the plain archives."""

    reference: Reference
    source: Reference
    manifest_digest: Digest
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[Digest, ...]
    admission: Admission

    def layer(self, number: int) -> EncryptedLayer | None:
        """Layer `number`, bottom first, if it is encrypted."""
        descriptor = self.layers[number]
        if not is_encrypted(descriptor):
            return None
        return EncryptedLayer(self.source, descriptor, self.diff_ids[number], self.admission)


Image: TypeAlias = LazyImage | EncryptedImage | OrdinaryImage


class Resolver:
    """Fetches manifests and configs, and admits them."""

    def __init__(self, source: ImageSource, origin: Origin, limits: Limits) -> None:
        self._source = source
        self._origin = origin
        self._policy = origin.policy
        self._limits = limits

    async def resolve(self, claim: LayerClaim) -> Image:
        """Raises PolicyDenied, DigestMismatch, MalformedImage, LimitExceeded and the registry's errors."""
        reference = Reference.parse(claim.image)
        manifest = claim.manifest or await self._hinted(reference, claim.chain_id)
        source = reference.pinned(manifest)
        digests = [manifest]
        if reference.digest is not None and reference.digest != manifest:
            # Only an index leads from one digest to another; it must list the manifest that containerd chose.
            listed = await image_digests(self._source, reference, self._limits)
            if manifest not in listed:
                raise IntegrityError(
                    f"image {reference}: its index does not list manifest {manifest}", reason="digest-mismatch"
                )
            digests.insert(0, reference.digest)
        digests, admission = await self._admit(reference, digests)
        resolved = await fetch_image(self._source, source, None, self._limits)
        image = plan(reference, source, resolved.manifest, resolved.manifest_digest, resolved.config, admission)
        if claim.bootstrap is not None and (
            not isinstance(image, LazyImage) or image.bootstrap.digest != claim.bootstrap
        ):
            raise IntegrityError(
                f"image {reference}: has another bootstrap than its tag says", reason="digest-mismatch"
            )
        if isinstance(image, OrdinaryImage):
            self._policy.require_sealed(reference, False, "it has no bootstrap layer")
            self._policy.check_wrapping(reference, admission, {}, self._limits)
            return image
        if isinstance(image, EncryptedImage):
            return replace(image, admission=self._admit_layers(image))
        self._policy.require_sealed(reference, image.encrypted, "its bootstrap layer is not encrypted")
        admission = self._policy.check_wrapping(reference, admission, _wrapping(image.bootstrap), self._limits)
        return replace(image, admission=admission, documents=(*digests, resolved.manifest.config.digest))

    def _admit_layers(self, image: EncryptedImage) -> Admission:
        everything = all(map(is_encrypted, image.layers))
        self._policy.require_sealed(image.reference, everything, "not all of its layers are encrypted")
        admission = image.admission
        for layer in image.layers:
            admission = self._policy.check_wrapping(image.reference, image.admission, _wrapping(layer), self._limits)
        if admission.authentic and not image.admission.authentic:
            # The KEK tells who made each layer, and nothing tells which of them belong together, or the config.
            raise PolicyDenied(f"image {image.reference}: a KEK makes only sealed images authentic")
        return admission

    async def basis(self, claim: LayerClaim) -> str:
        """See Origin.basis. Raises as it does, and BadReference."""
        return await self._origin.basis(Reference.parse(claim.image))

    async def keep(self, admission: Admission) -> None:
        """Remember what an image that passed every step was admitted by."""
        await self._origin.keep(admission)

    async def _admit(self, reference: Reference, digests: list[Digest]) -> tuple[list[Digest], Admission]:
        """With the digests that counted. An index that a tag leads to may be what is pinned or signed."""
        try:
            return digests, await self._origin.admit(reference, digests)
        except PolicyDenied:
            if not self._origin.index_counts(reference):
                raise
            through = await self._through_index(reference, digests[-1])
            if through == digests:
                raise
            return through, await self._origin.admit(reference, through)

    async def _hinted(self, reference: Reference, chain_id: str) -> Digest:
        """The manifest under the tag that hints lead to."""
        self._policy.require_reference(f"layer {chain_id}")
        try:
            _, _, manifest = await self._source.manifest(reference)
        except NotFound:
            raise FailedPrecondition(
                f"layer {chain_id}: the client sent no image labels, and {reference}, to which the layer's annotations "
                "lead, does not exist",
                hint=f"copy the image's manifest to that tag, or {SEND_LABELS}",
            ) from None
        return manifest

    async def _through_index(self, reference: Reference, manifest: Digest) -> list[Digest]:
        """A tag may lead to a pinned index; the digests on that way, or only the manifest's when it does not."""
        try:
            _, _, top = await self._source.manifest(reference)
        except NotFound:
            return [manifest]
        listed = await image_digests(self._source, reference.pinned(top), self._limits)
        return [top, manifest] if manifest in listed else [manifest]


def plan(
    reference: Reference,
    source: Reference,
    manifest: Manifest,
    manifest_digest: Digest,
    config: dict[str, Any],
    admission: Admission,
) -> Image:
    """Tell data blobs, bootstrap and ordinary layers apart. Raises MalformedImage for a mixture that has no meaning."""
    layers = manifest.layers
    bootstraps = [i for i, layer in enumerate(layers) if labels.NYDUS_BOOTSTRAP in layer.annotations]
    blobs = [i for i, layer in enumerate(layers) if _is_blob(layer)]
    if not bootstraps and not blobs:
        if any(map(is_encrypted, layers)):
            diff_ids = tuple(map(Digest.parse, config["rootfs"]["diff_ids"]))
            return EncryptedImage(reference, source, manifest_digest, layers, diff_ids, admission)
        return OrdinaryImage(manifest_digest, admission)
    if len(bootstraps) != 1 or blobs != list(range(bootstraps[0])):
        raise MalformedImage(
            f"image {reference}: layers must be data blobs, then one bootstrap, then ordinary layers; "
            f"found bootstraps at {bootstraps} and data blobs at {blobs}"
        )
    top = bootstraps[0]
    if layers[top].annotations.get(labels.NYDUS_FS_VERSION, "6") != "6":
        raise MalformedImage(f"image {reference}: only RAFS v6 is supported")
    return LazyImage(reference, source, manifest_digest, tuple(layers[:top]), layers[top], config, admission)


def is_encrypted(layer: Descriptor) -> bool:
    return layer.media_type.endswith(labels.ENCRYPTED_SUFFIX)


def _wrapping(layer: Descriptor) -> Mapping[str, str]:
    """What tells how the layer's key is wrapped: of one that is not encrypted, annotations tell nothing."""
    return layer.annotations if is_encrypted(layer) else {}


def _is_blob(layer: Descriptor) -> bool:
    return layer.media_type == labels.MEDIA_NYDUS_BLOB or labels.NYDUS_BLOB in layer.annotations
