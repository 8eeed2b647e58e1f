"""Start-up: a lost database is made again from the sidecars, and database and directories are brought to agree."""

import contextlib
import re
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path

import structlog

from snapshotter import failpoints
from snapshotter.errors import ConfigError
from snapshotter.snapshots import sidecar
from snapshotter.snapshots.directories import Directories, RootAttributes
from snapshotter.snapshots.store import DamagedStore, Entry, Store, refuse_newer

log = structlog.get_logger(__name__)

DATABASE = "metadata.db"
UNVERIFIED = "unverified"  # exists if snapshots in this root may come from images that nobody verified
_NUMBER = re.compile(r"(?:(?:old|lost)-)?(\d{1,18})\b")


def open_store(root: Path) -> Store:
    """The database of `root`. A damaged one is moved aside, and what the sidecars know takes its place.

    Raises FailedPrecondition for the database of a newer program, sqlite3.OperationalError where none can be kept.
    """
    path = root / DATABASE
    try:
        return _open(root)
    except DamagedStore as error:
        aside = root / f"{DATABASE}.damaged-{time.time_ns()}"
        log.error("database is damaged, making a new one from the sidecars", error=str(error), kept_as=str(aside))
        for suffix in ("-wal", "-shm", ""):
            if Path(f"{path}{suffix}").exists():
                Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
        failpoints.hit("recover.aside")
        return Store(path, lambda: _remembered(root))


def _open(root: Path) -> Store:
    store = Store(root / DATABASE, lambda: _remembered(root))
    directories = Directories(root)
    unknown = [int(name) for name in directories.names() if name.isdecimal() and int(name) > store.last_id]
    # One may be the trace of a crash in the middle of making it. More means that the write-ahead log was lost or cut,
    # which SQLite does not notice; without this they would be taken for garbage.
    if len([number for number in unknown if sidecar.read(directories.path(number))]) > 1:
        store.close()
        raise DamagedStore(f"does not know the newest {len(unknown)} directories")
    return store


def refuse_newer_database(root: Path) -> None:
    """Raises FailedPrecondition if the database of `root` is a newer program's. Changes nothing; it may be in use."""
    name = f"{(root / DATABASE).as_uri()}?mode=rw"
    # Missing, busy or damaged: not a question of versions.
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(name, uri=True)) as db:
        refuse_newer(db)


def require_verified(root: Path, store: Store, only_verified: bool) -> None:
    """Note that unverified snapshots may be made in `root`; where only verified ones may run, refuse if they were.

    Snapshots are not verified again when containers use them, and nobody could: what was unpacked has no digest.
    """
    note = root / UNVERIFIED
    if not only_verified:
        note.touch(mode=0o600)
    elif not store.all_ids():
        note.unlink(missing_ok=True)
    elif note.exists():
        raise ConfigError(f"config: {root} holds snapshots that were made in mode open", hint="use another root")


def _remembered(root: Path) -> Iterable[Entry]:
    """What the sidecars know, parents before children. Directories that nobody can explain are kept as `lost-…`."""
    directories = Directories(root)
    entries: dict[int, Entry] = {}
    for number in sorted(int(name) for name in directories.names() if name.isdecimal()):
        if entry := sidecar.read(directories.path(number)):
            entries[number] = entry
        else:
            _set_aside(directories, number, "no usable sidecar")
    waiting = _latest(entries.values())
    known: dict[int, Entry] = {}
    while waiting:  # a generation each time
        born = {number: e for number, e in waiting.items() if e.row.parent_id is None or e.row.parent_id in known}
        if not born:
            break
        known |= born
        waiting = {number: entry for number, entry in waiting.items() if number not in born}
    for number in waiting:
        _set_aside(directories, number, "its parent is lost")
    if known:
        log.warning("database made again from sidecars", snapshots=len(known))
    return known.values()


def _latest(entries: Iterable[Entry]) -> dict[int, Entry]:
    """A removed snapshot may still have its directory; whoever took its name or its place has a higher id."""
    names = {(entry.plugin, entry.row.name): entry for entry in entries}
    places = {(entry.plugin, entry.row.ref or entry.row.id, entry.row.parent_id): entry for entry in names.values()}
    return {entry.row.id: entry for entry in places.values()}


def _set_aside(directories: Directories, number: int, why: str) -> None:
    kept = directories.retire(str(number), "lost")
    log.error("directory cannot be explained", id=number, why=why, kept_as=str(kept))


def reconcile(store: Store, directories: Directories) -> None:
    """Give remote snapshots their directories back, report others without one, and never use an id seen on disk again.

    Directories without a row are not touched here; mounts of images that still exist stay.
    """
    names = directories.names()
    store.reserve(max((int(match[1]) for match in map(_NUMBER.match, names) if match), default=0))
    present = set(names)
    for entry in store.entries():
        row = entry.row
        if str(row.id) in present:
            noted = sidecar.read(directories.path(row.id))
            if noted and noted.image and not entry.image:  # the record in the database cannot be read
                store.set_record(row.id, noted.image)
                entry = entry._replace(image=noted.image)
            if entry.image:
                directories.remove_mountpoint(row.id)  # which a reboot left empty
            if noted != entry:  # a crash may take what was written last
                sidecar.write(directories.path(row.id), entry, durable=False)
            continue
        if row.ref is None:
            log.error("snapshot has lost its directory", id=row.id, snapshot=row.name[:200])
            continue
        path = directories.make("remote", RootAttributes())
        sidecar.write(path, entry, durable=True)
        failpoints.hit("reconcile.made")
        directories.place(path, row.id)
        log.warning("directory of a remote snapshot made again", id=row.id)
