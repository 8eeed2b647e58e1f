"""What the snapshotter needs to know about images: is this layer lazy, may it run, mount it, let it go.

Ties the rooms of the pull path together (resolver → loader → attachment → blobd → EROFS). An image is verified whole
at its first layer; later layers of the same pull find the verdict here, since a manifest digest cannot change meaning.
"""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import structlog

from snapshotter import failpoints, labels
from snapshotter.bootstrap.loader import LoadedImage, Loader
from snapshotter.digest import Digest
from snapshotter.errors import IntegrityError, KeyDenied, SnapshotterError
from snapshotter.image.claim import LayerClaim
from snapshotter.image.documents import DocumentCache
from snapshotter.image.manifest import chain_ids
from snapshotter.image.policy import ImagePolicy
from snapshotter.image.resolver import EncryptedImage, EncryptedLayer, Image, LazyImage, OrdinaryImage, Resolver
from snapshotter.monitor.trail import Trail
from snapshotter.ondemand import attachment
from snapshotter.snapshots.remote import ImageRecord, LayerRequest, LayerVerdict, NamedLayer
from snapshotter.snapshots.wholelayers import WholeLayers

log = structlog.get_logger(__name__)

K = TypeVar("K")
V = TypeVar("V")

VERDICTS = 256  # images whose verdict is remembered; each is a few kilobytes
LOADED = 2  # verified images whose metadata is kept in memory until their first container,
LOADED_SECONDS = 300.0  # if it comes soon: chunk keys are in there


class Attachments(Protocol):
    """The data plane, seen from here: keeper and blobd."""

    async def attached(self, attach_id: int) -> int | None:
        """Number of devices of an attached image, None if it is not attached."""

    async def attach(self, attach_id: int, memfd: int) -> None: ...

    async def detach(self, attach_id: int) -> None: ...


class Mounter(Protocol):
    async def mount(self, image_id: int, devices: int, target: Path) -> None: ...

    async def unmount(self, target: Path) -> None: ...

    def is_mounted(self, target: Path) -> bool: ...


class Verdict:
    """A verified lazy image without its secrets."""

    __slots__ = ("chain", "image", "root", "sealed")

    def __init__(self, loaded: LoadedImage) -> None:
        self.image: LazyImage = loaded.image
        self.chain = loaded.chain
        self.sealed = loaded.sealed
        self.root = loaded.root

    def record(self) -> ImageRecord:
        return ImageRecord(
            reference=str(self.image.reference),
            manifest=str(self.image.manifest_digest),
            bootstrap=str(self.image.bootstrap.digest),
            chain_id=str(self.chain[-1]),
            sealed=self.sealed,
            root_mode=self.root.mode & 0o7777,
            root_uid=self.root.uid,
            root_gid=self.root.gid,
        )


AnyVerdict: TypeAlias = Verdict | EncryptedImage | OrdinaryImage


class Images:
    """The `RemoteImages` of a real node."""

    def __init__(
        self,
        documents: DocumentCache,
        resolver: Resolver,
        loader: Loader,
        policy: ImagePolicy,
        attachments: Attachments,
        mounter: Mounter,
        trail: Trail | None = None,
        layers: WholeLayers | None = None,
    ) -> None:
        """`layers`: for images whose layers are encrypted as a whole; None where no key is configured."""
        self._documents = documents
        self._resolver = resolver
        self._loader = loader
        self._policy = policy
        self._attachments = attachments
        self._mounter = mounter
        self._trail = trail or Trail()
        self._layers = layers
        # By reference, manifest (None for hints, whose reference names the content) and what the trust policy says.
        self._verdicts: OrderedDict[tuple[str, str | None, str], AnyVerdict] = OrderedDict()
        self._loaded: OrderedDict[tuple[str, str], LoadedImage] = OrderedDict()
        # A lock lives as long as somebody waits for it, so remote names cannot fill this table.
        self._locks: WeakValueDictionary[object, asyncio.Lock] = WeakValueDictionary()
        self._mounting: set[asyncio.Task[None]] = set()

    @property
    def only_verified(self) -> bool:
        """Nothing may be unpacked or committed here that did not come from a verified image."""
        return self._policy.only_verified

    async def resolve(self, request: LayerRequest) -> LayerVerdict:
        """Raises what the order of trust raises; nothing of a refused image is kept."""
        free = not _lazy(request.labels) and not self._policy.restricts_ordinary
        if free and (self._layers is None or labels.CRI_MANIFEST_DIGEST not in request.labels):
            return LayerVerdict("ordinary", None)
        claim = LayerClaim.of(request.labels, request.chain_id, request.parent_chain)
        try:
            verdict = await self._verdict(claim, request.namespace)
        except SnapshotterError as error:
            if not free:
                raise
            # Only to see whether it is encrypted. If it is, containerd cannot unpack it and says so.
            log.info("image not looked at", image=claim.image, error=str(error))
            return LayerVerdict("ordinary", None)
        if isinstance(verdict, OrdinaryImage):
            return LayerVerdict("ordinary", None)
        if isinstance(verdict, EncryptedImage):
            return self._encrypted(claim, verdict, request.namespace)
        kind = self._place(claim, verdict.image, verdict.chain)
        if kind == "ordinary":
            return LayerVerdict("ordinary", None)
        return LayerVerdict(kind, verdict.record(), hinted=claim.manifest is None)

    async def recall(self, layer: NamedLayer) -> LayerVerdict:
        """As `resolve`: the whole order of trust, for what a snapshot's name claims."""
        manifest = Digest.parse(layer.manifest) if layer.manifest else None
        bootstrap = Digest.parse(layer.bootstrap)
        claim = LayerClaim(layer.reference, manifest, bootstrap, layer.chain_id, None, bootstrap)
        verdict = await self._verdict(claim, "")
        if not isinstance(verdict, Verdict) or layer.chain_id not in verdict.chain:
            raise IntegrityError(
                f"image {layer.reference}: has no layer {layer.chain_id}, which its snapshot's name claims",
                reason="chain-mismatch",
            )
        return LayerVerdict("image" if layer.chain_id == verdict.chain[-1] else "data", verdict.record())

    def _encrypted(self, claim: LayerClaim, image: EncryptedImage, namespace: str) -> LayerVerdict:
        """The layer that containerd means, which is told by its place, since two layers may be equal."""
        chain = chain_ids(image.diff_ids)
        for number, (layer, own) in enumerate(zip(image.layers, chain, strict=True)):
            parent = chain[number - 1] if number else ""
            if (layer.digest, own, parent) == (claim.layer, claim.chain_id, claim.parent_chain):
                wanted = image.layer(number)
                if wanted is None:
                    return LayerVerdict("ordinary")
                if self._layers is None:
                    raise KeyDenied(f"image {image.reference}: is encrypted, and no key is configured")
                return LayerVerdict("encrypted", unpack=partial(self._unpack, self._layers, claim, namespace, wanted))
        raise _chain_mismatch(claim, image)

    async def _unpack(
        self, layers: WholeLayers, claim: LayerClaim, namespace: str, layer: EncryptedLayer, target: Path,
        staging: Path, lower: Sequence[Path], going: Callable[[], bool],
    ) -> None:  # fmt: skip
        about = self._trail.about(claim.manifest or claim.image, claim.image, namespace)
        with about, self._trail.timed("unpack"):
            await layers.unpack(layer, target, staging, lower, going)

    def _place(self, claim: LayerClaim, image: LazyImage, chain: Sequence[str]) -> Literal["ordinary", "data", "image"]:
        """Which of the image's layers this is. Its chain id must be the one computed from the layers themselves."""
        digests = [*(blob.digest for blob in image.blobs), image.bootstrap.digest]
        if claim.layer not in digests:
            if claim.manifest is None:  # whoever made the layer chose the image that we looked at
                raise _chain_mismatch(claim, image)
            self._policy.require_sealed(image.reference, False, f"layer {claim.layer} is not sealed")
            if claim.parent_chain in ("", None, *chain[:-1]):
                raise _chain_mismatch(claim, image)
            return "ordinary"
        index = _index(claim, digests, chain)
        if index is None:
            raise _chain_mismatch(claim, image)
        return "image" if index == len(digests) - 1 else "data"

    async def _verdict(self, claim: LayerClaim, namespace: str) -> AnyVerdict:
        key = (claim.image, claim.manifest, await self._resolver.basis(claim))
        async with self._lock(key):
            known = self._verdicts.get(key)
            if known is not None:
                self._verdicts.move_to_end(key)
                return known
            with self._trail.about(claim.manifest or claim.image, claim.image, namespace):
                image = await self._resolve(claim)
                verdict: AnyVerdict
                if isinstance(image, LazyImage):
                    blobs = [blob.digest for blob in image.blobs]
                    if claim.layer in blobs and _index(claim, blobs, chain_ids(blobs)) is None:
                        raise _chain_mismatch(claim, image)  # which shows before a key is asked for
                    loaded = await self._load(image)
                    await self._documents.keep(image.documents)
                    await self._resolver.keep(image.admission)
                    verdict = Verdict(loaded)
                    pulled = (str(image.reference), image.manifest_digest)
                    _remember(self._loaded, pulled, loaded, LOADED)
                    asyncio.get_running_loop().call_later(LOADED_SECONDS, self._loaded.pop, pulled, None)
                else:
                    verdict = image
            self._trail.pulls.add(_kind(verdict))
            log.info("image admitted", image=claim.image, manifest=image.manifest_digest, rule=image.admission.rule)
            _remember(self._verdicts, key, verdict, VERDICTS)
            return verdict

    async def _resolve(self, claim: LayerClaim) -> Image:
        with self._trail.timed("resolve", reference=claim.image):
            return await self._resolver.resolve(claim)

    async def _load(self, image: LazyImage) -> LoadedImage:
        with self._trail.timed("load") as told:
            loaded = await self._loader.load(image)
            told |= {"kind": _kind(loaded), "blobs": len(loaded.devices), "bootstrap": len(loaded.bootstrap)}
            return loaded

    async def stored(self, record: ImageRecord) -> int:
        """Of the bootstrap layer: 0 if it is not in the cache."""
        return await self._loader.stored(Digest.parse(record.bootstrap))

    async def mount(self, attach_id: int, record: ImageRecord, target: Path) -> None:
        """Idempotent: attach the image if the data plane does not hold it, then mount its EROFS at `target`.

        Begun, it goes on to its end whether or not somebody waits: half-way, threads and a child use descriptors of
        ours, and those who ask next, or unmount, wait for the lock.
        """
        task = asyncio.create_task(self._mount(attach_id, record, target))
        self._mounting.add(task)
        task.add_done_callback(self._mounting.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_note_failure)
            raise

    async def _mount(self, attach_id: int, record: ImageRecord, target: Path) -> None:
        async with self._lock(attach_id):
            if self._mounter.is_mounted(target):
                return
            with self._trail.about(record.manifest, record.reference):
                devices = await self._attachments.attached(attach_id)
                if devices is None:
                    with self._trail.timed("attach", id=attach_id):
                        devices = await self._attach(attach_id, record)
                failpoints.hit("mount.attached")
                with self._trail.timed("mount", id=attach_id):
                    await self._mounter.mount(attach_id, devices, target)
            failpoints.hit("mount.done")
            log.info("image mounted", image=record.reference, bootstrap=record.bootstrap, attach_id=attach_id)

    async def _attach(self, attach_id: int, record: ImageRecord) -> int:
        key = (record.reference, record.manifest)
        loaded = self._loaded.pop(key, None) or await self._load_again(record)
        memfd = await asyncio.to_thread(
            attachment.pack,
            attach_id,
            repository=f"{loaded.image.source.host}/{loaded.image.source.repository}",
            manifest=loaded.image.manifest_digest,
            bootstrap_digest=loaded.image.bootstrap.digest,
            bootstrap=loaded.bootstrap,
            blobs=loaded.devices,
        )
        failpoints.hit("attach.packed")
        try:
            await self._attachments.attach(attach_id, memfd)
        finally:
            os.close(memfd)
        return len(loaded.devices) + 1

    async def _load_again(self, record: ImageRecord) -> LoadedImage:
        """The data plane lost the image (reboot): verify it once more, from the cached layer if that is still good."""
        claim = LayerClaim(
            record.reference, Digest.parse(record.manifest), Digest.parse(record.bootstrap), record.chain_id, ""
        )
        image = await self._resolve(claim)
        if not isinstance(image, LazyImage) or image.bootstrap.digest != record.bootstrap:
            raise IntegrityError(f"image {record.reference}: is not the image that was pulled", reason="chain-mismatch")
        loaded = await self._load(image)
        if loaded.chain[-1] != record.chain_id:
            raise _chain_mismatch(claim, image)
        return loaded

    async def unmount(self, attach_id: int, target: Path) -> None:
        """Unmount and let the data plane forget the image and its keys."""
        async with self._lock(attach_id):
            if self._mounter.is_mounted(target):
                await self._mounter.unmount(target)
                failpoints.hit("unmount.done")
            await self._attachments.detach(attach_id)

    def _lock(self, key: object) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())


def _kind(image: LoadedImage | AnyVerdict) -> str:
    if isinstance(image, OrdinaryImage):
        return "ordinary"
    if isinstance(image, EncryptedImage):
        return "encrypted"
    return "sealed" if image.sealed else "plain"


def _note_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()):
        log.info("mount that nobody waited for failed", error=str(error))


def _lazy(snapshot_labels: Mapping[str, str]) -> bool:
    return labels.NYDUS_BLOB in snapshot_labels or labels.NYDUS_BOOTSTRAP in snapshot_labels


def _index(claim: LayerClaim, digests: Sequence[str], chain: Sequence[str]) -> int | None:
    """Which of the layers, bottom first, the claim means: two may be equal, so it is told by its chain id, too."""
    for index, (digest, own) in enumerate(zip(digests, chain, strict=False)):  # the chain may go on above
        parent = chain[index - 1] if index else ""
        if (digest, own, parent) == (claim.layer, claim.chain_id, claim.parent_chain):
            return index
    return None


def _chain_mismatch(claim: LayerClaim, image: LazyImage | EncryptedImage) -> IntegrityError:
    return IntegrityError(
        f"image {image.reference}: claims chain id {claim.chain_id} for layer {claim.layer}, which is not its own",
        reason="chain-mismatch",
    )


def _remember(table: "OrderedDict[K, V]", key: K, value: V, most: int) -> None:
    table[key] = value
    while len(table) > most:
        table.popitem(last=False)
