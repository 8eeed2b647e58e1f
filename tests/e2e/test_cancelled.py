"""Calls that are given up at every stage of a lazy image: while the registry stalls, while it is attached, while it is
mounted; and clients that are killed there. Nothing half made stays, and the next call succeeds."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapshotter.api import snapshots_pb2 as pb
from snapshotter.labels import SNAPSHOT_REF
from tests.conformance.client import Client
from tests.conformance.layers import mounted
from tests.e2e.conftest import Image, Images
from tests.e2e.test_hints import pull
from tests.harness import tiny
from tests.harness.machine import Work, until
from tests.harness.serve import Serve

pytestmark = [pytest.mark.root, pytest.mark.real]

Code = grpc.StatusCode


@pytest.fixture
def served(work: Work, images: Images) -> Serve:
    return Serve(work, settings={"keys": {"files": [str(images.key)]}})


@pytest.fixture
def sn(served: Serve) -> Iterator[Client]:
    client = Client(served.address)
    yield client
    client.close()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def first_layer(image: Image) -> dict[str, str]:
    """The labels with which a client asks for the bottom layer."""
    annotations = image.manifest["layers"][0]["annotations"]
    hints = {key: value for key, value in annotations.items() if key.startswith("containerd.io/snapshot/")}
    return hints | {SNAPSHOT_REF: image.config["rootfs"]["diff_ids"][0]}


def asked(address: str) -> bool:
    """Whether the registry has got something that it has not read."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(port) and int(fields[4].partition(":")[2], 16):
            return True
    return False


def ready(sn: Client, key: str, parent: str = "", labels: dict[str, str] | None = None, **options: Any) -> Any:
    request = pb.PrepareSnapshotRequest(snapshotter=sn.plugin, key=key, parent=parent, labels=labels or {})
    return sn.stub.Prepare.future(request, **options)


def mount_child(pid: int) -> int:
    """The child of snapshotd that mounts; 0 if there is none. Before its exec, the whole of snapshotd waits for it."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            with contextlib.suppress(OSError):
                if b"oneshot" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
    return 0


@contextlib.contextmanager
def half_mounted(served: Serve, sn: Client, image: Image) -> Iterator[tuple[str, Any]]:
    """The image's top snapshot, and a call on it whose child is stopped before it has mounted, until the block ends."""
    pid = served.pids()["snapshotd"]
    for _ in range(20):  # a busy machine may let the child end before we see it
        *_, top = pull(sn, image)
        call = ready(sn, "cancelled", top)
        child = until(lambda call=call: mount_child(pid) or call.done(), "a child mounts", every=0.001)  # type: ignore[misc]
        with contextlib.suppress(ProcessLookupError):
            if child is not True:
                with stopped(child):
                    if not served.images_mounted():
                        yield top, call
                        return
        call.result()
        collect(sn, served)
    raise TimeoutError("the child is always faster")


def waiting(path: Path) -> bool:
    """Whether a connection waits to be accepted there."""
    return sum(line.endswith(f" {path}") for line in Path("/proc/net/unix").read_text().splitlines()) > 1


def memfds(pid: int) -> int:
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += "memfd" in os.readlink(path)
    return count


def collect(sn: Client, served: Serve) -> None:
    """Remove everything as containerd's collector does: nothing of any kind is left."""
    for info in sorted(sn.walk(), key=lambda info: -info.created_ns):
        sn.remove(info.name)
    sn.cleanup()
    assert list(served.root.glob("snapshots/*")) == []
    assert not served.images_mounted()
    assert served.status()["images"] == []


def test_while_the_registry_stalls(served: Serve, sn: Client, images: Images) -> None:
    image = images.sealed()
    labels = first_layer(image)
    registry = images.registry
    with stopped(registry.process.pid):
        call = ready(sn, "extract-cancelled", "", labels)
        until(lambda: asked(registry.address), "the registry is asked")
        call.cancel()
        for number in range(5):  # one after the other, each waits for what nobody waits for any more
            late = ready(sn, f"extract-late-{number}", "", labels, timeout=0.3)
            with pytest.raises(grpc.RpcError) as error:
                late.result()
            assert error.value.code() is Code.DEADLINE_EXCEEDED
        program = "import sys; from tests.e2e.test_cancelled import killed; killed(*sys.argv[1:])"
        victim = subprocess.Popen(
            [sys.executable, "-c", program, served.address, *(f"{key}={value}" for key, value in labels.items())],
            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"calls\n"
        victim.kill()
        victim.communicate()
        assert sn.names() == set(), "others are served meanwhile"
        assert list(served.root.glob("snapshots/*")) == []
    assert len(list(pull(sn, image))) == len(image.layers)
    assert len(sn.walk()) == len(image.layers)
    collect(sn, served)


def killed(address: str, *labels: str) -> None:
    """A client that is about to be killed."""
    client = Client(Path(address))
    call = ready(client, "extract-killed", "", dict(label.split("=", 1) for label in labels), wait_for_ready=True)
    client.names()  # sent later on the same connection, answered: the call is there
    print("calls", flush=True)
    call.result()


def test_while_the_image_is_attached(served: Serve, sn: Client, images: Images, tmp_path: Path) -> None:
    *_, top = pull(sn, images.sealed())
    pids = served.pids()
    held, before = memfds(pids["keeper"]), memfds(pids["snapshotd"])
    with stopped(pids["blobd"]):
        call = ready(sn, "cancelled", top)
        until(lambda: waiting(served.root / "blobd.sock"), "blobd is asked whether it has the image")
        call.cancel()
        assert "cancelled" not in sn.names()
    until(lambda: memfds(pids["keeper"]) > held, "the image is handed over all the same", every=0.001)
    with stopped(pids["blobd"]):
        call = ready(sn, "cancelled too", top)
        late = ready(sn, "late", top, timeout=0.3)
        with contextlib.suppress(grpc.RpcError):  # unless blobd had done its part
            late.result()
        call.cancel()
    with mounted(sn.prepare("container", top), tmp_path) as root:
        assert (root / "data/random").read_bytes() == tiny.data(1)
    until(lambda: memfds(pids["keeper"]) == held + 1, "the keeper holds the image once")
    until(lambda: memfds(pids["snapshotd"]) == before, "snapshotd holds it no more")
    collect(sn, served)
    assert memfds(pids["keeper"]) == held


def test_while_the_image_is_mounted(served: Serve, sn: Client, images: Images, tmp_path: Path) -> None:
    with half_mounted(served, sn, images.sealed()) as (top, call):
        call.cancel()
        late = ready(sn, "late", top, timeout=0.3)
        with pytest.raises(grpc.RpcError) as error:
            late.result()
        assert error.value.code() is Code.DEADLINE_EXCEEDED
        assert not {"cancelled", "late"} & sn.names()
    for key in ("container", "another"):
        with mounted(sn.prepare(key, top), tmp_path) as root:
            assert (root / "data/random").read_bytes() == tiny.data(1)
    assert len(served.images_mounted()) == 1, "mounted once, not again by each who came and went"
    collect(sn, served)


def test_an_image_is_removed_while_its_mount_is_given_up(served: Serve, sn: Client, images: Images) -> None:
    with half_mounted(served, sn, images.sealed()) as (_, call):
        call.cancel()
        for info in sorted(sn.walk(), key=lambda info: -info.created_ns):
            sn.remove(info.name)
        cleanup = sn.stub.Cleanup.future(pb.CleanupRequest(), timeout=60)
    cleanup.result()
    collect(sn, served)
