"""What containerd's suite does not ask: codes, bounds, odd keys, usage, many snapshots at once, remote layers."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapshotter.api import snapshots_pb2 as pb
from snapshotter.labels import NYDUS_BOOTSTRAP, PARENT_CHAIN_ID, SNAPSHOT_REF
from snapshotter.snapshots.model import Kind
from tests.conformance.client import Client
from tests.conformance.daemon import Daemon
from tests.conformance.images import STORED, VERDICT
from tests.conformance.layers import mounted
from tests.harness.machine import mounts

pytestmark = pytest.mark.root

Code = grpc.StatusCode


def refusal(call: Callable[..., object], *arguments: Any) -> tuple[grpc.StatusCode, str, str]:
    """Code, message and `reason` of a call that must fail."""
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments)
    trailing = dict(error.value.trailing_metadata() or ())
    return error.value.code(), error.value.details(), trailing.get("reason", "")


def base(sn: Client, name: str = "base") -> None:
    sn.prepare(f"{name}-key")
    sn.commit(name, f"{name}-key")


def provide(sn: Client, ref: str, parent: str = "", verdict: str = "data") -> str:
    """Pull a remote layer as containerd does: Prepare, ALREADY_EXISTS, List, take the first that fits; its name."""
    labels = {SNAPSHOT_REF: ref, VERDICT: verdict}
    assert refusal(sn.prepare, f"extract-{ref}", parent, labels)[0] is Code.ALREADY_EXISTS
    found = sn.walk(f'labels."{SNAPSHOT_REF}"=={ref},parent=="{parent}"')
    assert found[0].kind is Kind.COMMITTED
    return found[0].name


# codes


def test_every_error_has_its_code_and_reason(sn: Client) -> None:
    base(sn)
    sn.prepare("active", "base")
    sn.view("view", "base")
    cases: Sequence[tuple[Callable[..., object], tuple[Any, ...], grpc.StatusCode]] = (
        (sn.stat, ("no",), Code.NOT_FOUND),
        (sn.mounts, ("no",), Code.NOT_FOUND),
        (sn.usage, ("no",), Code.NOT_FOUND),
        (sn.remove, ("no",), Code.NOT_FOUND),
        (sn.update, ("no", {}), Code.NOT_FOUND),
        (sn.commit, ("new", "no"), Code.NOT_FOUND),
        (sn.prepare, ("key", "no"), Code.NOT_FOUND),
        (sn.view, ("key", "no"), Code.NOT_FOUND),
        (sn.prepare, ("base",), Code.ALREADY_EXISTS),
        (sn.view, ("active",), Code.ALREADY_EXISTS),
        (sn.commit, ("base", "active"), Code.ALREADY_EXISTS),
        (sn.commit, ("view", "active"), Code.ALREADY_EXISTS),
        (sn.prepare, ("key", "active"), Code.INVALID_ARGUMENT),
        (sn.view, ("key", "view"), Code.INVALID_ARGUMENT),
        (sn.walk, ("name==",), Code.INVALID_ARGUMENT),
        (sn.update, ("base", {}, "kind"), Code.INVALID_ARGUMENT),
        (sn.update, ("base", {}, "name"), Code.INVALID_ARGUMENT),
        (sn.update, ("base", {}, "created_at"), Code.INVALID_ARGUMENT),
        (sn.mounts, ("base",), Code.FAILED_PRECONDITION),
        (sn.commit, ("new", "base"), Code.FAILED_PRECONDITION),
        (sn.commit, ("new", "view"), Code.FAILED_PRECONDITION),
        (sn.remove, ("base",), Code.FAILED_PRECONDITION),
    )
    for call, arguments, expected in cases:
        code, message, reason = refusal(call, *arguments)
        assert code is expected, (call, arguments)
        assert reason == expected.name.lower().replace("_", "-")
        assert message
    assert sn.names() == {"base", "active", "view"}


def test_a_namespace_is_not_needed(shared_daemon: Daemon, sn: Client) -> None:
    collector = Client(shared_daemon.address, sn.plugin, namespace="")
    base(collector)
    assert collector.names() == {"base"}
    collector.remove("base")
    collector.cleanup()
    collector.close()


def test_plugins_are_kept_apart(shared_daemon: Daemon, sn: Client) -> None:
    other = Client(shared_daemon.address, f"{sn.plugin}-other")
    base(sn)
    assert other.names() == set()
    assert refusal(other.remove, "base")[0] is Code.NOT_FOUND
    base(other)
    other.remove("base")
    assert sn.names() == {"base"}
    other.close()


# keys and labels


@pytest.mark.parametrize("key", ["../..", "/", ".", "a\0b", "ключ \U0001f600", "x" * 10_000, "%s'\";--", " ", "\n"])
def test_any_text_is_a_key(sn: Client, tmp_path: Path, key: str) -> None:
    base(sn)
    with mounted(sn.prepare(key, "base"), tmp_path) as top:
        (top / "file").touch()
    assert sn.stat(key).name == key
    name = f"{key} committed"
    sn.commit(name, key)
    assert sn.names() == {"base", name}
    sn.view(key, name)
    assert sn.stat(key).parent == name
    for gone in (key, name, "base"):
        sn.remove(gone)


def test_bounds(sn: Client) -> None:
    base(sn)
    label = {"k": "v" * 4095}
    assert sn.stat("base").labels != label
    sn.update("base", label)
    cases: Sequence[tuple[Callable[..., object], tuple[Any, ...]]] = (
        (sn.prepare, ("",)),
        (sn.prepare, ("x" * 17_000,)),
        (sn.prepare, ("ü" * 9_000,)),
        (sn.prepare, ("key", "", {"k": "v" * 4096})),
        (sn.prepare, ("key", "", {"ü" * 1000: "ü" * 1100})),
        (sn.update, ("base", {"k": "v" * 4096})),
        (sn.update, ("base", {"k": "v" * 4096}, "labels.k")),
        (sn.commit, ("", "key")),
    )
    for call, arguments in cases:
        assert refusal(call, *arguments)[0] is Code.INVALID_ARGUMENT, arguments
    assert sn.stat("base").labels == label


def test_empty_label_values_are_dropped(sn: Client) -> None:
    sn.prepare("key", labels={"a": "", "b": "1"})
    assert sn.stat("key").labels == {"b": "1"}
    sn.update("key", {"b": "", "c": "2"}, "labels.b", "labels.c")
    assert sn.stat("key").labels == {"c": "2"}
    sn.commit("name", "key", {"d": ""})
    assert sn.stat("name").labels == {}


def test_a_mask_path_is_the_key_as_it_is(sn: Client) -> None:
    keys = ["containerd.io/snapshot/a.b", "labels", "labels.x", "."]
    sn.prepare("key", labels={})
    sn.update("key", dict.fromkeys(keys, "1"), *(f"labels.{key}" for key in keys))
    assert sn.stat("key").labels == dict.fromkeys(keys, "1")


def test_messages_above_four_mebibytes(sn: Client) -> None:
    labels = {f"key-{number}": "v" * 4000 for number in range(1500)}
    sn.prepare("key", labels=labels)
    assert sn.stat("key").labels == labels


def test_a_commit_may_name_the_parent_of_a_snapshot_that_has_none(sn: Client) -> None:
    base(sn, "one")
    base(sn, "two")
    sn.prepare("on-one", "one")
    sn.prepare("active")
    for key in ("a", "b", "c", "d"):
        sn.prepare(key)
    sn.commit("same", "on-one", parent="one")
    sn.commit("moved", "a", parent="one")
    sn.commit("alone", "b")
    assert [sn.stat(name).parent for name in ("same", "moved", "alone")] == ["one", "one", ""]
    sn.view("look", "moved")
    assert refusal(sn.remove, "moved")[0] is Code.FAILED_PRECONDITION
    assert refusal(sn.commit, "new", "c", {}, "no")[0] is Code.NOT_FOUND
    assert refusal(sn.commit, "new", "c", {}, "active")[0] is Code.FAILED_PRECONDITION
    sn.prepare("on-two", "two")
    assert refusal(sn.commit, "new", "on-two", {}, "one")[0] is Code.INVALID_ARGUMENT
    sn.commit("kept", "on-two")
    assert sn.stat("kept").parent == "two"
    assert "new" not in sn.names()


# mounts and usage


def test_mounts_are_those_of_creation_also_after_a_restart(daemon: Callable[..., Daemon]) -> None:
    served = daemon()
    sn = served.client()
    base(sn)
    sn.prepare("middle-key", "base")
    sn.commit("middle", "middle-key")
    made = {
        "a": sn.prepare("a"), "v": sn.view("v"), "ab": sn.prepare("ab", "base"), "vb": sn.view("vb", "base"),
        "am": sn.prepare("am", "middle"), "vm": sn.view("vm", "middle"),
    }  # fmt: skip
    assert [m.kind for ms in made.values() for m in ms] == ["bind", "bind", "overlay", "bind", "overlay", "overlay"]
    assert {key: sn.mounts(key) for key in made} == made
    before = {info.name: info for info in sn.walk()}
    served.process.stop()
    served.start()
    assert {key: sn.mounts(key) for key in made} == made
    assert {info.name: info for info in sn.walk()} == before


def test_the_root_directory_keeps_its_attributes(sn: Client, tmp_path: Path) -> None:
    with mounted(sn.prepare("key"), tmp_path) as top:
        os.chown(top, 7, 8)
        top.chmod(0o1770)
    sn.commit("base", "key")
    for found in (sn.prepare("child", "base"), sn.view("look", "base")):
        with mounted(found, tmp_path) as top:
            status = top.stat()
            assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o1770, 7, 8)


def test_usage_is_of_the_snapshot_alone(sn: Client, tmp_path: Path) -> None:
    with mounted(sn.prepare("key"), tmp_path) as top:
        (top / "data").write_bytes(os.urandom(1 << 20))
        os.link(top / "data", top / "again")
        (top / "sub").mkdir()
        active = sn.usage("key")
    assert active[1] == 3
    assert 1 << 20 <= active[0] < (1 << 20) + 32768
    sn.commit("base", "key")
    assert sn.usage("base") == active
    with mounted(sn.prepare("child", "base"), tmp_path):
        assert sn.usage("child")[0] < 32768
    (directory,) = (Path(mount.source) for mount in sn.view("look", "base"))
    (directory / "more").write_bytes(os.urandom(1 << 16))
    assert sn.usage("base") == active, "a committed one is measured once"
    assert sn.usage("look")[1] <= 1


# many at once


def test_list_comes_in_batches_of_a_hundred(sn: Client) -> None:
    for number in range(1000):
        sn.view(f"key-{number:04}", labels={"n": str(number % 7)})
    batches = sn.batches()
    assert [len(batch) for batch in batches] == [100] * 10
    assert {info.name for batch in batches for info in batch} == {f"key-{number:04}" for number in range(1000)}
    assert len(sn.walk("labels.n==3")) == len(range(3, 1000, 7))
    assert sn.walk("labels.n==9") == []


def test_a_list_that_nobody_reads_blocks_nobody(shared_daemon: Daemon, sn: Client) -> None:
    labels = {f"label-{number}": "v" * 4000 for number in range(20)}
    for number in range(300):
        sn.view(f"key-{number}", labels=labels)
    slow = Client(shared_daemon.address, sn.plugin)
    stream = slow.stub.List(pb.ListSnapshotsRequest(snapshotter=sn.plugin), timeout=60)
    assert len(next(stream).info) == 100
    sn.remove("key-299")
    sn.prepare("new")
    assert sn.stat("new").kind is Kind.ACTIVE
    assert sum(len(answer.info) for answer in stream) in (199, 200)
    slow.close()


def test_of_many_prepares_of_one_key_exactly_one_wins(sn: Client) -> None:
    base(sn)
    barrier = threading.Barrier(20)

    def prepare(_: int) -> grpc.StatusCode:
        barrier.wait()
        try:
            sn.prepare("key", "base")
        except grpc.RpcError as error:
            return error.code()  # type: ignore[no-any-return]
        return Code.OK

    with ThreadPoolExecutor(20) as pool:
        codes = list(pool.map(prepare, range(20)))
    assert sorted(code.name for code in codes) == ["ALREADY_EXISTS"] * 19 + ["OK"]


def test_cancelled_calls_leave_everything_or_nothing(sn: Client, shared_daemon: Daemon) -> None:
    base(sn)
    for number in range(40):
        request = pb.PrepareSnapshotRequest(snapshotter=sn.plugin, key=f"key-{number}", parent="base")
        call = sn.stub.Prepare.future(request, timeout=60)
        threading.Event().wait(number / 10_000)
        call.cancel()
    for info in sn.walk("kind==active"):
        (mount,) = sn.mounts(info.name)
        assert any(option.startswith("upperdir=") and Path(option[9:]).is_dir() for option in mount.options)
        sn.remove(info.name)
    sn.remove("base")
    sn.cleanup()
    assert not list(shared_daemon.root.glob("snapshots/new-*"))


# disposing


def test_cleanup_destroys_what_nobody_knows(daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    served = daemon()
    sn = served.client()
    base(sn)
    sn.prepare("active", "base")
    for number in range(5):
        with mounted(sn.prepare(f"gone-{number}", "base"), tmp_path) as top:
            (top / "file").write_text("x")
        sn.remove(f"gone-{number}")
    for name in ("new-crashed", "old-7-crashed", "4711"):
        (served.root / "snapshots" / name / "fs").mkdir(parents=True)
    sn.cleanup()
    assert len(list(served.root.glob("snapshots/*"))) == 2
    sn.remove("active")
    sn.remove("base")
    sn.cleanup()
    assert list(served.root.glob("snapshots/*")) == []


def test_cleanup_while_snapshots_are_made(sn: Client) -> None:
    base(sn)
    stop = threading.Event()

    def clean() -> None:
        while not stop.is_set():
            sn.cleanup()

    with ThreadPoolExecutor(1) as pool:
        cleaning = pool.submit(clean)
        for number in range(100):
            (mount,) = sn.prepare(f"key-{number}", "base")
            if number % 2:
                sn.remove(f"key-{number}")
        stop.set()
        cleaning.result()
    for info in sn.walk("kind==active"):
        (mount,) = sn.mounts(info.name)
        assert all(Path(option.partition("=")[2]).is_dir() for option in mount.options if "dir=" in option)


def test_containerds_garbage_collection(sn: Client, shared_daemon: Daemon) -> None:
    """List without a namespace, then remove what is not referenced, children first, then Cleanup."""
    collector = Client(shared_daemon.address, sn.plugin, namespace="")
    bottom = provide(sn, "sha256:1")
    top = provide(sn, "sha256:2", bottom, "image")
    sn.prepare("container", top)
    found = {info.name: info for info in collector.walk()}
    assert found.keys() == {bottom, top, "container"}
    for name in (bottom, top):
        assert refusal(collector.remove, name)[0] is Code.FAILED_PRECONDITION
    for name in ("container", top, bottom):
        collector.remove(name)
    collector.cleanup()
    assert collector.walk() == []
    collector.close()


# layers that are not unpacked


def test_a_lazy_image(sn: Client, tmp_path: Path) -> None:
    bottom = provide(sn, "sha256:1")
    middle = provide(sn, "sha256:2", bottom)
    top = provide(sn, "sha256:3", middle, "image")
    assert sn.stat(top).parent == middle
    with mounted(sn.prepare("container", top), tmp_path) as root:
        assert (root / "hello").read_text() == "hello"
        status = root.stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o700, 5, 6), "as the image says"
        (root / "written").write_text("by the container")
    with mounted(sn.view("look", top), tmp_path) as root:
        assert [path.name for path in root.iterdir()] == ["hello"]
    with mounted(sn.mounts("container"), tmp_path) as root:
        assert {path.name for path in root.iterdir()} == {"hello", "written"}
    (mount,) = sn.mounts("container")
    lower = next(option for option in mount.options if option.startswith("lowerdir="))
    assert lower.count(":") == 0, "data layers contribute nothing"


def test_usage_of_a_layer_that_was_not_unpacked(sn: Client) -> None:
    bottom = provide(sn, "sha256:1")
    top = provide(sn, "sha256:2", bottom, "image")
    size, inodes = sn.usage(bottom)
    assert inodes == 2, "its directory and what is remembered of it"
    assert 0 < size < 32768
    assert STORED < sn.usage(top)[0] < STORED + 32768
    assert sn.usage(top)[1] == 3
    sn.prepare("container", top)
    assert sn.usage(top)[1] == 3, "what is mounted there is not looked at"
    assert 0 < sn.usage("container")[0] < 32768, "not even on a tmpfs is it nothing"


def test_ordinary_layers_above_a_lazy_image(sn: Client, tmp_path: Path) -> None:
    image = provide(sn, "sha256:1", verdict="image")
    with mounted(sn.prepare("extract", image, {SNAPSHOT_REF: "sha256:2"}), tmp_path) as root:
        (root / "above").touch()
        assert root.stat().st_mode & 0o7777 == 0o700
    sn.commit("sha256:2", "extract", {SNAPSHOT_REF: "sha256:2"})
    for found in (sn.prepare("container", "sha256:2"), sn.view("look", "sha256:2")):
        assert [mount.kind for mount in found] == ["overlay"]
        with mounted(found, tmp_path) as root:
            assert {path.name for path in root.iterdir()} == {"hello", "above"}


def test_the_same_layer_again_is_the_same_snapshot(sn: Client, shared_daemon: Daemon) -> None:
    first = provide(sn, "sha256:1")
    assert provide(sn, "sha256:1") == first
    other = Client(shared_daemon.address, sn.plugin, namespace="another")
    assert provide(other, "sha256:1") == first
    assert len(sn.walk()) == 1
    other.close()


def test_the_same_layer_on_another_parent_is_another_snapshot(sn: Client) -> None:
    """A namespace that unpacked the lower layer has it under another name."""
    labels = {SNAPSHOT_REF: "sha256:1"}
    sn.prepare("extract", labels=labels)
    sn.commit("a/7/sha256:1", "extract", labels)
    below = provide(sn, "sha256:1")
    assert below != "a/7/sha256:1"
    one, two = provide(sn, "sha256:2", below), provide(sn, "sha256:2", "a/7/sha256:1")
    assert one != two
    assert (sn.stat(one).parent, sn.stat(two).parent) == (below, "a/7/sha256:1")


def test_a_remote_layer_keeps_the_label_it_is_found_by(sn: Client) -> None:
    name = provide(sn, "sha256:1")
    sn.update(name, {"a": "b"}, "labels")
    assert sn.stat(name).labels == {"a": "b", SNAPSHOT_REF: "sha256:1"}
    assert provide(sn, "sha256:1") == name


def test_many_pulls_of_one_layer_share_it(sn: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: provide(sn, "sha256:1"), range(24)))
    assert len(set(names)) == 1
    assert len(sn.walk()) == 1


def test_a_refused_image_leaves_nothing_and_says_why(sn: Client) -> None:
    for verdict, code, reason in (
        ("denied", Code.PERMISSION_DENIED, "not-sealed"),
        ("broken", Code.INTERNAL, "internal"),
    ):
        found = refusal(sn.prepare, "extract", "", {SNAPSHOT_REF: "sha256:1", VERDICT: verdict})
        assert (found[0], found[2]) == (code, reason)
        assert f"reason={reason}" in found[1]
    assert sn.walk() == []


def test_a_policy_is_asked_again_for_every_namespace(sn: Client) -> None:
    provide(sn, "sha256:1")
    code, message, _ = refusal(sn.prepare, "extract", "", {SNAPSHOT_REF: "sha256:1", VERDICT: "denied"})
    assert code is Code.PERMISSION_DENIED
    assert "registry/app:1" in message


@pytest.mark.parametrize("labels", [{}, {SNAPSHOT_REF: "sha256:2"}, {NYDUS_BOOTSTRAP: "true"}])
def test_half_a_lazy_image_is_never_run(sn: Client, labels: dict[str, str]) -> None:
    """Data layers were provided, and the rest of the image comes by a way that sends no labels."""
    data = provide(sn, "sha256:1")
    for call in (sn.prepare, sn.view):
        code, message, _ = refusal(call, "key", data, labels)
        assert code is Code.FAILED_PRECONDITION
        assert "disable_snapshot_annotations = false" in message
    assert sn.names() == {data}


def test_an_extraction_without_labels_is_an_ordinary_snapshot(sn: Client) -> None:
    assert sn.prepare("extract-1 sha256:1", labels={})
    assert sn.prepare("extract-2 sha256:1", labels={SNAPSHOT_REF: "sha256:1"})
    sn.commit("sha256:1", "extract-2 sha256:1", {SNAPSHOT_REF: "sha256:1"})
    assert sn.stat("sha256:1").kind is Kind.COMMITTED


def test_a_layer_is_not_unpacked_without_those_below(sn: Client) -> None:
    """What a client does in parallel that was told of capability `rebase`; to such a mount, a deletion is nothing."""
    labels = {SNAPSHOT_REF: "sha256:2", PARENT_CHAIN_ID: "sha256:1"}
    code, message, _ = refusal(sn.prepare, "extract", "", labels)
    assert code is Code.FAILED_PRECONDITION
    assert '"rebase"' in message
    base(sn)
    assert sn.prepare("extract", "base", labels)


def test_only_verified_images_where_the_policy_says_so(daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    sn = daemon("--only-verified").client()
    sn.prepare("key")
    code, message, reason = refusal(sn.commit, "name", "key")
    assert (code, reason) == (Code.PERMISSION_DENIED, "unauthentic-image")
    assert "reason=unauthentic-image" in message
    image = provide(sn, "sha256:1", verdict="image")
    with mounted(sn.prepare("container", image), tmp_path) as root:
        assert (root / "hello").exists()


def test_a_removed_image_is_unmounted(daemon: Callable[..., Daemon]) -> None:
    served = daemon()
    sn = served.client()
    image = provide(sn, "sha256:1", verdict="image")
    sn.prepare("container", image)
    mountpoint = str(next(served.root.glob("snapshots/*/mnt")))
    assert mountpoint in {mount.target for mount in mounts()}
    sn.remove("container")
    sn.remove(image)
    sn.cleanup()
    assert list(served.root.glob("snapshots/*")) == []


def test_images_are_unmounted_at_the_end_and_mounted_again(daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    served = daemon()
    sn = served.client()
    image = provide(sn, "sha256:1", verdict="image")
    sn.prepare("container", image)
    assert served.process.stop() == 0
    assert not list(served.root.glob("snapshots/*/mnt")), "whoever mounts now gets an error, not an empty directory"
    served.start()
    with mounted(sn.mounts("container"), tmp_path) as root:
        assert (root / "hello").exists()
