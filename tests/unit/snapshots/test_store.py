"""The metadata database: the cases of containerd's metastore tests, and ids that never come back."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, SnapshotterError
from snapshotter.snapshots import store as store_module
from snapshotter.snapshots.model import Kind, Labels, Usage
from snapshotter.snapshots.remote import ImageRecord
from snapshotter.snapshots.store import VERSION, DamagedStore, Entry, Row, Store

P = "plugin"
NONE: Labels = {}
RECORD = ImageRecord("r/i:1", "sha256:1", "sha256:2", "sha256:3", True, 0o700, 1, 2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "metadata.db")
    yield store
    store.close()


def insert(
    store: Store,
    name: str,
    parent: str = "",
    kind: Kind = Kind.ACTIVE,
    labels: Labels = NONE,
    *,
    plugin: str = P,
    ref: str | None = None,
    image: ImageRecord | None = None,
) -> int:
    above = store.parent(plugin, parent)
    now = time.time_ns()
    row = Row(store.new_id(), name, above and above.id, kind, now, now, Usage(0, 0), ref, parent)
    with store.transaction():
        store.insert(Entry(plugin, row, labels, image))
    return row.id


def commit(store: Store, name: str, key: str, parent: str = "", labels: Labels = NONE) -> None:
    with store.transaction():
        store.commit(P, store.committable(P, name, key), name, parent, labels, Usage(10, 2))


@pytest.fixture
def full(store: Store) -> Store:
    """committed-1 ← committed-2 ← active-1, view-1; active-2 without parent."""
    insert(store, "active-a")
    commit(store, "committed-1", "active-a")
    insert(store, "active-b", "committed-1")
    commit(store, "committed-2", "active-b", labels={"a": "1"})
    insert(store, "active-1", "committed-2", labels={"b": "2", "empty": ""})
    insert(store, "view-1", "committed-2", Kind.VIEW)
    insert(store, "active-2")
    return store


def test_info_of_each_kind(full: Store) -> None:
    found = {name: full.info(P, name) for name in ("committed-1", "committed-2", "active-1", "view-1", "active-2")}
    assert [info.kind for info in found.values()] == [3, 3, 2, 1, 2]
    assert [info.parent for info in found.values()] == ["", "committed-1", "committed-2", "committed-2", ""]
    assert found["committed-2"].labels == {"a": "1"}
    assert found["active-1"].labels == {"b": "2"}, "empty values are not kept"
    assert full.infos(full.ids(P)) == [full.info(P, info.name) for info in full.infos(full.ids(P))]
    assert {info.name for info in full.infos(full.ids(P))} == found.keys()


@pytest.mark.parametrize("name", ["nothing", ""])
def test_what_is_not_there(full: Store, name: str) -> None:
    for call in (full.get, full.info, full.delete):
        with pytest.raises(NotFound):
            call(P, name)


def test_an_empty_database_knows_nothing(store: Store) -> None:
    with pytest.raises(NotFound):
        store.info(P, "key")
    assert store.ids(P) == []


def test_parents_must_exist_and_be_committed(full: Store) -> None:
    with pytest.raises(NotFound):
        full.parent(P, "nothing")
    for name in ("active-1", "view-1"):
        with pytest.raises(InvalidArgument):
            full.parent(P, name)


def test_names_are_taken_by_any_kind(full: Store) -> None:
    for name in ("committed-1", "active-1", "view-1"):
        with pytest.raises(AlreadyExists):
            insert(full, name)


@pytest.mark.parametrize(
    ("name", "key", "error"),
    [
        ("new", "nothing", NotFound),
        ("committed-1", "active-1", AlreadyExists),
        ("committed-1", "nothing", AlreadyExists),
        ("new", "committed-1", FailedPrecondition),
        ("new", "view-1", FailedPrecondition),
    ],
)
def test_what_cannot_be_committed(full: Store, name: str, key: str, error: type[SnapshotterError]) -> None:
    with pytest.raises(error):
        commit(full, name, key)


def test_commit_replaces_labels_and_key_and_keeps_the_id(full: Store) -> None:
    before = full.get(P, "active-1")
    commit(full, "new", "active-1", labels={"c": "3", "d": ""})
    after = full.get(P, "new")
    assert (after.id, after.parent, after.kind, after.usage) == (before.id, "committed-2", Kind.COMMITTED, Usage(10, 2))
    assert after.created_ns == after.updated_ns > before.created_ns
    assert full.labels(after.id) == {"c": "3"}
    assert full.find(P, "active-1") is None


@pytest.mark.parametrize(
    ("key", "parent", "result"),
    [
        ("active-2", "committed-1", "committed-1"),
        ("active-1", "committed-2", "committed-2"),
        ("active-2", "nothing", NotFound),
        ("active-1", "", "committed-2"),
        ("active-2", "active-1", FailedPrecondition),
        ("active-1", "committed-1", InvalidArgument),
    ],
)
def test_rebase(full: Store, key: str, parent: str, result: str | type[SnapshotterError]) -> None:
    if isinstance(result, str):
        commit(full, "new", key, parent)
        assert full.info(P, "new").parent == result
        insert(full, "child", "new", Kind.VIEW)
        with pytest.raises(FailedPrecondition, match="remove"):
            full.delete(P, "new")
    else:
        with pytest.raises(result):
            commit(full, "new", key, parent)
        assert full.info(P, key).kind is Kind.ACTIVE


def test_remove_only_without_children(full: Store) -> None:
    with pytest.raises(FailedPrecondition, match="remove"):
        full.delete(P, "committed-2")
    for name in ("active-1", "view-1", "committed-2", "committed-1", "active-2"):
        full.delete(P, name)
    assert full.ids(P) == []


def test_chain_goes_from_top_to_bottom(full: Store) -> None:
    top = full.get(P, "committed-2").id
    assert [layer.name for layer in full.chain(top)] == ["committed-2", "committed-1"]
    assert full.chain(None) == []


def test_plugins_do_not_see_each_other(full: Store) -> None:
    insert(full, "committed-1", plugin="other")
    assert full.infos(full.ids("other")) == [full.info("other", "committed-1")]
    full.delete("other", "committed-1")
    assert full.find(P, "committed-1")


def test_ids_are_never_used_twice(full: Store, tmp_path: Path) -> None:
    last = insert(full, "last")
    full.delete(P, "last")
    with pytest.raises(AlreadyExists):
        insert(full, "active-1")
    after_rollback = insert(full, "again")
    assert after_rollback > last + 1
    full.delete(P, "again")
    full.close()
    reopened = Store(tmp_path / "metadata.db")
    assert insert(reopened, "next") > after_rollback
    reopened.reserve(1000)
    assert insert(reopened, "after") == 1001
    reopened.close()


def test_a_failed_transaction_changes_nothing(full: Store) -> None:
    before = full.infos(full.ids(P))
    with pytest.raises(NotFound), full.transaction():  # noqa: PT012 - the second statement raises
        full.delete(P, "active-1")
        full.delete(P, "nothing")
    assert full.infos(full.ids(P)) == before


def test_remote_snapshots_are_unique_per_layer_and_parent(store: Store) -> None:
    base = insert(store, "base", kind=Kind.COMMITTED, ref="sha256:a")
    other = insert(store, "unpacked", kind=Kind.COMMITTED)
    one = insert(store, "one", "base", Kind.COMMITTED, ref="sha256:b", image=RECORD)
    two = insert(store, "two", "unpacked", Kind.COMMITTED, ref="sha256:b")
    assert store.remote(P, "sha256:a", None) == base
    assert store.remote(P, "sha256:b", base) == one
    assert store.remote(P, "sha256:b", other) == two
    assert store.remote(P, "sha256:b", None) is None
    assert store.remote("other", "sha256:a", None) is None
    with pytest.raises(sqlite3.IntegrityError):
        insert(store, "three", "base", Kind.COMMITTED, ref="sha256:b")
    assert store.images() == {one: RECORD}
    assert [layer.is_data for layer in store.chain(two)] == [True, False]
    assert store.chain(one)[0].image == RECORD
    store.delete(P, "one")
    assert store.images() == {}


def test_remote_snapshots_come_first(store: Store) -> None:
    label = {"containerd.io/snapshot.ref": "sha256:a"}
    unpacked = insert(store, "unpacked", kind=Kind.COMMITTED, labels=label)
    remote = insert(store, "remote", kind=Kind.COMMITTED, labels=label, ref="sha256:a")
    insert(store, "unlabelled")
    assert store.ids(P, ("containerd.io/snapshot.ref", "sha256:a")) == [remote, unpacked]


def test_updated_never_before_created(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    row = full.get(P, "active-1")
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    entry = full.set_labels(P, row, {})
    assert entry.info.updated_ns == row.created_ns


@pytest.mark.parametrize("content", [b"not a database at all" * 500, b"SQLite format 3\0" + b"\xff" * 8000])
def test_a_damaged_file_is_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metadata.db").write_bytes(content)
    with pytest.raises(DamagedStore):
        Store(tmp_path / "metadata.db")


def test_foreign_and_newer_databases_are_refused(tmp_path: Path) -> None:
    for name, setting, error in (("a", "application_id", DamagedStore), ("b", "user_version", FailedPrecondition)):
        Store(tmp_path / name).close()
        with sqlite3.connect(tmp_path / name) as other:
            other.execute(f"PRAGMA {setting} = 77")
        other.close()
        with pytest.raises(error):
            Store(tmp_path / name)


def test_the_database_of_an_older_program_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "older"
    Store(path).close()
    steps = {
        VERSION: "CREATE TABLE note (id INTEGER) STRICT; INSERT INTO note VALUES (1)",
        VERSION + 1: "ALTER TABLE note ADD COLUMN text TEXT",
    }
    monkeypatch.setattr(store_module, "VERSION", VERSION + 2)
    monkeypatch.setattr(store_module, "_STEPS", {**steps, VERSION + 1: "ALTER TABLE missing ADD COLUMN text TEXT"})
    with pytest.raises(sqlite3.OperationalError, match="missing"):
        Store(path)
    assert _schema(path) == (VERSION, [])
    monkeypatch.setattr(store_module, "_STEPS", steps)
    for _ in range(2):  # once is enough
        Store(path).close()
        assert _schema(path) == (VERSION + 2, [(1, None)])


def _schema(path: Path) -> tuple[int, list[tuple[object, ...]]]:
    """Version, and what is in the table that the steps above make."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        made = db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'note'").fetchone()
        return version, db.execute("SELECT * FROM note").fetchall() if made else []


def test_the_file_is_private(store: Store, tmp_path: Path) -> None:
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("metadata.db", "metadata.db-wal", "metadata.db-shm"), 0o600
    )


def test_counting_many_snapshots_is_quick(store: Store) -> None:
    now = time.time_ns()
    with store.transaction():
        for number in range(5000):
            row = Row(store.new_id(), f"view-{number}", None, Kind.VIEW, now, now, Usage(0, 0), None, "")
            store.insert(Entry(P, row, NONE, None))
    begin = time.perf_counter()
    assert store.count() == {Kind.VIEW: 5000, Kind.ACTIVE: 0, Kind.COMMITTED: 0}
    assert time.perf_counter() - begin < 0.1


def test_a_database_says_whether_it_can_be_read_and_written(store: Store, tmp_path: Path) -> None:
    insert(store, "active")
    store.require_readable()
    store.require_writable()
    store._db.execute("PRAGMA query_only = ON")
    store.require_readable()
    with pytest.raises(sqlite3.OperationalError):
        store.require_writable()
