"""What a client says about the layer that it prepares: labels, all of which are checked before they are believed.

CRI labels name the image that was asked for. A client that sends none still hands on what the image's maker wrote into
the layer's annotations: *hints*, which name a repository and a bootstrap. The converter tags each manifest with the
digest of its bootstrap, so hints lead to a manifest; they cannot tell which image, hence which config, will run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from snapshotter import labels
from snapshotter.digest import Digest
from snapshotter.errors import BadReference, FailedPrecondition
from snapshotter.registry.reference import Reference

SEND_LABELS = (
    "have containerd send image labels: disable_snapshot_annotations = false in its CRI plugin, or "
    'exports.enable_remote_snapshot_annotations = "true" in the proxy plugin (2.1+)'
)
_CRI = (labels.CRI_IMAGE_REF, labels.CRI_MANIFEST_DIGEST, labels.CRI_LAYER_DIGEST)
_HINTS = (labels.HINT_REPOSITORY, labels.HINT_BOOTSTRAP_DIGEST, labels.HINT_LAYER_DIGEST)


def hint_tag(bootstrap: Digest) -> str:
    """The tag under which `convert` leaves a manifest for those who know only the digest of its bootstrap layer."""
    return f"coco-{bootstrap.hex}"


@dataclass(frozen=True, slots=True)
class LayerClaim:
    """`manifest` is None, and `bootstrap` is not, when the claim is made of hints."""

    image: str
    manifest: Digest | None
    layer: Digest
    chain_id: str
    parent_chain: str | None  # None: the parent is no layer that we know
    bootstrap: Digest | None = None

    @classmethod
    def of(cls, given: Mapping[str, str], chain_id: str, parent_chain: str | None) -> Self:
        """From CRI labels, else from hints. Raises FailedPrecondition naming the setting that brings the labels."""
        image, manifest, layer = (given.get(name, "") for name in _CRI)
        if image and manifest and layer:
            return cls(image, Digest.parse(manifest), Digest.parse(layer), chain_id, parent_chain)
        repository, bootstrap, layer = (given.get(name, "") for name in _HINTS)
        if repository and bootstrap and layer:
            top = Digest.parse(bootstrap)
            image = f"{_repository(repository)}:{hint_tag(top)}"
            return cls(image, None, Digest.parse(layer), chain_id, parent_chain, top)
        missing = next(name for name in _CRI if not given.get(name))
        raise FailedPrecondition(f"layer {chain_id}: a lazy image needs label {missing}", hint=SEND_LABELS)


def _repository(hint: str) -> Reference:
    named = Reference.parse(hint)
    if named.tag is not None or named.digest is not None:
        raise BadReference(f"label {labels.HINT_REPOSITORY}: {hint[:200]!r} is more than a repository")
    return named
