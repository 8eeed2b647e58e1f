"""kill -9 at every step of every change: afterwards all of it happened or nothing, and no directory is left over."""

import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from snapshotter.labels import SNAPSHOT_REF
from tests.conformance.client import Client
from tests.conformance.daemon import Daemon
from tests.conformance.images import VERDICT
from tests.conformance.layers import mounted
from tests.harness.machine import Work

pytestmark = pytest.mark.root

Step = Callable[[Client], object]
DATA = {SNAPSHOT_REF: "sha256:1", VERDICT: "data"}
IMAGE = {SNAPSHOT_REF: "sha256:2", VERDICT: "image"}

CHANGES: dict[str, Step] = {
    "prepare": lambda sn: sn.prepare("new", "base"),
    "data": lambda sn: sn.prepare("extract", "", DATA),
    "image": lambda sn: sn.prepare("extract", "", IMAGE),
    "commit": lambda sn: sn.commit("new", "active"),
    "remove": lambda sn: sn.remove("active"),
}
CREATE = ("create.made", "create.inserted", "create.placed", "create.done")
POINTS = [
    *((change, point) for change in ("prepare", "data", "image") for point in CREATE),
    *(("commit", point) for point in ("commit.written", "commit.done")),
    *(("remove", point) for point in ("remove.deleted", "remove.done")),
]


def killing(point: str) -> dict[str, str]:
    return {"COCO_FAILPOINT": f"{point}:kill"}


def prepared(work: Work) -> tuple[Daemon, Client]:
    """base ← active, and childless."""
    daemon = Daemon(work)
    sn = daemon.client()
    for name in ("base", "childless"):
        with mounted(sn.prepare("key"), work.path) as top:
            (top / "file").write_text(name)
        sn.commit(name, "key")
    sn.prepare("active", "base")
    return daemon, sn


def killed_at(daemon: Daemon, sn: Client, point: str, change: Step) -> None:
    daemon.restart(killing(point))
    with pytest.raises(grpc.RpcError) as error:
        change(sn)
    assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert daemon.process.wait() == -signal.SIGKILL


def check(daemon: Daemon, sn: Client, directory: Path) -> set[str]:
    """Every snapshot has its directory and works, and nothing else is there; their names."""
    sn.cleanup()
    names = sn.names()
    assert len(daemon.names()) == len(names)
    for info in sn.walk():
        if info.kind.name != "COMMITTED":
            with mounted(sn.mounts(info.name), directory) as top:
                list(top.iterdir())
        elif SNAPSHOT_REF not in info.labels:
            with mounted(sn.view("check", info.name), directory) as top:
                list(top.iterdir())
            sn.remove("check")
    return names


@pytest.mark.parametrize(("name", "point"), POINTS)
def test_killed_while_changing(work: Work, name: str, point: str) -> None:
    daemon, sn = prepared(work)
    before = {info.name: info for info in sn.walk()}
    killed_at(daemon, sn, point, CHANGES[name])
    daemon.start()
    after = check(daemon, sn, work.path)
    assert {
        info.name: info for info in sn.walk() if info.name in before and info.name in after
    }.items() <= before.items()
    if point.endswith(".done"):
        assert after != before.keys()
    else:
        assert after == before.keys()
        if name in ("data", "image"):
            with pytest.raises(grpc.RpcError) as error:
                CHANGES[name](sn)
            assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS
        else:
            CHANGES[name](sn)
        assert check(daemon, sn, work.path) != before.keys()


@pytest.mark.parametrize(("name", "point"), [case for case in POINTS if case[1] in ("create.done", "commit.done")])
def test_killed_and_the_database_lost(work: Work, name: str, point: str) -> None:
    daemon, sn = prepared(work)
    killed_at(daemon, sn, point, CHANGES[name])
    daemon.start()
    before = {found.name: found for found in sn.walk()}
    daemon.process.stop()
    (daemon.root / "metadata.db").unlink()
    daemon.start()
    assert {found.name: found for found in sn.walk()} == before
    check(daemon, sn, work.path)


def test_killed_while_cleaning_up(work: Work) -> None:
    daemon, sn = prepared(work)
    sn.remove("active")
    sn.remove("childless")
    daemon.process.stop()
    daemon.spawn(killing("cleanup.retired"))  # it cleans up when it starts
    assert daemon.process.wait() == -signal.SIGKILL
    daemon.start()
    assert check(daemon, sn, work.path) == {"base"}


def test_ids_are_not_used_again_after_a_kill(work: Work) -> None:
    daemon, sn = prepared(work)
    killed_at(daemon, sn, "create.placed", CHANGES["prepare"])
    seen = daemon.names()
    daemon.start()
    sn.prepare("after")
    sn.cleanup()
    new = daemon.names() - seen
    assert len(new) == 1
    assert int(new.pop()) > max(int(name) for name in seen)


@pytest.mark.parametrize(
    "point", ["create.made", "create.inserted", "create.placed", "commit.written", "remove.deleted"]
)
def test_an_error_in_the_middle_undoes_everything(work: Work, point: str) -> None:
    daemon, sn = prepared(work)
    daemon.restart({"COCO_FAILPOINT": f"{point}:fail"})
    before, directories = sn.walk(), daemon.names()
    for name in ("prepare", "commit", "remove"):
        if point.startswith({"prepare": "create"}.get(name, name)):
            with pytest.raises(grpc.RpcError) as error:
                CHANGES[name](sn)
            assert error.value.code() is grpc.StatusCode.INTERNAL
            assert "state directory" in error.value.details()
    assert sn.walk() == before
    assert daemon.names() == directories
