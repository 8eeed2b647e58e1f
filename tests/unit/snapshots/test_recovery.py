"""A lost or damaged database is made again from the sidecars; directories and rows are brought to agree."""

import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.config import Limits
from snapshotter.errors import AlreadyExists, ConfigError, IntegrityError, NotFound, PolicyDenied
from snapshotter.snapshots import recovery
from snapshotter.snapshots.model import Info, Kind
from snapshotter.snapshots.remote import ImageRecord, LayerRequest, LayerVerdict, NamedLayer
from snapshotter.snapshots.snapshotter import Snapshotter
from snapshotter.snapshots.store import Store

pytestmark = [pytest.mark.allow_warnings, pytest.mark.root]
REF = "containerd.io/snapshot.ref"
IMAGE = "image-1@2 r m b"
DIGESTS = [f"sha256:{digit * 64}" for digit in "123"]


class Images:
    """Verdict by chain id; mounts nothing."""

    only_verified = False

    async def resolve(self, request: LayerRequest) -> LayerVerdict:
        kind = request.chain_id.partition("-")[0]
        if kind == "image":
            return LayerVerdict("image", ImageRecord("r", "m", "b", request.chain_id, False))
        return LayerVerdict("data" if kind == "data" else "ordinary")

    async def recall(self, layer: NamedLayer) -> LayerVerdict:
        if "evil" in layer.reference or layer.manifest is None:
            raise PolicyDenied("not today")
        record = ImageRecord(layer.reference, layer.manifest, layer.bootstrap, layer.chain_id, True)
        return LayerVerdict("data" if "data" in layer.reference else "image", record)

    async def mount(self, attach_id: int, record: ImageRecord, target: Path) -> None: ...

    async def unmount(self, attach_id: int, target: Path) -> None: ...


class Node:
    """A snapshotter that can be stopped and started again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.database = root / recovery.DATABASE
        self.open()

    def open(self) -> None:
        self.store: Store = recovery.open_store(self.root)
        self.snapshots = Snapshotter(self.root, self.store, Images(), Limits())

    async def restart(self) -> None:
        await self.snapshots.start()
        await self.snapshots.cleanup()
        await self.snapshots.stop()

    def infos(self) -> dict[str, Info]:
        return {info.name: info for info in self.store.infos(self.store.ids("p"))}

    def names(self) -> set[str]:
        return {path.name for path in (self.root / "snapshots").iterdir()}


@pytest.fixture
async def node(tmp_path: Path) -> "Iterator[Node]":
    """data-1 ← image-1 ← active; base ← view; removed."""
    node = Node(tmp_path)
    snapshots = node.snapshots
    for parent, ref in (("", "data-1"), ("data-1@1", "image-1")):
        with pytest.raises(Exception, match="nothing to unpack"):
            await snapshots.prepare("p", "extract", parent, {REF: ref})
    await snapshots.prepare("p", "active", IMAGE, {"a": "b"})
    await snapshots.prepare("p", "base-key", "", {})
    await snapshots.commit("p", "base", "base-key", "", {"c": "d"})
    await snapshots.view("p", "view\0/..", "base", {})
    await snapshots.prepare("p", "removed", "", {})
    snapshots.remove("p", "removed")
    snapshots.update("p", "base", {"e": "f"}, ["labels.e"])
    snapshots.update("p", "data-1@1", {}, [])
    yield node
    node.store.close()


async def test_nothing_is_lost_with_the_database(node: Node) -> None:
    (node.snapshots.mountpoint(3).parent / "fs" / "written").write_text("by a container")
    before, images = node.infos(), node.snapshots.images()
    assert before["data-1@1"].labels == {REF: "data-1"}, "containerd finds a remote layer by this label"
    assert before["base"].labels == {"c": "d", "e": "f"}
    node.store.close()
    node.database.unlink()
    node.open()
    await node.restart()
    assert {name: info._replace(updated_ns=0) for name, info in node.infos().items()} == {
        name: info._replace(updated_ns=0) for name, info in before.items()
    }
    assert node.snapshots.images() == images
    assert node.names() == {"1", "2", "3", "4", "5"}
    assert (node.root / "snapshots/3/fs/written").read_text() == "by a container"
    with pytest.raises(Exception, match="nothing to unpack"):
        await node.snapshots.prepare("p", "extract", "", {REF: "data-1"})
    assert len(node.infos()) == 5, "the remote layer was found again"


async def test_ids_go_on_far_above_after_a_loss(node: Node) -> None:
    node.store.close()
    node.database.unlink()
    node.open()
    await node.snapshots.prepare("p", "next", "", {})
    row = node.store.get("p", "next")
    assert time.time() - 100 < row.id < 2**40
    node.store.close()
    node.open()
    await node.restart()
    assert node.store.new_id() > row.id


@pytest.mark.parametrize("damage", ["header", "page", "truncated"])
async def test_a_damaged_database_is_moved_aside(node: Node, damage: str) -> None:
    before = node.infos()
    node.store.close()
    raw = bytearray(node.database.read_bytes())
    if damage == "header":
        raw[:100] = bytes(100)
    elif damage == "page":
        raw[4096 : 4096 + 4000] = b"\xa5" * 4000
    node.database.write_bytes(raw if damage != "truncated" else raw[: len(raw) // 2])
    node.open()
    assert node.infos().keys() == before.keys()
    assert len(list(node.root.glob("metadata.db.damaged-*"))) == 1


async def test_a_directory_without_a_usable_sidecar_is_kept_for_people(node: Node) -> None:
    node.store.close()
    node.database.unlink()
    (node.root / "snapshots/3/snapshot.json").write_text("{")
    (node.root / "snapshots/4/snapshot.json").unlink()
    (node.root / "snapshots/3/fs/precious").write_text("")
    node.open()
    await node.restart()
    assert node.infos().keys() == {"data-1@1", IMAGE}
    lost = sorted(name.rpartition("-")[0] for name in node.names() if name.startswith("lost-"))
    assert lost == ["lost-3", "lost-4", "lost-5"], "the view's parent is lost, so it is lost, too"
    assert len(list(node.root.glob("snapshots/lost-3-*/fs/precious"))) == 1


async def test_whoever_took_a_removed_name_wins(node: Node) -> None:
    node.store.close()
    node.database.unlink()
    stale = node.root / "snapshots/9"
    (node.root / "snapshots/3").rename(stale)  # an older one with the higher id's place taken: ids are in the sidecar
    (node.root / "snapshots/5").rename(node.root / "snapshots/3")
    node.open()
    await node.restart()
    assert node.infos().keys() == {"data-1@1", IMAGE, "base"}, "a sidecar in another's directory counts for nothing"


async def test_directories_without_a_row_are_destroyed(node: Node) -> None:
    for name in ("new-abc", "old-99-abc", "77", "lost-1-abc", "unrelated"):
        (node.root / "snapshots" / name / "fs").mkdir(parents=True)
    await node.restart()
    assert node.names() == {"1", "2", "3", "4", "5", "lost-1-abc", "unrelated"}
    assert node.store.new_id() == 100, "no id seen on disk is used again"


async def test_remote_snapshots_get_their_directories_back(node: Node) -> None:
    for name in ("1", "2"):
        (node.root / "snapshots" / name / "snapshot.json").unlink()
        (node.root / "snapshots" / name).rename(node.root / f"gone-{name}")
    await node.restart()
    assert {"1", "2"} <= node.names()
    assert (node.root / "snapshots/2/snapshot.json").exists()


async def test_a_start_makes_sidecars_agree_with_the_database(node: Node) -> None:
    sidecars = sorted(node.root.glob("snapshots/*/snapshot.json"))
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in sidecars if path.parent.name in "12345"}
    torn, stale, missing = (node.root / "snapshots" / name / "snapshot.json" for name in "134")
    torn.write_bytes(b"")
    stale.write_bytes(before[stale][0].replace(b'"a":"b"', b'"a":"c"'))
    missing.unlink()
    await node.restart()
    after = {path: (path.read_bytes(), path.stat().st_ino) for path in before}
    assert {path: raw for path, (raw, _) in after.items()} == {path: raw for path, (raw, _) in before.items()}
    assert {path for path in before if before[path][1] == after[path][1]} >= before.keys() - {torn, stale, missing}


async def test_a_lost_ordinary_directory_is_an_error_until_removed(node: Node) -> None:
    (node.root / "snapshots/4").rename(node.root / "gone")
    (node.root / "snapshots/3").rename(node.root / "gone-too")
    await node.restart()
    for call in (
        node.snapshots.prepare("p", "new", "base", {}),
        node.snapshots.mounts("p", "active"),
        node.snapshots.usage("p", "active"),
        node.snapshots.commit("p", "name", "active", "", {}),
    ):
        with pytest.raises(IntegrityError) as error:
            await call
        assert error.value.reason == "lost"
    node.snapshots.update("p", "base", {"still": "there"}, ["labels"])
    for name in ("view\0/..", "base", "active"):
        node.snapshots.remove("p", name)
    assert node.infos().keys() == {"data-1@1", IMAGE}


async def test_a_database_that_is_locked_is_not_taken_for_damaged(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    node.store.close()
    monkeypatch.setattr(sqlite3, "connect", refuse)
    with pytest.raises(sqlite3.OperationalError):
        node.open()
    assert node.database.exists()
    monkeypatch.undo()
    node.open()


async def test_what_was_made_in_mode_open_is_not_run_in_mode_confidential(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reopen(only_verified: bool) -> None:
        monkeypatch.setattr(Images, "only_verified", only_verified)
        node.store.close()
        node.open()

    with pytest.raises(ConfigError, match="made in mode open"):
        reopen(only_verified=True)
    node.database.unlink()
    with pytest.raises(ConfigError, match="made in mode open"):
        reopen(only_verified=True)
    for name in ("view\0/..", "base", "active", IMAGE, "data-1@1"):
        node.store.delete("p", name)
    reopen(only_verified=True)
    with pytest.raises(AlreadyExists):
        await node.snapshots.prepare("p", "extract", "", {REF: "data-2"})
    for only_verified in (True, False):
        reopen(only_verified)
    with pytest.raises(ConfigError, match="made in mode open"):
        reopen(only_verified=True)


def test_a_missing_snapshot_is_not_found(node: Node) -> None:
    with pytest.raises(NotFound):
        node.snapshots.stat("other plugin", "base")
    assert node.snapshots.stat("p", "base").kind is Kind.COMMITTED


# a log that is lost


async def killed(node: Node, target: Path) -> Node:
    """As it is found after a kill: with a log, which two more snapshots are in."""
    await node.restart()
    assert node.store.last_id == 6
    for key in ("later", "last"):
        await node.snapshots.prepare("p", key, "", {})
    shutil.copytree(node.root, target)
    found = Node.__new__(Node)
    found.root, found.database = target, target / recovery.DATABASE
    return found


async def test_a_lost_log_does_not_make_garbage_of_what_was_in_it(node: Node, tmp_path: Path) -> None:
    after = await killed(node, tmp_path / "after")
    for log in after.root.glob("metadata.db-[ws]*"):
        log.unlink()
    after.open()
    await after.restart()
    assert after.infos() == node.infos()
    assert {"7", "8"} <= after.names()


async def test_a_log_cut_short_does_not_make_garbage_of_what_was_in_it(node: Node, tmp_path: Path) -> None:
    node.store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    after = await killed(node, tmp_path / "after")
    os.truncate(f"{after.database}-wal", 100)
    after.open()
    await after.restart()
    assert after.infos() == node.infos()


async def test_after_a_kill_or_a_stop_the_database_counts(node: Node, tmp_path: Path) -> None:
    after = await killed(node, tmp_path / "after")
    after.open()
    await after.restart()
    after.store.close()
    after.open()
    assert after.infos() == node.infos()
    assert not list(after.root.glob("*.damaged-*"))


# records that cannot be read


def damage_record(node: Node) -> None:
    node.store._db.execute("UPDATE image SET record = '{' WHERE id = 2")


async def test_a_record_that_cannot_be_read_comes_from_the_sidecar(node: Node) -> None:
    before = node.snapshots.images()
    damage_record(node)
    await node.restart()
    assert node.snapshots.images() == before


async def test_a_record_that_nobody_has_costs_one_image(node: Node) -> None:
    for layer, parent in (("data-3", ""), ("image-3", "data-3@7")):
        with pytest.raises(AlreadyExists):
            await node.snapshots.prepare("p", "extract", parent, {REF: layer})
    damage_record(node)
    (node.root / "snapshots/2/snapshot.json").write_text("{")
    await node.restart()
    assert node.snapshots.images().keys() == {8}
    await node.snapshots.prepare("p", "works", "image-3@8 r m b", {})
    with pytest.raises(IntegrityError) as error:
        await node.snapshots.prepare("p", "does not", IMAGE, {})
    assert error.value.reason == "lost"
    for name in ("active", IMAGE):
        node.snapshots.remove("p", name)
    await node.restart()
    assert "2" not in node.names()


# names that outlive us


def lost(kind: str, number: int = 17) -> str:
    return f"{DIGESTS[0]}@{number} registry/{kind}:1 {DIGESTS[1]} {DIGESTS[2]}"


async def test_a_lost_image_is_made_again_from_its_name(node: Node) -> None:
    seen = node.snapshots.stat("p", lost("image"))
    assert (seen.kind, seen.labels) == (Kind.COMMITTED, {REF: DIGESTS[0]})
    assert lost("image") not in node.infos(), "so far it is a claim"
    await node.snapshots.prepare("p", "container", lost("image"), {})
    await node.snapshots.view("p", "look", lost("image", 18), {})
    await node.snapshots.view("p", "look again", lost("image", 18), {})
    await node.snapshots.view("other", "look", lost("image"), {})
    assert {lost("image"), lost("image", 18)} <= node.infos().keys()
    assert ImageRecord("registry/image:1", DIGESTS[1], DIGESTS[2], DIGESTS[0], True) in node.snapshots.images().values()
    for name in ("container", "look", "look again", lost("image", 18), lost("image")):
        node.snapshots.remove("p", name)


async def test_a_lost_image_that_may_not_run_is_refused(node: Node) -> None:
    before = node.infos()
    for name in (lost("evil"), lost("image").replace(DIGESTS[1], "-")):
        with pytest.raises(PolicyDenied):
            await node.snapshots.prepare("p", "container", name, {})
    assert node.infos() == before


async def test_layers_are_made_again_below_new_ones(node: Node) -> None:
    with pytest.raises(AlreadyExists):
        await node.snapshots.prepare("p", "extract", lost("data"), {REF: "image-4"})
    added = [info for name, info in node.infos().items() if name.startswith("image-4@")]
    assert [info.parent for info in added] == [lost("data")]


@pytest.mark.parametrize(
    "name", ["sha256:1@17", lost("image")[:-1], f"{lost('image')} ", lost("two words"), "ns/1/key"]
)
async def test_other_names_stay_lost(node: Node, name: str) -> None:
    with pytest.raises(NotFound):
        node.snapshots.stat("p", name)
    with pytest.raises(NotFound):
        await node.snapshots.prepare("p", "container", name, {})
