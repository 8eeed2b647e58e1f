"""The seam between snapshots and images: what is asked about a layer, and what is remembered of a lazy image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol


class LayerRequest(NamedTuple):
    """An extraction Prepare: containerd wants to unpack layer `chain_id` onto the layer `parent_chain`."""

    namespace: str  # "" if the caller names none
    labels: Mapping[str, str]
    chain_id: str
    parent_chain: str | None  # "" for the lowest layer, None if the parent's chain id is not known


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What is needed to find, verify and mount a lazy image again. Kept in the database and in the sidecar."""

    reference: str  # as it was pulled
    manifest: str  # digest of the platform's manifest
    bootstrap: str  # digest of the bootstrap layer
    chain_id: str  # of the bootstrap layer
    sealed: bool
    # Attributes of the image's root directory: a container's own root directory starts with them, and reading them
    # from the mount would touch EROFS.
    root_mode: int = 0o755
    root_uid: int = 0
    root_gid: int = 0


class NamedLayer(NamedTuple):
    """What the name of a lost snapshot says: that it was layer `chain_id` of this image."""

    chain_id: str
    reference: str
    manifest: str | None  # None: it was pulled by hints, and nothing says which config the client has
    bootstrap: str


class Unpack(Protocol):
    """Unpacks one layer of an admitted image."""

    async def __call__(self, target: Path, staging: Path, lower: Sequence[Path], going: Callable[[], bool]) -> None:
        """Fill `target`, an empty directory, on top of `lower` (topmost first). Raises SnapshotterError, OSError."""


class LayerVerdict(NamedTuple):
    """`ordinary`: containerd unpacks it. `data`: part of a lazy image, nothing to unpack. `image`: its bootstrap.

    `encrypted`: containerd cannot unpack it, `unpack` can.
    """

    kind: Literal["ordinary", "data", "image", "encrypted"]
    record: ImageRecord | None = None  # of the lazy image that the layer belongs to
    hinted: bool = False  # the client did not say which image it pulls
    unpack: Unpack | None = None  # of an `encrypted` layer


class RemoteImages(Protocol):
    """Implemented by `images.Images`."""

    @property
    def only_verified(self) -> bool:
        """Nothing may be committed that did not come from a verified image."""

    async def resolve(self, request: LayerRequest) -> LayerVerdict:
        """Verify the image of this layer for this caller. Raises SnapshotterError to refuse."""

    async def recall(self, layer: NamedLayer) -> LayerVerdict:
        """Verify the image of a layer whose snapshot was lost. Raises SnapshotterError; never answers `ordinary`."""

    async def stored(self, record: ImageRecord) -> int:
        """Bytes that the image's own metadata takes up in the cache. Chunks are the node's, not an image's."""

    async def mount(self, attach_id: int, record: ImageRecord, target: Path) -> None:
        """Attach the image to the data plane and mount its EROFS at `target`; done already is fine."""

    async def unmount(self, attach_id: int, target: Path) -> None:
        """Undo `mount`; undone already is fine. Raises FailedPrecondition(reason busy) while it is in use."""
