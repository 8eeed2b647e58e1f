"""The metadata database: one SQLite file, one writer, called directly on the event loop (a commit costs less than two
thread hops).

Tables, all STRICT:

- `snapshot`: one row per snapshot. `id` names its directory, and for a lazy image it is also the id under which the
  data plane knows it; it is never used twice (AUTOINCREMENT; `Store` also counts over rolled back creates, and
  `reserve` over directories without a row). `plugin` is the `snapshotter` field of requests: several plugin names may
  share this service, and each sees only its own snapshots. `name` is a key or, once committed, a name. `parent_id` is
  NULL for a base; a row with children cannot be deleted. `kind` as on the wire. `size` and `inodes` are measured when
  an ordinary snapshot is committed. `ref` is the chain id of a *remote* snapshot (one that was never unpacked here),
  NULL for all others: (plugin, ref, parent) is unique, because containerd looks for exactly that combination.
- `label`: labels of a snapshot, never with an empty value.
- `image`: the remote snapshots that are a whole lazy image (the layer with its bootstrap), with the `ImageRecord` as
  JSON. A remote snapshot without such a row is one of the image's data layers.

What is to be deleted is not listed anywhere: a directory without a row is garbage, however it came to be one.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from snapshotter import failpoints
from snapshotter.errors import AlreadyExists, FailedPrecondition, IntegrityError, InvalidArgument, NotFound
from snapshotter.labels import SNAPSHOT_REF
from snapshotter.snapshots.model import Info, Kind, Labels, Usage
from snapshotter.snapshots.queries import CHAIN, COLUMNS, DESCENDANTS, INFO_COLUMNS, USERS
from snapshotter.snapshots.remote import ImageRecord

VERSION = 1
_LOG_BYTES = 5 << 20  # more than the write-ahead log grows to between checkpoints
_APPLICATION = 0x636F636F  # "coco", in the file's header
_SCHEMA = f"""
CREATE TABLE snapshot (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    plugin TEXT NOT NULL,
    name TEXT NOT NULL,
    parent_id INTEGER REFERENCES snapshot (id) ON DELETE RESTRICT,
    kind INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    size INTEGER NOT NULL DEFAULT 0,
    inodes INTEGER NOT NULL DEFAULT 0,
    ref TEXT,
    UNIQUE (plugin, name)
) STRICT;
CREATE INDEX snapshot_parent ON snapshot (parent_id);
CREATE UNIQUE INDEX snapshot_remote ON snapshot (plugin, ref, ifnull(parent_id, 0)) WHERE ref IS NOT NULL;
CREATE TABLE label (
    snapshot_id INTEGER NOT NULL REFERENCES snapshot (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    value TEXT NOT NULL CHECK (value <> ''),
    PRIMARY KEY (snapshot_id, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX label_value ON label (key, value);
CREATE TABLE image (
    id INTEGER PRIMARY KEY REFERENCES snapshot (id) ON DELETE CASCADE,
    record TEXT NOT NULL
) STRICT;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {VERSION};
"""


# What makes version n + 1 of version n, for every n before VERSION: a step's statements, separated by semicolons.
_STEPS: Mapping[int, str] = {}


class DamagedStore(Exception):
    """The database cannot be used. It can be moved aside and made again from what the directories know."""


class Row(NamedTuple):
    """A row of `snapshot`, with its parent's name."""

    id: int
    name: str
    parent_id: int | None
    kind: Kind
    created_ns: int
    updated_ns: int
    usage: Usage
    ref: str | None
    parent: str


class Layer(NamedTuple):
    """One committed snapshot of a chain, as far as its mounts are concerned."""

    id: int
    name: str
    ref: str | None
    image: ImageRecord | None

    @property
    def is_data(self) -> bool:
        """Part of a lazy image that holds no files of its own."""
        return self.ref is not None and self.image is None


_KINDS = {int(kind): kind for kind in Kind}


class Store:
    """All methods are synchronous and short. Those that write want to be inside `transaction()`."""

    def __init__(self, path: Path, known: Callable[[], Iterable["Entry"]] = tuple) -> None:
        """Open the database, or create it with the snapshots that `known` returns, parents before children.

        Raises DamagedStore for a file that is damaged or not ours, FailedPrecondition for one of a newer program.
        """
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._last_id = 0
        self._db = sqlite3.connect(path, isolation_level=None, timeout=10)
        try:
            self._prepare(known)
            _allocate(f"{path}-wal", _LOG_BYTES)
        except sqlite3.OperationalError:  # locked, no space, I/O error: says nothing about the content
            self._db.close()
            raise
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise DamagedStore(str(error)) from error
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, known: Callable[[], Iterable["Entry"]]) -> None:
        refuse_newer(self._db)
        for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._db.execute(f"PRAGMA {setting}")
        if self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise DamagedStore("quick_check fails")
        if not self._db.execute("SELECT 1 FROM sqlite_schema").fetchone():
            with self.transaction():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                for entry in known():
                    self.insert(entry)
                # What was removed before is not known any more: go on far above, where no id of ours has been.
                self._db.execute("UPDATE sqlite_sequence SET seq = max(seq, ?)", (int(time.time()),))
                failpoints.hit("recover.inserted")
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        if application != _APPLICATION:
            raise DamagedStore("not a database of snapshots")
        self._migrate()
        found = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'snapshot'").fetchone()
        self.reserve(found[0] if found else 0)

    def _migrate(self) -> None:
        """Bring the database of an older program up to date, in one transaction."""
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == VERSION:
            return
        with self.transaction():
            for step in range(version, VERSION):
                for statement in _STEPS[step].split(";"):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and durable once left. What the block did on disk besides, it must undo itself on error."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @property
    def last_id(self) -> int:
        """No id above it was handed out."""
        return self._last_id

    def reserve(self, number: int) -> None:
        """Hand out only ids above `number`, in this process."""
        self._last_id = max(self._last_id, number)

    # reading

    def find(self, plugin: str, name: str) -> Row | None:
        found = self._db.execute(f"SELECT {COLUMNS} WHERE s.plugin = ? AND s.name = ?", (plugin, name))
        return next(map(_row, found), None)

    def get(self, plugin: str, name: str) -> Row:
        """Raises NotFound."""
        row = self.find(plugin, name)
        if row is None:
            raise NotFound(f"snapshot {_short(name)} does not exist")
        return row

    def info(self, plugin: str, name: str) -> Info:
        """Raises NotFound."""
        row = self.get(plugin, name)
        return _info(row, self.labels(row.id))

    def labels(self, number: int) -> dict[str, str]:
        return dict(self._db.execute("SELECT key, value FROM label WHERE snapshot_id = ?", (number,)))

    def ids(self, plugin: str, label: tuple[str, str] | None = None) -> list[int]:
        """Ids of the plugin's snapshots, of those with this label if one is given; remote ones first.

        After ALREADY_EXISTS containerd takes the first committed snapshot with the right label and parent: that must
        not be one which somebody unpacked and labelled alike.
        """
        chosen = "id IN (SELECT snapshot_id FROM label WHERE key = ? AND value = ?)" if label else "1"
        query = f"SELECT id FROM snapshot WHERE plugin = ? AND {chosen} ORDER BY ref IS NULL, id"  # noqa: S608
        return [number for (number,) in self._db.execute(query, (plugin, *(label or ())))]

    def infos(self, numbers: Sequence[int]) -> list[Info]:
        """Those of `numbers` (at most a few hundred) that still exist, in that order."""
        marks = ",".join("?" * len(numbers))
        found = {}
        for number, *columns in self._db.execute(f"SELECT {INFO_COLUMNS} WHERE s.id IN ({marks})", numbers):
            name, parent, kind, created, updated = columns
            found[number] = Info(name, parent, _KINDS[kind], created, updated, {})
        labels = self._db.execute(f"SELECT snapshot_id, key, value FROM label WHERE snapshot_id IN ({marks})", numbers)  # noqa: S608
        for number, key, value in labels:
            found[number].labels[key] = value
        return [found[number] for number in numbers if number in found]

    def plugins(self) -> list[str]:
        """Names under which somebody has snapshots here."""
        return [name for (name,) in self._db.execute("SELECT DISTINCT plugin FROM snapshot ORDER BY plugin")]

    def all_ids(self) -> set[int]:
        """Ids of all snapshots of all plugins: the directories that are not garbage."""
        return {number for (number,) in self._db.execute("SELECT id FROM snapshot")}

    def exists(self, number: int) -> bool:
        return self._db.execute("SELECT 1 FROM snapshot WHERE id = ?", (number,)).fetchone() is not None

    def chain(self, number: int | None) -> list[Layer]:
        """The snapshot `number` and its ancestors, top first; [] for None."""
        if number is None:
            return []
        found = self._db.execute(CHAIN, (number,)).fetchall()
        return [Layer(layer, name, ref, record and _decode(record)) for layer, name, ref, record in found]

    def descendants(self, number: int, label: str) -> list[int]:
        """Ids of the snapshots above `number` that have this label."""
        return [found for (found,) in self._db.execute(DESCENDANTS, (number, label))]

    def remote(self, plugin: str, ref: str, parent_id: int | None) -> int | None:
        """Id of the remote snapshot of layer `ref` on exactly this parent."""
        query = "SELECT id FROM snapshot WHERE plugin = ? AND ref = ? AND ifnull(parent_id, 0) = ?"
        found = self._db.execute(query, (plugin, ref, parent_id or 0)).fetchone()
        return found and found[0]  # type: ignore[no-any-return]

    def count(self) -> dict[Kind, int]:
        """Snapshots of all plugins by kind."""
        found = dict(self._db.execute("SELECT kind, count(*) FROM snapshot GROUP BY kind"))
        return {kind: found.get(kind, 0) for kind in Kind}

    def require_readable(self) -> None:
        """Raises sqlite3.Error."""
        self._db.execute("SELECT 1 FROM snapshot LIMIT 1").fetchone()

    def require_writable(self) -> None:
        """Write and commit something that changes nothing. Raises sqlite3.Error."""
        with self.transaction():
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    def named(self, key: str) -> list[int]:
        """Snapshots of this key, also below the namespace and number that containerd puts in front of it."""
        query = "SELECT id FROM snapshot WHERE name = ? OR substr(name, -length(?)) = ?"
        return [number for (number,) in self._db.execute(query, (key, f"/{key}", f"/{key}"))]

    def image(self, number: int) -> ImageRecord | None:
        found = self._db.execute("SELECT record FROM image WHERE id = ?", (number,)).fetchone()
        return found and _decode(found[0])

    def unpacked(self, plugin: str, ref: str, parent_id: int | None) -> bool:
        """Whether layer `ref` was unpacked here, by us, on exactly this parent."""
        query = (
            "SELECT 1 FROM snapshot s JOIN label l ON l.snapshot_id = s.id WHERE s.plugin = ? AND l.key = ? "
            "AND l.value = ? AND s.ref IS NULL AND s.kind = ? AND ifnull(s.parent_id, 0) = ? "
            "AND s.name = ? || '@' || s.id"
        )
        found = self._db.execute(query, (plugin, SNAPSHOT_REF, ref, Kind.COMMITTED, parent_id or 0, ref))
        return found.fetchone() is not None

    def lowest(self, plugin: str, ref: str) -> Row | None:
        """Of the remote snapshots of layer `ref` that hang below each other, the one that nothing hangs below."""
        found: Row | None = None
        while (number := self.remote(plugin, ref, found and found.id)) is not None:
            found = _row(self._db.execute(f"SELECT {COLUMNS} WHERE s.id = ?", (number,)).fetchone())
        return found

    def images(self) -> dict[int, ImageRecord]:
        """All that can be read. One that cannot must not keep the others from being served."""
        found = {}
        for number, record in self._db.execute("SELECT id, record FROM image"):
            with contextlib.suppress(IntegrityError):
                found[number] = _decode(record)
        return found

    def set_record(self, number: int, record: ImageRecord) -> None:
        """Of a snapshot that is a lazy image."""
        self._db.execute("INSERT OR REPLACE INTO image VALUES (?, ?)", (number, msgspec.json.encode(record).decode()))

    def placed_images(self) -> list[tuple[int, str, int, ImageRecord]]:
        """Attach id, plugin, time of the pull in nanoseconds, and record of each lazy image."""
        query = "SELECT id, plugin, created_ns, record FROM image JOIN snapshot USING (id) ORDER BY id"
        return [(number, plugin, made, _decode(record)) for number, plugin, made, record in self._db.execute(query)]

    def users(self) -> dict[int, list[str]]:
        """Keys of the active snapshots and views that show each lazy image. Images without any are not in there."""
        found: dict[int, list[str]] = {}
        for image, key in self._db.execute(USERS):
            found.setdefault(image, []).append(key)
        return found

    def entries(self) -> Iterator["Entry"]:
        """Every snapshot with all that is known of it."""
        query = f"SELECT s.plugin, {COLUMNS} ORDER BY s.id"
        records = self.images()
        for plugin, *columns in self._db.execute(query).fetchall():
            row = _row(columns)
            yield Entry(plugin, row, self.labels(row.id), records.get(row.id))

    # checking

    def parent(self, plugin: str, name: str) -> Row | None:
        """The row that may become a parent; None for "". Raises NotFound, InvalidArgument unless it is committed."""
        if not name:
            return None
        row = self.find(plugin, name)
        if row is None:
            raise NotFound(f"parent snapshot {_short(name)} does not exist")
        if row.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"parent snapshot {_short(name)} is not committed")
        return row

    def require_free(self, plugin: str, name: str) -> None:
        """Raises AlreadyExists."""
        if self.find(plugin, name) is not None:
            raise AlreadyExists(f"snapshot {_short(name)} already exists")

    def committable(self, plugin: str, name: str, key: str) -> Row:
        """The active snapshot `key` that may be committed as `name`."""
        self.require_free(plugin, name)
        row = self.get(plugin, key)
        if row.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f"snapshot {_short(key)} is not active and cannot be committed")
        return row

    # writing

    def new_id(self) -> int:
        """Never the same again, whether or not it gets a row."""
        self._last_id += 1
        return self._last_id

    def insert(self, entry: "Entry") -> None:
        """A new row. Raises AlreadyExists for its name, NotFound if its parent has gone."""
        plugin, row, labels, image = entry
        self.require_free(plugin, row.name)
        if row.parent_id is not None and not self.exists(row.parent_id):
            raise NotFound(f"parent snapshot {_short(row.parent)} does not exist")
        columns = (
            row.id,
            plugin,
            row.name,
            row.parent_id,
            row.kind,
            row.created_ns,
            row.updated_ns,
            *row.usage,
            row.ref,
        )
        self._db.execute("INSERT INTO snapshot VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", columns)
        self._insert_labels(row.id, labels)
        if image is not None:
            self.set_record(row.id, image)

    def commit(self, plugin: str, active: Row, name: str, parent: str, labels: Labels, usage: Usage) -> "Entry":
        """Make `active` the committed snapshot `name` with these labels; `parent` moves one that has none."""
        current = self.committable(plugin, name, active.name)
        if current.id != active.id:
            raise NotFound(f"snapshot {_short(active.name)} was replaced meanwhile")
        parent_id = current.parent_id
        if parent and parent != current.parent:
            if parent_id is not None:
                raise InvalidArgument(f"snapshot {_short(active.name)} has another parent than {_short(parent)}")
            new_parent = self.get(plugin, parent)
            if new_parent.kind is not Kind.COMMITTED:
                raise FailedPrecondition(f"parent snapshot {_short(parent)} is not committed")
            parent_id = new_parent.id
        now = max(time.time_ns(), current.updated_ns)
        self._db.execute(
            "UPDATE snapshot SET (name, parent_id, kind, created_ns, updated_ns, size, inodes) = (?, ?, ?, ?, ?, ?, ?) "
            "WHERE id = ?",
            (name, parent_id, Kind.COMMITTED, now, now, *usage, active.id),
        )
        self._insert_labels(active.id, labels)
        return Entry(plugin, self.get(plugin, name), self.labels(active.id), None)

    def set_labels(self, plugin: str, row: Row, labels: Labels) -> "Entry":
        """Replace all labels."""
        now = max(time.time_ns(), row.updated_ns)
        self._db.execute("UPDATE snapshot SET updated_ns = ? WHERE id = ?", (now, row.id))
        self._insert_labels(row.id, labels)
        changed = self.get(plugin, row.name)
        return Entry(plugin, changed, self.labels(row.id), self.image(row.id))

    def delete(self, plugin: str, name: str) -> Row:
        """Raises NotFound, FailedPrecondition if it has children."""
        row = self.get(plugin, name)
        if self._db.execute("SELECT 1 FROM snapshot WHERE parent_id = ?", (row.id,)).fetchone():
            raise FailedPrecondition(f"cannot remove snapshot {_short(name)}: it has children")
        self._db.execute("DELETE FROM snapshot WHERE id = ?", (row.id,))
        return row

    def _insert_labels(self, number: int, labels: Labels) -> None:
        self._db.execute("DELETE FROM label WHERE snapshot_id = ?", (number,))
        present = ((number, key, value) for key, value in labels.items() if value)
        self._db.executemany("INSERT INTO label VALUES (?, ?, ?)", present)


class Entry(NamedTuple):
    """A snapshot with everything that a database row and a sidecar know about it."""

    plugin: str
    row: Row
    labels: Labels
    image: ImageRecord | None

    @property
    def info(self) -> Info:
        return _info(self.row, dict(self.labels))


def _allocate(path: str, size: int) -> None:
    """Have the space of the write-ahead log from the beginning: on a full disk, snapshots can still be removed."""
    with contextlib.suppress(OSError):  # full already
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)


def refuse_newer(db: sqlite3.Connection) -> None:
    """Raises FailedPrecondition for the database of a newer program, having changed nothing."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise FailedPrecondition(
            f"metadata.db has version {version}; this program knows version {VERSION}", hint="run the newer program"
        )


def _row(columns: Iterable[object]) -> Row:
    number, name, parent_id, kind, created, updated, size, inodes, ref, parent = columns
    return Row(number, name, parent_id, Kind(kind), created, updated, Usage(size, inodes), ref, parent)  # type: ignore[arg-type]


def _info(row: Row, labels: dict[str, str]) -> Info:
    return Info(row.name, row.parent, row.kind, row.created_ns, row.updated_ns, labels)


def _decode(record: str) -> ImageRecord:
    try:
        return msgspec.json.decode(record, type=ImageRecord)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise IntegrityError(
            f"image record cannot be read ({error}); remove the image and pull it again", reason="lost"
        ) from None


def _short(name: str) -> str:
    """For messages: names may be long and hold anything."""
    return repr(name) if len(name) <= 200 else f"{name[:200]!r}…"
