"""`doctor` on real nodes: silent on a healthy one, and right about what was broken on others."""

import json
import os
import signal
from typing import Any

import pytest

from tests.e2e.conftest import Image, Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.machine import alive, until
from tests.harness.serve import program

pytestmark = [pytest.mark.root, pytest.mark.real]


def doctor(node: Node, image: Image | str = "", path: str = "") -> dict[str, dict[str, str]]:
    """Results by id. The exit code must say whether one fails."""
    where = node.containerd
    name = image if isinstance(image, str) else image.by_digest
    result = program(
        node.work, "doctor", "--json", "--config", node.daemon.config, "--containerd", where.layout.socket,
        "--containerd-config", where.home / "config.toml", *(["--image", name] if name else []),
        environment={"PATH": path} if path else {},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["ok"] == (result.returncode == 0) == all(check["status"] != "fail" for check in found["checks"])
    return {check["id"]: check for check in found["checks"]}


def bad(found: dict[str, dict[str, str]]) -> set[str]:
    """Ids that fail or warn because of the node; tests' nodes share clock, disk and swap with their machine."""
    ours = {name: check for name, check in found.items() if name not in ("clock", "root-space", "cache-space")}
    return {name for name, check in ours.items() if check["status"] in ("fail", "warn")}


def test_a_healthy_confidential_node(node: NodeMaker, images: Images) -> None:
    guest = node(mode="confidential")
    image = images.sealed()
    assert guest.shell(guest.pull(image), READ_ALL) == expected()
    found = doctor(guest, image)
    assert bad(found) == {"containerd-exports"}, found  # which this containerd's file does not have
    assert found["mount-namespace"]["found"].startswith("the running snapshotd shares it")
    assert found["image-kind"]["found"] == "sealed"
    assert found["image-key"]["status"] == found["image-ranges"]["status"] == "ok"
    assert found["containerd-loaded"]["status"] == "ok"
    assert found["state-mounts"]["found"] == "1 images mounted, each has its snapshot"


def test_an_image_that_this_node_may_not_or_cannot_open(node: NodeMaker, images: Images) -> None:
    guest = node(mode="confidential", key=images.other_key)
    image = images.sealed()
    found = doctor(guest, image.by_tag)
    assert {"image-policy", "image-key"} <= bad(found)
    assert f'pins = ["{image.by_digest}"]' in found["image-policy"]["advice"]
    assert "key" in found["image-key"]["found"]
    found = doctor(guest, images.ordinary())
    assert found["image-kind"]["status"] == "fail"
    found = doctor(guest, f"{images.registry.address}/t/none:1")
    assert found["image-manifest"]["status"] == "fail"
    assert found["image-key"]["status"] == "skip"


@pytest.mark.allow_warnings
def test_a_lost_data_plane_and_damaged_metadata(node: NodeMaker, images: Images) -> None:
    guest = node()
    reference = guest.pull(images.sealed())
    container = guest.containerd.start(reference, "/bin/sleep", "1000")
    container.wait_running()
    (guest.daemon.root / "snapshots" / "lost-9-x").mkdir()
    [bootstrap] = (guest.daemon.cache / "bootstraps").iterdir()
    bootstrap.write_bytes(b"damaged")
    found = doctor(guest)
    assert bad(found) == {"containerd-exports", "state-lost", "state-bootstraps"}
    assert str(bootstrap) in found["state-bootstraps"]["advice"]
    pids = guest.daemon.pids()
    os.kill(pids["keeper"], signal.SIGKILL)
    found = doctor(guest)
    assert found["workers"]["status"] == "fail"
    assert found["workers-orphaned"]["found"] == (
        f"blobd pid {pids['blobd']}, snapshotd pid {pids['snapshotd']} without a keeper"
    )
    for name in ("blobd", "snapshotd"):
        os.kill(pids[name], signal.SIGKILL)
    until(lambda: not any(map(alive, pids.values())), "all three are gone", 10)
    found = doctor(guest)
    assert found["workers"]["status"] == "warn"
    assert found["state-dead-mounts"]["status"] == "fail"
    assert found["state-mounts"]["status"] == "skip"
    guest.daemon.start()
    container.kill()
    assert doctor(guest)["state-dead-mounts"]["status"] == "ok"
