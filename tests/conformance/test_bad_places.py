"""Places that `serve` cannot use, or shares, or loses while it runs: it says so, serves what it can, loses nothing."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.conformance.client import Client
from tests.conformance.layers import mounted
from tests.conformance.test_service import Code, base, refusal
from tests.harness.machine import Work, alive, unmount, until
from tests.harness.process import Process
from tests.harness.serve import PROGRAM, Serve

pytestmark = pytest.mark.root

QUIET = {"log": {"level": "info"}}


def refused(serve: Serve, limits: str = "") -> tuple[int, str]:
    """Exit status and last line of a `serve` that must not run."""
    process = serve.spawn() if not limits else shell(serve, limits)
    status = process.wait(20)
    return status, process.errors().strip().splitlines()[-1]


def shell(serve: Serve, before: str) -> Process:
    """`serve`, started by a shell that has done something before."""
    command = ["sh", "-c", f'{before}; exec "$@"', "sh", *PROGRAM, "serve", "--config", serve.config]
    serve.process = Process(serve._work, f"{serve.name}-serve", command, environment=serve.environment)
    return serve.process


@pytest.fixture
def client() -> Iterator[Callable[[Serve], Client]]:
    made: list[Client] = []

    def make(serve: Serve) -> Client:
        made.append(Client(serve.address))
        return made[-1]

    yield make
    for one in made:
        one.close()


# refused at the start


def test_a_root_whose_link_leads_where_mount_options_cannot_follow(work: Work) -> None:
    work.directory("a:b").chmod(0o700)
    (work.path / "link").symlink_to("a:b")
    status, said = refused(Serve(work, root=work.path / "link", start=False))
    assert status == 2
    assert f"root '{work.path}/a:b'" in said
    assert not list((work.path / "a:b").iterdir())


@pytest.mark.parametrize("name", ["a %41%b ü#?", "longest"])
def test_odd_roots_that_work(work: Work, tmp_path: Path, name: str, client: Callable[[Serve], Client]) -> None:
    if name == "longest":
        name = "x" * (107 - len(f"{work.path}/") - len("/snapshotd.sock"))
    serve = Serve(work, settings=QUIET, root=work.path / name)
    sn = client(serve)
    base(sn)
    with mounted(sn.prepare("key", "base"), tmp_path) as top:
        (top / "file").touch()
    assert {path.name for path in serve.root.glob("*.sock")} >= {"grpc.sock", "snapshotd.sock"}


@pytest.mark.parametrize("what", ["root", "address"])
def test_directories_that_others_can_change(work: Work, what: str) -> None:
    place = work.directory("place")
    place.chmod(0o770)
    here: dict[str, Any] = {"root": place} if what == "root" else {"settings": {"address": f"{place}/sock"}}
    status, said = refused(Serve(work, start=False, **here))
    assert status == 2
    assert f"{what} {place}" in said
    assert "0770" in said
    assert list(place.iterdir()) == []


def test_an_address_that_is_somebody_elses(work: Work) -> None:
    path = work.path / "sock"
    path.write_text("precious")
    serve = Serve(work, settings=QUIET | {"address": str(path)}, start=False)
    status, said = refused(serve)
    assert status == 1
    assert f"exists and is no socket: '{path}'" in said
    assert path.read_text() == "precious"
    path.unlink()
    serve.address = path
    serve.start()  # on the same root


def test_a_second_one_on_the_same_root_or_address(work: Work, client: Callable[[Serve], Client]) -> None:
    first = Serve(work, settings=QUIET)
    sn = client(first)
    base(sn)
    pids = first.pids()
    same_root = Serve(work, "second", QUIET, root=first.root, start=False)
    status, said = refused(same_root)
    assert status == 5
    assert f"already running as pid {pids['keeper']}" in said
    same_address = Serve(work, "third", QUIET | {"address": str(first.address)}, start=False)
    status, said = refused(same_address)
    assert status == 1
    assert f"another process listens here: '{first.address}'" in said
    os.kill(pids["snapshotd"], signal.SIGSTOP)  # it need not be awake to own the address
    try:
        assert refused(same_address)[0] == 1
    finally:
        os.kill(pids["snapshotd"], signal.SIGCONT)
    assert first.pids() == pids
    assert sn.names() == {"base"}
    for other in (same_root, same_address):
        other.process = None  # nothing of them to be ended


# descriptors and logs


def test_too_few_descriptors_for_anybody(work: Work) -> None:
    status, said = refused(Serve(work, start=False), "ulimit -n 64")
    assert status == 2
    assert "LimitNOFILE" in said


def test_descriptors_run_out_and_come_back(work: Work, client: Callable[[Serve], Client]) -> None:
    serve = Serve(work, settings=QUIET, start=False)
    shell(serve, "ulimit -n 256").wait_until(lambda: serve.try_status() is not None, "it serves")
    pids = serve.pids()
    sn = client(serve)
    base(sn)
    idle = [work.stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(200)]
    for connection in idle:
        connection.connect(str(serve.address))
    until(lambda: "Too many open files" in serve.log(), "descriptors run out")
    assert sn.stat("base").name == "base", "who is connected is served"
    size = len(serve.log())
    for connection in idle:
        connection.close()
    assert size < 200_000, "a failed accept is no storm"
    late = client(serve)
    late.prepare("key", "base")
    until(lambda: serve.try_status() is not None, "status answers")
    assert serve.pids() == pids, "nothing had to be started again"


def test_closed_streams_are_nobody_elses_numbers(work: Work, client: Callable[[Serve], Client]) -> None:
    serve = Serve(work, settings=QUIET, start=False)
    shell(serve, "exec 0<&- 1>&- 2>&-").wait_until(lambda: serve.try_status() is not None, "it serves")
    sn = client(serve)
    base(sn)
    for pid in serve.pids().values():
        held = [os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)]
        assert held == ["/dev/null"] * 3
    assert sn.names() == {"base"}


def test_a_log_that_nobody_reads_any_more(work: Work, client: Callable[[Serve], Client]) -> None:
    serve = Serve(work, settings=QUIET, start=False)
    command = ["sh", "-c", '"$@" 2>&1 | head -n 3', "sh", *PROGRAM, "serve", "--config", str(serve.config)]
    process = Process(work, "piped", command, environment=serve.environment)
    until(lambda: serve.try_status() is not None, "it serves")
    sn = client(serve)
    base(sn)
    assert refusal(sn.prepare, "key", "missing")[0] is Code.NOT_FOUND
    serve.wait_replaced("snapshotd", serve.kill("snapshotd"))
    assert sn.names() == {"base"}
    keeper = serve.pids()["keeper"]
    os.kill(keeper, signal.SIGTERM)
    until(lambda: not alive(keeper), "it ends", 15)
    process.wait(10)
    assert not serve.address.exists()


# a root that becomes unusable


def answers(sn: Client) -> dict[str, str]:
    """What each operation answers, by name of the status."""
    calls: dict[str, Callable[[], object]] = {
        "prepare": lambda: sn.prepare("new", "base"), "view": lambda: sn.view("look", "base"),
        "stat": lambda: sn.stat("key"), "mounts": lambda: sn.mounts("key"), "usage": lambda: sn.usage("key"),
        "list": sn.walk, "update": lambda: sn.update("key", {"a": "b"}), "commit": lambda: sn.commit("name", "key"),
    }  # fmt: skip
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "OK"
        except grpc.RpcError as error:
            found[name] = error.code().name
    return found


READS = dict.fromkeys(("stat", "mounts", "usage", "list"), "OK")


def test_a_full_root_still_reads_and_removes(work: Work, client: Callable[[Serve], Client]) -> None:
    disk = work.directory("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m,mode=0700", "tmpfs", disk], check=True)
    work.stack.callback(unmount, str(disk))
    serve = Serve(work, settings=QUIET, root=disk / "root")
    sn = client(serve)
    base(sn)
    for key in ("key", *(f"small-{number}" for number in range(50))):
        sn.prepare(key, "base")
    before = {info.name: info for info in sn.walk()}
    container = disk / "root/snapshots" / sn.mounts("key")[0].options[1].split("/")[-2] / "fs/data"
    with pytest.raises(OSError, match="No space"):
        container.write_bytes(bytes(16 << 20))
    found = answers(sn)
    changes = dict.fromkeys(("prepare", "view", "update", "commit"), "RESOURCE_EXHAUSTED")
    assert found == READS | changes
    assert refusal(sn.prepare, "new", "base")[2] == "no-space"
    assert {info.name: info for info in sn.walk()} == before
    for number in range(50):  # what collects garbage must be able to, and frees space only at the end
        sn.remove(f"small-{number}")
    sn.remove("key")
    sn.cleanup()
    assert sn.names() == {"base"}
    assert set(answers(sn).values()) == {"OK", "NOT_FOUND"}
    assert len(list((serve.root / "snapshots").iterdir())) == 3


def test_a_root_that_turns_read_only(work: Work, client: Callable[[Serve], Client]) -> None:
    """As a file system does after an error, with everything open."""
    image, disk = work.path / "image", work.directory("disk")

    def attach(options: str) -> None:
        subprocess.run(["mount", "-o", options, image, disk], check=True)

    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    attach("loop")
    work.stack.callback(unmount, str(disk))
    disk.chmod(0o700)
    serve = Serve(work, settings=QUIET, root=disk / "root")
    sn = client(serve)
    base(sn)
    sn.prepare("key", "base")
    before = {info.name: info for info in sn.walk()}
    subprocess.run(["mount", "-o", "remount,abort", disk], check=True)
    changes = dict.fromkeys(("prepare", "view", "update", "commit"), "FAILED_PRECONDITION")
    assert answers(sn) == READS | changes
    assert "Read-only" in refusal(sn.prepare, "new", "base")[1]
    assert {info.name: info for info in sn.walk()} == before
    assert serve.terminate() == 0
    assert unmount(str(disk))
    subprocess.run(["e2fsck", "-fy", image], check=False, capture_output=True)
    attach("loop,ro")
    status, said = refused(serve)
    assert (status, "Read-only" in said) == (1, True)
    assert unmount(str(disk))
    attach("loop")
    serve.start()
    assert {info.name: info for info in sn.walk()} == before
    assert sn.prepare("new", "base")
    serve.stop()


def test_a_root_that_is_removed(work: Work, client: Callable[[Serve], Client]) -> None:
    serve = Serve(work, settings=QUIET)
    sn = client(serve)
    base(sn)
    sn.prepare("key", "base")
    pids = [int((serve.root / f"{name}.lock").read_text()) for name in ("snapshotd", "blobd")]
    shutil.rmtree(serve.root)
    found = answers(sn)
    assert found["prepare"] == found["view"] == found["mounts"] == found["commit"] == "DATA_LOSS"
    assert "lost its directory" in refusal(sn.mounts, "key")[1]
    late = client(serve)
    assert late.stat("base").name == "base"
    assert all(map(alive, pids))
    assert serve.terminate() == 0
    serve.start()
    assert sn.names() == set()
    base(sn)
