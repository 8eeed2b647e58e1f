"""The snapshotter: containerd's operations on store, directories and images.

A change happens in one step of the event loop, as one transaction with the directory's rename inside: so it is done
whole or not at all, whichever call is cancelled and whenever the process dies. Whatever has to be waited for (verifying
an image, mounting it, measuring a directory) comes before that step and changes nothing that matters.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from snapshotter import failpoints
from snapshotter.config import Limits
from snapshotter.errors import (
    AlreadyExists,
    FailedPrecondition,
    IntegrityError,
    InvalidArgument,
    NotFound,
    PolicyDenied,
    SnapshotterError,
)
from snapshotter.image.claim import SEND_LABELS
from snapshotter.labels import NYDUS_BLOB, NYDUS_BOOTSTRAP, PARENT_CHAIN_ID, SNAPSHOT_REF, UID_MAPPING
from snapshotter.mounts.drivers import overlay_of
from snapshotter.mounts.mountinfo import read_mounts
from snapshotter.snapshots import directories, names, overlay, recovery, sidecar
from snapshotter.snapshots.directories import Directories, RootAttributes
from snapshotter.snapshots.filters import Filter
from snapshotter.snapshots.idmap import IdMap
from snapshotter.snapshots.measurements import Measurements
from snapshotter.snapshots.model import Info, Kind, Labels, Mount, Usage
from snapshotter.snapshots.remote import ImageRecord, LayerRequest, LayerVerdict, NamedLayer, RemoteImages, Unpack
from snapshotter.snapshots.store import Entry, Layer, Row, Store
from snapshotter.snapshots.unpacking import Unpacking

log = structlog.get_logger(__name__)

_BATCH = 100  # snapshots per message of a List
_LABELS, _LABELS_BYTES = 10_000, 8 << 20  # of one snapshot, which has to fit into a message of 16 MiB
_AGAIN = 10.0  # seconds until what could not be disposed of is tried once more


class Snapshotter:
    """In every method, `plugin` is the name under which containerd knows this service: each has its own snapshots."""

    def __init__(self, root: Path, store: Store, images: RemoteImages, limits: Limits) -> None:
        recovery.require_verified(root, store, images.only_verified)
        self._store = store
        self._directories = Directories(root)
        self._images = images
        self._limits = limits
        self._measurements = Measurements(
            lambda number: directories.measure(self._files(number)),
            lambda number: directories.glance(self._files(number)),
        )
        self._overlay_options = overlay.options()
        self._cleaner: asyncio.Task[None]
        self._cleaning = asyncio.Lock()
        self._unpacking = Unpacking(self._directories)
        self._stayed = asyncio.Event()  # the last `cleanup` left something
        self._locks: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()  # one per image in transition

    # making snapshots

    async def prepare(self, plugin: str, key: str, parent: str, labels: Labels, namespace: str = "") -> Sequence[Mount]:
        """A writable snapshot, or AlreadyExists if containerd need not unpack the layer that it wants to put there.

        Raises InvalidArgument, NotFound, AlreadyExists, and whatever verifying the image raises.
        """
        self._check(plugin, key, labels)
        above = await self._parent(plugin, parent)
        self._store.require_free(plugin, key)
        ref = labels.get(SNAPSHOT_REF)
        if not ref and (NYDUS_BLOB in labels or NYDUS_BOOTSTRAP in labels):
            raise FailedPrecondition(
                f"a layer that is read on demand came without label {SNAPSHOT_REF}", hint=SEND_LABELS
            )
        if ref and labels.get(PARENT_CHAIN_ID) and above is None:
            raise FailedPrecondition(
                f"layer {ref} is to be unpacked without the layers below it, which would lose what it deletes",
                hint='remove "rebase" from the capabilities of the proxy plugin',
            )
        if ref:
            request = LayerRequest(namespace, labels, ref, self._chain_id(above))
            verdict = await self._images.resolve(request)
            failpoints.hit("prepare.resolved")
            if verdict.unpack is not None:
                await self._unpack(plugin, above, ref, labels, verdict.unpack)
                raise AlreadyExists(f"layer {ref}: was encrypted and is unpacked")
            if verdict.kind != "ordinary":
                self._provide(plugin, above, ref, labels, verdict)
                raise AlreadyExists(f"layer {ref}: nothing to unpack, it is read on demand")
        return await self._create(plugin, Kind.ACTIVE, key, above, labels)

    async def view(self, plugin: str, key: str, parent: str, labels: Labels) -> Sequence[Mount]:
        """A read-only look at `parent`. Raises as `prepare`."""
        self._check(plugin, key, labels)
        above = await self._parent(plugin, parent)
        self._store.require_free(plugin, key)
        return await self._create(plugin, Kind.VIEW, key, above, labels)

    async def mounts(self, plugin: str, key: str) -> Sequence[Mount]:
        """What making the snapshot returned. Raises NotFound, FailedPrecondition for a committed one."""
        row = self._store.get(plugin, key)
        if row.kind is Kind.COMMITTED:
            raise FailedPrecondition("a committed snapshot has no mounts")
        self._files(row.id)
        lower, attributes = await self._lower(row.parent_id)
        above = self._store.find(plugin, row.parent)
        mapping = self._mapping(IdMap.of(self._store.labels(row.id)), above, attributes)
        return self._mounts(row, lower, mapping)

    async def _create(self, plugin: str, kind: Kind, key: str, above: Row | None, labels: Labels) -> Sequence[Mount]:
        asked = IdMap.of(labels)
        lower, attributes = await self._lower(above and above.id)
        mapping = self._mapping(asked, above, attributes)
        if mapping:
            attributes = mapping.owned(attributes)
        row = self._new(key, above, kind)
        purpose: directories.Purpose = "active" if kind is Kind.ACTIVE else "view"
        self._insert(Entry(plugin, row, _present(labels), None), purpose, attributes)
        return self._mounts(row, lower, mapping)

    def _mounts(self, row: Row, lower: Sequence[Path], mapping: IdMap | None) -> Sequence[Mount]:
        options = mapping.options if mapping else ()
        return overlay.mounts(self._directories, row.id, row.kind, lower, self._overlay_options, options)

    def _mapping(self, asked: IdMap | None, above: Row | None, attributes: RootAttributes) -> IdMap | None:
        """What mounts must map: nothing if the client has made a parent for it whose files have mapped owners."""
        if asked and above and above.ref is None and SNAPSHOT_REF not in self._store.labels(above.id):
            return None if asked.is_root(attributes) else asked
        return asked

    def _provide(self, plugin: str, above: Row | None, ref: str, labels: Labels, verdict: LayerVerdict) -> None:
        """Have a committed snapshot for a layer of a lazy image. containerd finds it by its ref and its parent."""
        if self._store.remote(plugin, ref, above and above.id) is not None:
            return
        row = self._new("", above, Kind.COMMITTED)
        row = row._replace(name=names.name(ref, row.id, verdict), ref=ref)
        record = verdict.record if verdict.kind == "image" else None
        self._insert(Entry(plugin, row, _present(labels), record), "remote", RootAttributes())

    async def _parent(self, plugin: str, name: str) -> Row | None:
        """The row that may become a parent. One that was lost and whose name leads to an image is made again."""
        if layer := self._lost(plugin, name):
            verdict = await self._images.recall(layer)
            if self._lost(plugin, name):  # nobody was faster
                self._restore(plugin, name, layer, verdict)
        return self._store.parent(plugin, name)

    def _lost(self, plugin: str, name: str) -> NamedLayer | None:
        """What the name of a snapshot that is not here leads to."""
        return None if self._store.find(plugin, name) else names.parse(name)

    def _restore(self, plugin: str, name: str, layer: NamedLayer, verdict: LayerVerdict) -> None:
        # What was below it is not known and not needed. There is one snapshot of a layer on each parent, so one that
        # had several names is hung below itself.
        above = self._store.lowest(plugin, layer.chain_id)
        row = self._new(name, above, Kind.COMMITTED)._replace(ref=layer.chain_id)
        record = verdict.record if verdict.kind == "image" else None
        self._insert(Entry(plugin, row, {SNAPSHOT_REF: layer.chain_id}, record), "remote", RootAttributes())
        log.warning("lost snapshot of a lazy image made again", snapshot=name[:200])

    async def _unpack(self, plugin: str, above: Row | None, ref: str, labels: Labels, unpack: Unpack) -> None:
        """Have a committed snapshot for a layer that only we can unpack. containerd finds it by its ref and parent."""
        if self._store.unpacked(plugin, ref, above and above.id):
            return
        lower, attributes = await self._lower(above and above.id)

        async def done(path: Path, usage: Usage) -> None:
            row = self._new("", above, Kind.COMMITTED)._replace(usage=usage)
            row = row._replace(name=f"{ref}@{row.id}")
            self._insert_directory(Entry(plugin, row, _present(labels), None), path, durable=True)

        await self._unpacking.once((plugin, ref, above and above.id), unpack, lower, attributes, done)

    def _new(self, name: str, above: Row | None, kind: Kind) -> Row:
        now = max(time.time_ns(), above.created_ns if above else 0)  # clocks are set back, parents stay older
        parent_id, parent = (above.id, above.name) if above else (None, "")
        return Row(self._store.new_id(), name, parent_id, kind, now, now, Usage(0, 0), None, parent)

    def _insert(self, entry: Entry, purpose: directories.Purpose, attributes: RootAttributes) -> None:
        self._insert_directory(entry, self._directories.make(purpose, attributes), durable=entry.row.ref is not None)

    def _insert_directory(self, entry: Entry, path: Path, *, durable: bool) -> None:
        try:
            failpoints.hit("create.made")
            with self._store.transaction():
                self._store.insert(entry)
                sidecar.write(path, entry, durable=durable)
                failpoints.hit("create.inserted")
                path = self._directories.place(path, entry.row.id)
                failpoints.hit("create.placed")
        except BaseException:
            directories.destroy(path)
            raise
        failpoints.hit("create.done")

    # changing them

    async def commit(self, plugin: str, name: str, key: str, parent: str, labels: Labels) -> None:
        """Make the active snapshot `key` the committed snapshot `name`.

        Raises AlreadyExists, NotFound, FailedPrecondition if it is not active, InvalidArgument for another parent, and
        PolicyDenied where only verified images may become snapshots.
        """
        self._check(plugin, name, labels)
        active = self._store.committable(plugin, name, key)
        if self._images.only_verified:
            raise PolicyDenied(
                f"snapshot {key[:200]!r}: what was unpacked here was never verified and is not committed",
                hint="build the image elsewhere, convert it and pull it",
            )
        usage = await self._measurements.anew(active.id)
        failpoints.hit("commit.measured")
        with self._store.transaction():
            entry = self._store.commit(plugin, active, name, parent, labels, usage)
            sidecar.write(self._directories.path(active.id), entry, durable=False)
            failpoints.hit("commit.written")
        self._measurements.forget(active.id)
        failpoints.hit("commit.done")

    def update(self, plugin: str, name: str, labels: Labels, paths: Sequence[str]) -> Info:
        """Change labels: all of them, or those that `paths` (a field mask) select. Raises NotFound, InvalidArgument."""
        row = self._store.get(plugin, name)
        changed = _masked(self._store.labels(row.id), labels, paths)
        if row.ref is not None:
            changed[SNAPSHOT_REF] = row.ref  # containerd finds the layer by it
        self._check(plugin, name, changed)
        with self._store.transaction():
            entry = self._store.set_labels(plugin, row, changed)
            if self._directories.path(row.id).is_dir():
                sidecar.write(self._directories.path(row.id), entry, durable=False)
            failpoints.hit("update.written")
        failpoints.hit("update.done")
        return entry.info

    def remove(self, plugin: str, name: str) -> None:
        """Forget a snapshot; its directory is destroyed by a later `cleanup`. Raises NotFound, FailedPrecondition."""
        with self._store.transaction():
            row = self._store.delete(plugin, name)
            failpoints.hit("remove.deleted")
        self._measurements.forget(row.id)
        failpoints.hit("remove.done")
        if row.kind is not Kind.COMMITTED or row.ref is None:  # a directory that may hold a mount is for `cleanup`
            with contextlib.suppress(OSError):
                self._directories.retire(str(row.id))

    # looking at them

    def stat(self, plugin: str, name: str) -> Info:
        """Raises NotFound. What was lost and can be made again is there: it is verified when it becomes a parent."""
        if layer := self._lost(plugin, name):
            return Info(name, "", Kind.COMMITTED, 0, 0, {SNAPSHOT_REF: layer.chain_id})
        return self._store.info(plugin, name)

    async def usage(self, plugin: str, name: str) -> Usage:
        """Of this snapshot alone: measured when it was committed, or else lately. Raises NotFound.

        A layer that was not unpacked takes up what is kept to remember it and, of an image, its metadata in the cache.
        """
        if self._lost(plugin, name):
            return Usage(4096, 1)  # what remembering it will take: clients keep the answer, and 0 means unknown to some
        row = self._store.get(plugin, name)
        if row.ref is not None:
            size, inodes = await asyncio.to_thread(directories.own, self._directories.path(row.id), sidecar.NAME)
            record = self._store.image(row.id)
            return Usage(size + await self._images.stored(record), inodes + 1) if record else Usage(size, inodes)
        return row.usage if row.kind is Kind.COMMITTED else await self._measurements.usage(row.id)

    async def walk(self, plugin: str, filters: Sequence[str]) -> AsyncIterator[Sequence[Info]]:
        """Batches of those that match; nothing is held between batches. Raises InvalidArgument for a bad filter."""
        wanted = Filter(filters)
        numbers = self._store.ids(plugin, wanted.required_label())
        for begin in range(0, len(numbers), _BATCH):
            found = [info for info in self._store.infos(numbers[begin : begin + _BATCH]) if wanted.matches(info)]
            if found:
                yield found
            await asyncio.sleep(0)

    def images(self) -> Mapping[int, ImageRecord]:
        """All lazy images by attach id."""
        return self._store.images()

    def images_of(self, container: str) -> Mapping[int, ImageRecord]:
        """Lazy images by attach id that a container's snapshot lies on. `container`: its id or its snapshot's key."""
        layers = [layer for number in self._store.named(container) for layer in self._store.chain(number)]
        return {layer.id: layer.image for layer in layers if layer.image is not None}

    def known(self) -> set[int]:
        """Ids that mean something: those of snapshots, and of directories that `cleanup` will see to."""
        return self._store.all_ids() | {int(name) for name in self._directories.names() if name.isdecimal()}

    def mountpoint(self, attach_id: int) -> Path:
        """Where the image is mounted while it is."""
        return self._directories.mountpoint(attach_id)

    # disposing of what is left

    async def start(self) -> None:
        """Make directories and database agree, and begin to destroy in the background what belongs to neither."""
        recovery.reconcile(self._store, self._directories)
        self._cleaner = asyncio.create_task(self._keep_clean())

    async def _keep_clean(self) -> None:
        """Now, and again when something stayed: containerd asks only after it has removed something."""
        while True:
            await self.cleanup()
            await self._stayed.wait()
            await asyncio.sleep(_AGAIN)

    async def stop(self) -> None:
        """End what `start` began; the rest of the garbage waits for the next start."""
        self._cleaner.cancel()
        await asyncio.gather(self._cleaner, return_exceptions=True)
        await self._unpacking.stop()

    async def cleanup(self) -> None:
        """Unmount and destroy every directory that belongs to no snapshot. One that resists stays for the next time."""
        async with self._cleaning:
            self._stayed.clear()
            for name in await self.garbage():
                try:
                    await self._dispose(name)
                except FileNotFoundError:
                    log.debug("directory has gone meanwhile", directory=name)
                except (OSError, SnapshotterError) as error:
                    log.info("directory stays for now", directory=name, error=str(error))
                    self._stayed.set()

    async def garbage(self) -> list[str]:
        """Names of the directories that belong to no snapshot."""
        names = await asyncio.to_thread(self._directories.names)
        # Snapshots are made in one step of the loop, and we are between steps: what was listed and has no row now will
        # never have one.
        known = self._store.all_ids()
        return [
            name
            for name in names
            if name.startswith(("new-", "old-"))
            or (name.startswith("unpack-") and not self._unpacking.owns(name))
            or (name.isdecimal() and int(name) not in known)
        ]

    async def _dispose(self, name: str) -> None:
        if name.isdecimal():
            number = int(name)
            entry = sidecar.read(self._directories.path(number))
            if entry is None or entry.image is not None:
                await self._unmount(number)
                failpoints.hit("cleanup.unmounted")
            name = self._directories.retire(name).name
        failpoints.hit("cleanup.retired")
        await asyncio.to_thread(directories.destroy, self._directories.base / name)
        failpoints.hit("cleanup.destroyed")

    async def drain(self) -> None:
        """Unmount the images; one that is in use stays."""
        numbers = list(self._store.images())
        results = await asyncio.gather(*map(self._unmount, numbers), return_exceptions=True)
        for number, error in zip(numbers, results, strict=True):
            if error is not None:
                log.info("image stays", attach_id=number, error=str(error))

    async def release(self, number: int) -> None:
        """Unmount the image unless an active snapshot or a view shows it; its next container mounts it again."""
        async with self._lock(number):
            # Whoever mounts it has its row before it lets others run, or waits for the lock and mounts it anew.
            if number not in self._store.users():
                await self._images.unmount(number, self._directories.mountpoint(number))
                self._directories.remove_mountpoint(number)

    # details

    async def _lower(self, number: int | None) -> tuple[list[Path], RootAttributes]:
        """Lower directories of a child of `number`, top first, and the attributes of its root directory.

        A lazy image is one directory, whatever is below it in the chain, and is mounted before this returns.
        """
        chain = self._store.chain(number)
        paths: list[Path] = []
        attributes = RootAttributes()
        for layer in chain:
            if layer.image is not None:
                await self._mount(layer, layer.image)
                paths.append(self._directories.mountpoint(layer.id))
                break
            if layer.is_data:
                raise FailedPrecondition(
                    f"layer {layer.ref} is read on demand as a part of its image, not by itself",
                    hint=f"use the image's topmost snapshot; if this is one, {SEND_LABELS}",
                )
            paths.append(self._files(layer.id))
        if chain:
            record = chain[0].image
            attributes = (
                RootAttributes(record.root_mode, record.root_uid, record.root_gid)
                if record
                else self._directories.attributes(chain[0].id)
            )
        return paths, attributes

    async def _mount(self, layer: Layer, record: ImageRecord) -> None:
        async with self._lock(layer.id):
            if not self._store.exists(layer.id):  # removed while we waited: `cleanup` has unmounted it, or will
                raise NotFound(f"image {record.reference} was removed")
            self._directories.make_mountpoint(layer.id)
            await self._images.mount(layer.id, record, self._directories.mountpoint(layer.id))

    async def _unmount(self, number: int) -> None:
        async with self._lock(number):
            # The mount of a container with mapped ids names a clone of the image; but it names its own directories.
            uppers = [str(self._directories.files(child)) for child in self._store.descendants(number, UID_MAPPING)]
            if uppers and (user := overlay_of(uppers, read_mounts())):
                raise FailedPrecondition(f"unmounting image {number}: {user} uses it", reason="busy")
            await self._images.unmount(number, self._directories.mountpoint(number))
            self._directories.remove_mountpoint(number)

    def _lock(self, number: int) -> asyncio.Lock:
        return self._locks.setdefault(number, asyncio.Lock())

    def _files(self, number: int) -> Path:
        """Of an ordinary snapshot. Raises IntegrityError if it has lost them."""
        path = self._directories.files(number)
        if not os.path.isdir(path):
            raise _lost(number)
        return path

    def _chain_id(self, parent: Row | None) -> str | None:
        if parent is None:
            return ""
        return parent.ref or self._store.labels(parent.id).get(SNAPSHOT_REF)

    def _check(self, plugin: str, name: str, labels: Labels) -> None:
        """Bounds on what a client may have us keep."""
        if not name:
            raise InvalidArgument("a snapshot needs a key or a name")
        most = self._limits.key_bytes
        for what, text in (("snapshotter name", plugin), ("snapshot key or name", name)):
            if len(text.encode()) > most:
                raise InvalidArgument(f"{what} {text[:100]!r}… is longer than {most} bytes")
        for key, value in labels.items():
            if len(key.encode()) + len(value.encode()) > self._limits.label_bytes:
                raise InvalidArgument(f"label {key[:100]!r}: key and value exceed {self._limits.label_bytes} bytes")
        size = sum(len(key.encode()) + len(value.encode()) for key, value in labels.items())
        if len(labels) > _LABELS or size > _LABELS_BYTES:
            raise InvalidArgument(
                f"snapshot {name[:100]!r}: {len(labels)} labels of {size} bytes, not {_LABELS} of {_LABELS_BYTES}"
            )


def _present(labels: Labels) -> dict[str, str]:
    return {key: value for key, value in labels.items() if value}


def _masked(current: Labels, given: Labels, paths: Sequence[str]) -> dict[str, str]:
    """The labels after an Update. What follows `labels.` is the key as it is, dots and all; "" deletes."""
    keys = []
    for path in paths:
        prefix, dot, key = path.partition(".")
        if prefix != "labels":
            raise InvalidArgument(f"field {path[:100]!r} cannot be updated")
        keys += [key] if dot else []
    if len(keys) < len(paths) or not paths:  # all of them
        return _present(given)
    return _present({**current, **{key: given.get(key, "") for key in keys}})


def _lost(number: int) -> IntegrityError:
    return IntegrityError(
        f"snapshot {number} has lost its directory; remove the image and pull it again", reason="lost"
    )
