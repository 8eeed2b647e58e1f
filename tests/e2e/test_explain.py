"""`explain` on a real node: a slow link is named as the reason, for an image and for a container."""

import json
from typing import Any

import pytest

from tests.e2e.conftest import Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.link import ShapedLink
from tests.harness.serve import program

pytestmark = [pytest.mark.root, pytest.mark.real]


def explained(node: Node, what: str) -> dict[str, Any]:
    result = program(node.work, "explain", what, "--config", node.daemon.config, "--json")
    assert result.returncode == 0, result.stderr
    [image] = json.loads(result.stdout)["images"]
    return dict(image)


def test_a_slow_link_is_named(node: NodeMaker, images: Images) -> None:
    guest, image = node(), images.sealed()
    link = ShapedLink(guest.work, image.registry.address, round_trip_ms=200, megabits=40, record=False)
    reference = f"{link.address}/{image.repository}@{image.digest}"
    guest.containerd.cri.pull(reference)
    assert "It was not mounted" in " ".join(explained(guest, reference)["summary"])
    container = guest.containerd.start(reference, "/bin/sh", "-ec", f"{READ_ALL}; sleep 1000")
    container.wait_running()
    assert "".join(container.stdout.readline() for _ in expected().splitlines()) == expected()

    found = explained(guest, container.identity)
    assert (found["manifest"], found["references"]) == (image.digest, [reference])
    assert found["summary"][0].split(": ")[1].startswith("registry, for "), found["summary"]
    assert found["phases"]["registry, for metadata"] > 0.2
    assert (
        found["data"]["bytes"]
        == found["counters"]["fetched_bytes"]
        == guest.daemon.status()["counters"]["fetched_bytes"]
    )
    assert found["data"]["reads_waited"] > 0
    assert explained(guest, image.digest[:20])["manifest"] == image.digest
    names = [moment["text"].split()[0] for moment in found["timeline"]]
    assert names.index("key") < names.index("attach") < names.index("mount") < names.index("first-read")
    text = program(guest.work, "explain", image.repository, "--config", guest.daemon.config).stdout
    assert text.startswith(f"{reference}\n")
    assert "The first data was read" in text
    container.kill()
