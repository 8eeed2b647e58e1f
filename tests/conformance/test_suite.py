"""The 21 cases of containerd's snapshotter test suite (core/snapshots/testsuite), told in Python, against `serve`."""

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

from snapshotter.snapshots.model import Info, Kind
from tests.conformance.client import ROOT_LABEL, Client
from tests.conformance.layers import (
    Change,
    content,
    create,
    delete,
    directory,
    link,
    mounted,
    own,
    rename,
    symlink,
    xattr,
)
from tests.harness.machine import Work
from tests.harness.serve import Serve

pytestmark = pytest.mark.root
_plugins = itertools.count()


@pytest.fixture(scope="module")
def served() -> Iterator[Serve]:
    """The program as it is installed."""
    with Work("suite") as work:
        yield Serve(work)


@pytest.fixture
def sn(served: Serve) -> Iterator[Client]:
    """A client whose plugin name nobody else uses, which makes it a store of its own."""
    client = Client(served.address, f"suite-{next(_plugins)}")
    yield client
    client.close()


def code(error: "pytest.ExceptionInfo[grpc.RpcError]") -> grpc.StatusCode:
    return error.value.code()  # type: ignore[no-any-return]


def add_layer(sn: Client, work: Path, name: str, parent: str, changes: Sequence[Change]) -> None:
    """Prepare on `parent`, change, commit as `name`."""
    key = f"{work}/active-{name}"
    with mounted(sn.prepare(key, parent), work) as top:
        for change in changes:
            change(top)
    sn.commit(name, key)


def check_layers(sn: Client, work: Path, layers: Sequence[Sequence[Change]], *, pause: bool = False) -> None:
    """Each layer's view equals a flat directory that got the same changes."""
    flat = work / "flat"
    flat.mkdir()
    parent = ""
    for number, changes in enumerate(layers):
        if pause:  # so that a rewritten file of the same size has another mtime
            time.sleep(1.01 - time.time() % 1)
        name = f"{work}/layer-{number}"
        add_layer(sn, work, name, parent, changes)
        for change in changes:
            change(flat)
        with mounted(sn.view(f"{work}/view-{number}", name), work) as top:
            assert content(top) == content(flat)
        parent = name


FIRST = [
    create("/foo", "foo\n", 0o777), directory("/a", 0o755), directory("/a/b", 0o755), directory("/a/b/c", 0o755),
    own("/a/b", 3, 4), xattr("/foo", "user.test", b"value"), symlink("foo", "/link"),
]  # fmt: skip
SECOND = [create("/bar", "bar\n", 0o777), create("/foo", "foo, rewritten\n", 0o777), delete("/a/b")]


def test_basic(sn: Client, tmp_path: Path) -> None:
    preparing, committed = f"{tmp_path}/preparing", f"{tmp_path}/committed"
    mounts = sn.prepare(preparing)
    assert mounts
    with mounted(mounts, tmp_path) as top:
        for change in FIRST:
            change(top)
    sn.commit(committed, preparing)
    found = sn.stat(committed)
    assert (found.parent, found.kind) == ("", Kind.COMMITTED)
    with pytest.raises(grpc.RpcError) as error:
        sn.stat(preparing)
    assert code(error) is grpc.StatusCode.NOT_FOUND

    flat = tmp_path / "flat"
    flat.mkdir()
    following = f"{tmp_path}/next"
    with mounted(sn.prepare(following, committed), tmp_path) as top:
        for change in FIRST:
            change(flat)
        assert content(top) == content(flat)
        for change in SECOND:
            change(top)
            change(flat)
    active = sn.stat(following)
    assert (active.parent, active.kind) == (committed, Kind.ACTIVE)
    second = f"{tmp_path}/next-committed"
    sn.commit(second, following)
    found = sn.stat(second)
    assert (found.parent, found.kind) == (committed, Kind.COMMITTED)
    assert {info.name: info for info in sn.walk()} == {name: sn.stat(name) for name in (committed, second)}

    with mounted(sn.view(f"{tmp_path}/view", second), tmp_path) as top:
        assert content(top) == content(flat)
    sn.remove(f"{tmp_path}/view")
    with pytest.raises(grpc.RpcError) as error:
        sn.remove(committed)
    assert code(error) is grpc.StatusCode.FAILED_PRECONDITION
    assert "remove" in error.value.details()
    sn.remove(second)
    sn.remove(committed)
    assert sn.walk() == []


def test_stat_active(sn: Client, tmp_path: Path) -> None:
    with mounted(sn.prepare("key"), tmp_path):
        pass
    found = sn.stat("key")
    assert (found.name, found.parent, found.kind) == ("key", "", Kind.ACTIVE)


def test_stat_committed(sn: Client, tmp_path: Path) -> None:
    add_layer(sn, tmp_path, "committed", "", [])
    found = sn.stat("committed")
    assert (found.name, found.parent, found.kind) == ("committed", "", Kind.COMMITTED)


def test_transitivity(sn: Client, tmp_path: Path) -> None:
    add_layer(sn, tmp_path, "A", "", [create("/foo", "a", 0o644)])
    add_layer(sn, tmp_path, "B", "A", [create("/bar", "b", 0o644)])
    assert (sn.stat("A").parent, sn.stat("B").parent) == ("", "A")
    assert sn.stat(sn.stat("B").parent).parent == ""


@pytest.mark.parametrize(("first", "second"), [("prepare", "view"), ("prepare", "prepare"), ("view", "view")])
def test_the_same_key_fails(sn: Client, tmp_path: Path, first: str, second: str) -> None:
    add_layer(sn, tmp_path, "base", "", [])
    getattr(sn, first)("key", "base")
    with pytest.raises(grpc.RpcError) as error:
        getattr(sn, second)("key", "base")
    assert code(error) is grpc.StatusCode.ALREADY_EXISTS


def test_update(sn: Client, tmp_path: Path) -> None:
    begin = time.time_ns()
    add_layer(sn, tmp_path, "c1", "", [])
    add_layer(sn, tmp_path, "c2", "c1", [])
    sn.prepare("a1", "c2")
    sn.prepare("a2")
    sn.view("v1", "c2")
    sn.view("v2")
    end = time.time_ns()
    expected = {
        "c1": (Kind.COMMITTED, ""), "c2": (Kind.COMMITTED, "c1"), "a1": (Kind.ACTIVE, "c2"), "a2": (Kind.ACTIVE, ""),
        "v1": (Kind.VIEW, "c2"), "v2": (Kind.VIEW, ""),
    }  # fmt: skip
    for name, (kind, parent) in expected.items():
        before = sn.stat(name)
        assert begin <= before.created_ns <= end
        assert before.created_ns == before.updated_ns
        labels = {"l1": "1", "l2": "2", "l3": "3", **ROOT_LABEL}
        started = time.time_ns()
        changed = sn.update(name, labels, parent="doesnotexist")
        assert changed == sn.stat(name)
        assert changed == Info(name, parent, kind, before.created_ns, changed.updated_ns, labels)
        assert started <= changed.updated_ns <= time.time_ns()

        sn.update(name, {"l1": "updated", "l4": "v4"}, "labels.l1", "labels.l2")
        assert sn.stat(name).labels == {"l1": "updated", "l3": "3", **ROOT_LABEL}
        sn.update(name, {"l4": "v4", **ROOT_LABEL}, "labels")
        assert sn.stat(name).labels == {"l4": "v4", **ROOT_LABEL}
        with pytest.raises(grpc.RpcError) as error:
            sn.update(name, {}, "labels.l4", "parent", parent="c1")
        assert code(error) is grpc.StatusCode.INVALID_ARGUMENT
        assert sn.stat(name).labels == {"l4": "v4", **ROOT_LABEL}


def test_remove(sn: Client, tmp_path: Path) -> None:
    add_layer(sn, tmp_path, "committed-1", "", [])
    sn.prepare("reuse-1", "committed-1")
    sn.remove("reuse-1")
    sn.view("reuse-1", "committed-1")
    sn.remove("reuse-1")
    sn.prepare("reuse-1")
    sn.remove("committed-1")
    sn.commit("committed-1", "reuse-1")
    assert sn.names() == {"committed-1"}


WALK = [
    (['labels."containerd.io/gc.root"==check-walk'], "a-np p a v p-wl a-wl v-wl a-np-wl"),
    (['kind==active,labels."containerd.io/gc.root"==check-walk'], "a-np a a-wl a-np-wl"),
    (['kind==view,labels."containerd.io/gc.root"==check-walk'], "v v-wl"),
    (['kind==committed,labels."containerd.io/gc.root"==check-walk'], "p p-wl"),
    (["name==p", "name==a-np-wl"], "p a-np-wl"),
    (["name==a-wl,labels.l"], "a-wl"),
    (["parent==p"], "a v"),
    (['parent!="",labels."containerd.io/gc.root"==check-walk'], "a v a-wl v-wl"),
    (["labels.l"], "p-wl a-wl v-wl a-np-wl"),
    (["labels.l==2"], "a-wl a-np-wl"),
]


def test_walk(sn: Client) -> None:
    mark = {"containerd.io/gc.root": "check-walk"}
    sn.prepare("a-np", labels=mark)
    sn.prepare("p-tmp", labels=mark)
    sn.commit("p", "p-tmp", mark)
    sn.prepare("a", "p", mark)
    sn.view("v", "p", mark)
    sn.prepare("p-wl-tmp", labels=mark)
    sn.commit("p-wl", "p-wl-tmp", {"l": "1", **mark})
    sn.prepare("a-wl", "p-wl", {"l": "2", **mark})
    sn.view("v-wl", "p-wl", {"l": "3", **mark})
    sn.prepare("a-np-wl", labels={"l": "2", **mark})
    for filters, expected in WALK:
        assert sn.names(*filters) == set(expected.split()), filters


def test_layer_file_update(sn: Client, tmp_path: Path) -> None:
    for attempt in range(2):
        (tmp_path / str(attempt)).mkdir()
        first = [
            directory("/etc", 0o700), create("/etc/hosts", "mydomain 10.0.0.1", 0o644),
            create("/etc/profile", "PATH=/usr/bin", 0o644),
        ]  # fmt: skip
        second = [
            create("/etc/hosts", "mydomain 10.0.0.2", 0o644), create("/etc/profile", "PATH=/usr/bin", 0o666),
            directory("/root", 0o700), create("/root/.bashrc", "PATH=/usr/sbin:/usr/bin", 0o644),
        ]  # fmt: skip
        check_layers(sn, tmp_path / str(attempt), [first, second], pause=True)


def test_remove_directory_in_lower_layer(sn: Client, tmp_path: Path) -> None:
    first = [directory("/lib", 0o700), create("/lib/hidden", "", 0o644)]
    second = [delete("/lib"), directory("/lib", 0o700), create("/lib/not-hidden", "", 0o644)]
    third = [create("/lib/newfile", "", 0o644)]
    check_layers(sn, tmp_path, [first, second, third])


def test_chown(sn: Client, tmp_path: Path) -> None:
    first = [
        directory("/opt", 0o700), directory("/opt/a", 0o700), directory("/opt/a/b", 0o700),
        create("/opt/a/b/file.txt", "hello", 0o644),
    ]  # fmt: skip
    second = [own(path, 1, 1) for path in ("/opt", "/opt/a", "/opt/a/b", "/opt/a/b/file.txt")]
    check_layers(sn, tmp_path, [first, second])


def test_directory_permission_on_commit(sn: Client, tmp_path: Path) -> None:
    names = [f"/dir{number}" for number in range(1, 6)]
    first = [*(directory(name, 0o700) for name in names), own("/dir5", 2, 2), create("/dir5/file", "x", 0o644)]
    second = [*(own(name, 1, 1) for name in names[:4]), delete("/dir5"), directory("/dir5", 0o700), own("/dir5", 1, 1)]
    third = [own("/dir1", 0, 0), delete("/dir2"), delete("/dir3"), directory("/dir3", 0o700), own("/dir3", 1, 1)]
    check_layers(sn, tmp_path, [first, second, third])


def test_remove_intermediate_snapshot(sn: Client, tmp_path: Path) -> None:
    add_layer(sn, tmp_path, "base", "", [])
    add_layer(sn, tmp_path, "inter", "base", [])
    sn.prepare("top", "inter")
    with pytest.raises(grpc.RpcError) as error:
        sn.remove("inter")
    assert code(error) is grpc.StatusCode.FAILED_PRECONDITION
    for name in ("top", "inter", "base"):
        sn.remove(name)


def test_deleted_files_in_child_snapshot(sn: Client, tmp_path: Path) -> None:
    first = [create("/foo", "foo", 0o777), create("/foobar", "foobar", 0o777)]
    check_layers(sn, tmp_path, [first, [delete("/foobar")], []])


def test_move_file_from_lower_layer(sn: Client, tmp_path: Path) -> None:
    first = [
        directory("/dir1", 0o700), create("/dir1/f1", "Hello", 0o644),
        directory("/dir2", 0o700), create("/dir2/f2", "..", 0o644),
    ]  # fmt: skip
    second = [
        directory("/dir3", 0o700), create("/dir3/f1", "Hello", 0o644), delete("/dir1"),
        link("/dir2/f2", "/dir3/f2"), delete("/dir2/f2"),
    ]  # fmt: skip
    check_layers(sn, tmp_path, [first, second])


def test_view_readonly(sn: Client, tmp_path: Path) -> None:
    add_layer(sn, tmp_path, "committed", "", [])
    with mounted(sn.view("view", "committed"), tmp_path) as top, pytest.raises(OSError, match="Read-only"):
        (top / "file").write_text("")
    sn.remove("view")
    sn.remove("committed")


def test_stat_in_walk(sn: Client, tmp_path: Path) -> None:
    add_layer(sn, tmp_path, "c1", "", [])
    add_layer(sn, tmp_path, "c2", "c1", [])
    sn.prepare("a1", "c2")
    sn.view("v1", "c2")
    found = [(info, sn.stat(info.name)) for info in sn.walk()]
    assert len(found) == 4
    assert all(walked == stated for walked, stated in found)


def test_close_twice(sn: Client, tmp_path: Path) -> None:
    add_layer(sn, tmp_path, "c", "", [])
    sn.remove("c")
    sn.close()
    sn.close()


def test_root_permission(sn: Client, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with mounted(sn.prepare("key"), tmp_path) as top:
            assert top.stat().st_mode & 0o7777 == 0o755
    finally:
        os.umask(before)


def test_rename(sn: Client, tmp_path: Path) -> None:
    first = [
        directory("/dir1", 0o700), directory("/somefiles", 0o700), create("/somefiles/f1", "was here first!", 0o644),
        create("/somefiles/f2", "nothing interesting", 0o644),
    ]  # fmt: skip
    second = [
        create("/somefiles/f1-overwrite", "new content 1", 0o644), rename("/somefiles/f1-overwrite", "/somefiles/f1"),
        rename("/somefiles/f2", "/somefiles/f3"),
    ]  # fmt: skip  # a directory of a lower layer cannot be renamed on overlayfs (EXDEV)
    check_layers(sn, tmp_path, [first, second])


def test_128_layers_mount(sn: Client, tmp_path: Path) -> None:
    first = [
        create("/bottom", "way at the bottom\n", 0o777), create("/overwriteme", "FIRST!\n", 0o777),
        directory("/addhere", 0o755), directory("/onlyme", 0o755), create("/onlyme/bottom", "bye!\n", 0o777),
    ]  # fmt: skip
    flat = tmp_path / "flat"
    flat.mkdir()
    parent = ""
    for number in range(1, 129):
        changes = first if number == 1 else [
            create("/overwriteme", f"{number} WAS HERE!\n", 0o777), create(f"/addhere/file-{number}", "same\n", 0o755),
            delete("/onlyme"), directory("/onlyme", 0o755), create(f"/onlyme/file-{number}", "only me!\n", 0o777),
        ]  # fmt: skip
        key = f"{tmp_path}/active-{number}"
        with mounted(sn.prepare(key, parent), tmp_path) as top:
            assert content(top) == content(flat)
            for change in changes:
                change(top)
                change(flat)
            assert content(top) == content(flat)
        parent = f"{tmp_path}/committed-{number}"
        sn.commit(parent, key)
    with mounted(sn.view("view", parent), tmp_path) as top:
        assert content(top) == content(flat)
