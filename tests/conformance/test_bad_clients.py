"""Clients that vanish, stall, break off or ask at the same time: what they leave half done is nothing."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from snapshotter.api import snapshots_pb2 as pb
from tests.conformance.client import Client
from tests.conformance.test_service import Code, base
from tests.harness.machine import Work, until
from tests.harness.serve import Serve

pytestmark = pytest.mark.root

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
HUNDREDS = 300


@pytest.fixture(scope="module")
def served() -> Iterator[Serve]:
    with Work("clients") as work:
        yield Serve(work, settings={"log": {"level": "info"}})


@pytest.fixture
def sn(served: Serve) -> Iterator[Client]:
    """A client. When the test is over, all its snapshots can be removed, and no directory is left."""
    client = Client(served.address)
    yield client
    for info in [*client.walk("kind!=committed"), *client.walk("kind==committed")]:
        client.remove(info.name)
    client.cleanup()
    client.close()
    assert directories(served) == []


def directories(served: Serve) -> list[Path]:
    return list(served.root.glob("snapshots/*"))


@pytest.fixture
def descriptors(served: Serve) -> Callable[[], int]:
    pid = (served.root / "snapshotd.lock").read_text().strip()
    return lambda: len(os.listdir(f"/proc/{pid}/fd"))


def connect(served: Serve) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(served.address))
    return client


def test_connections_that_say_nothing_are_in_nobodys_way(
    served: Serve, sn: Client, descriptors: Callable[[], int]
) -> None:
    base(sn)
    before = descriptors()
    idle = [connect(served) for _ in range(HUNDREDS)]
    until(lambda: descriptors() > before + HUNDREDS, "all are accepted")
    late = Client(served.address)
    assert late.names() == {"base"}
    late.close()
    for client in idle:
        client.close()
    until(lambda: descriptors() <= before + 2, "their descriptors are free again")
    sn.prepare("key", "base")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        PREFACE[:10],
        PREFACE + SETTINGS[:5],
        PREFACE + SETTINGS + b"\0\x10\0\x01\x04\0\0\0\x01" + b"\x83\x86",  # HEADERS of 4096 bytes, of which two come
        PREFACE + SETTINGS + b"\xff\xff\xff\0\0\0\0\0\x01" + b"x" * 1000,  # DATA of 16 MiB on no stream
        PREFACE + SETTINGS + b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08" * 1000,  # a thousand resets of nothing
        PREFACE + SETTINGS + b"\0\0\x08\x06\0\0\0\0\0pingpong" * 10_000,
        os.urandom(100_000),
    ],
    ids=["HTTP/1.1", "preface", "settings", "headers", "data", "resets", "pings", "noise"],
)
def test_half_frames_and_noise_end_no_more_than_their_connection(
    served: Serve, sn: Client, descriptors: Callable[[], int], sent: bytes
) -> None:
    base(sn)
    before = descriptors()
    clients = [connect(served) for _ in range(5)]
    for client in clients:
        try:
            client.sendall(sent)
        except OSError:  # hung up on already
            continue
    assert sn.names() == {"base"}
    for client in clients:
        client.close()
    until(lambda: descriptors() <= before + 2, "their descriptors are free again")
    fresh = Client(served.address)
    fresh.prepare("key", "base")
    fresh.close()


def test_of_fifty_prepares_of_one_key_one_wins(served: Serve, sn: Client) -> None:
    """From ten connections at once, and the losers leave no directory."""
    base(sn)
    clients = [Client(served.address) for _ in range(10)]
    barrier = threading.Barrier(50)

    def prepare(number: int) -> grpc.StatusCode:
        barrier.wait()
        try:
            (clients[number % 10].prepare if number % 2 else clients[number % 10].view)("key", "base")
        except grpc.RpcError as error:
            return error.code()  # type: ignore[no-any-return]
        return Code.OK

    with ThreadPoolExecutor(50) as pool:
        codes = [code.name for code in pool.map(prepare, range(50))]
    for client in clients:
        client.close()
    assert sorted(codes) == ["ALREADY_EXISTS"] * 49 + ["OK"]
    assert sn.names() == {"base", "key"}
    assert len(directories(served)) == 2


def test_clients_that_are_killed_while_they_list_and_make_snapshots(
    served: Serve, sn: Client, descriptors: Callable[[], int]
) -> None:
    base(sn)
    labels = {f"label-{number}": "v" * 4000 for number in range(20)}
    for number in range(300):
        sn.view(f"key-{number}", "base", labels)
    before = descriptors()
    program = """if True:
        import sys, itertools
        from pathlib import Path
        from snapshotter.api import snapshots_pb2 as pb
        from tests.conformance.client import Client
        client = Client(Path(sys.argv[1]))
        stream = client.stub.List(pb.ListSnapshotsRequest(snapshotter="test"))
        next(stream)
        print("lists", flush=True)
        for number in itertools.count():
            client.prepare(f"{sys.argv[2]}-{number}", "base")
        """
    victims = [
        subprocess.Popen(
            [sys.executable, "-c", program, served.address, f"victim-{number}"], stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for number in range(3)
    ]  # fmt: skip
    for victim in victims:
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"lists\n"
    until(lambda: sn.names('name~="^victim"'), "they make snapshots")
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    until(lambda: descriptors() <= before + 2, "their connections are gone")
    for info in sn.walk("kind==active"):
        (mount,) = sn.mounts(info.name)
        assert all(Path(option.split("=")[1]).is_dir() for option in mount.options if "dir=" in option)
    assert len(sn.walk("kind==view")) == 300
    sn.cleanup()
    assert len(directories(served)) == len(sn.walk())


def test_calls_whose_time_is_over_leave_everything_or_nothing(served: Serve, sn: Client) -> None:
    base(sn)
    for number in range(60):
        request = pb.PrepareSnapshotRequest(snapshotter=sn.plugin, key=f"key-{number}", parent="base")
        try:
            sn.stub.Prepare(request, timeout=number / 20_000)
        except grpc.RpcError as error:
            assert error.code() is Code.DEADLINE_EXCEEDED  # noqa: PT017 - some are in time
    assert all(sn.mounts(info.name) for info in sn.walk("kind==active"))
    sn.cleanup()
    assert len(directories(served)) == len(sn.walk())
