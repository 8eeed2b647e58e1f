"""Many containers, namespaces, plugin names and images on one node: what is shared, and when it is let go."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter.api import snapshots_pb2
from tests.conformance.client import Client
from tests.conformance.layers import mounted
from tests.conformance.pull import pull
from tests.e2e.conftest import Image, Images
from tests.harness.machine import Work, alive, until
from tests.harness.serve import WORKERS, Serve
from tests.harness.tiny import text

pytestmark = [pytest.mark.root, pytest.mark.real]

IMAGES = 12


class Node:
    """`serve`, and clients that speak to it as several containerds would."""

    def __init__(self, work: Work, images: Images) -> None:
        self.work, self.images = work, images
        self.serve = Serve(work, settings={"keys": {"files": [str(images.key)]}, "log": {"level": "info"}})

    def client(self, plugin: str = "coco", namespace: str = "k8s.io") -> Client:
        client = Client(self.serve.address, plugin, namespace=namespace)
        self.work.stack.callback(client.close)
        return client

    def pull(self, client: Client, image: Image) -> str:
        return pull(client, self.images.registry, image.by_digest)

    def read(self, client: Client, key: str) -> bytes:
        with mounted(client.mounts(key), self.work.path) as top:
            return (top / "data/text").read_bytes()

    def remove_all(self, client: Client) -> None:
        while found := client.walk():
            parents = {info.parent for info in found}
            for info in found:
                if info.name not in parents:
                    client.remove(info.name)
        client.cleanup()

    def memory(self) -> dict[str, int]:
        """Resident kilobytes of each process."""
        found = {}
        for name, pid in self.serve.pids().items():
            status = Path(f"/proc/{pid}/status").read_text()
            found[name] = int(status.split("VmRSS:")[1].split()[0])
        return found


@pytest.fixture
def node(work: Work, images: Images) -> Iterator[Node]:
    made = Node(work, images)
    yield made
    for plugin in ("coco", "nydus", *(f"plugin-{number}" for number in range(IMAGES))):
        made.remove_all(made.client(plugin))


def test_containers_and_namespaces_share_a_mount_and_plugin_names_do_not(node: Node, images: Images) -> None:
    first, other = node.client(), node.client(namespace="moby")
    top = node.pull(first, images.sealed())
    assert node.pull(other, images.sealed()) == top
    for number in range(5):
        (first if number % 2 else other).prepare(f"container-{number}", top)
        assert node.read(first, f"container-{number}") == text()
        assert len(node.serve.images_mounted()) == 1
    second = node.client("nydus")
    second.prepare("container", node.pull(second, images.sealed()))
    assert node.read(second, "container") == text()
    assert len(node.serve.images_mounted()) == 2
    for number in range(5):
        first.remove(f"container-{number}")
    first.cleanup()
    assert len(node.serve.images_mounted()) == 2, "the image is still there"
    node.remove_all(first)
    assert len(node.serve.images_mounted()) == 1
    assert node.read(second, "container") == text(), "nobody took it from another plugin name"
    node.remove_all(second)
    assert node.serve.images_mounted() == []
    assert node.serve.status()["images"] == []


def test_many_mounted_images_cost_little_and_outlive_restarts(node: Node, images: Images) -> None:
    """Each plugin name has a mount of its own, as another image would have."""
    node.client().prepare("warm", node.pull(node.client(), images.sealed()))
    before = node.memory()
    clients = [node.client(f"plugin-{number}") for number in range(IMAGES)]
    for client in clients:
        client.prepare("container", node.pull(client, images.sealed()))
    assert len(node.serve.images_mounted()) == IMAGES + 1
    assert node.read(clients[-1], "container") == text()
    grown = {name: (kilobytes - before[name]) / IMAGES for name, kilobytes in node.memory().items()}
    assert max(grown.values()) < 1024, grown
    mounted_before = node.serve.images_mounted()
    pids = node.serve.pids()
    for name in WORKERS[1:]:
        os.kill(pids[name], signal.SIGKILL)
    for name in WORKERS[1:]:
        node.serve.wait_replaced(name, pids[name])
    assert node.serve.images_mounted() == mounted_before
    assert node.read(clients[0], "container") == text()
    assert len(node.serve.status()["images"]) == IMAGES + 1
    assert alive(pids["keeper"])


def test_removing_is_a_rename_however_much_there_is(node: Node) -> None:
    """And what was removed goes without keeping anybody waiting."""
    sn = node.client()
    sn.prepare("small")
    with mounted(sn.prepare("large"), node.work.path) as top:
        for directory in range(30):
            (top / f"{directory}").mkdir()
            for file in range(100):
                (top / f"{directory}/{file}").touch()
    begin = time.monotonic()
    sn.remove("large")
    took = time.monotonic() - begin
    assert sn.names() == {"small"}
    [left] = [path for path in (node.serve.root / "snapshots").iterdir() if path.name.startswith("old-")]
    assert sum(1 for _ in left.rglob("*")) > 3000, "all of it is still there"
    assert took < 1
    cleaner = sn.stub.Cleanup.future(snapshots_pb2.CleanupRequest(snapshotter=sn.plugin), **sn.call)
    slowest = 0.0
    while not cleaner.done():
        begin = time.monotonic()
        sn.stat("small")
        slowest = max(slowest, time.monotonic() - begin)
    cleaner.result()
    assert slowest < 1
    until(lambda: not left.exists(), "it is gone", 10)
