"""Namespaces of containerd that have the same layers in different ways."""

import os
from pathlib import Path

import pytest

from tests.e2e.clients.paths import CRI, Puller, PullPath
from tests.e2e.conftest import Image, Images
from tests.harness import oci, serve
from tests.harness.oci import member
from tests.harness.releases import DEBIAN

pytestmark = [pytest.mark.root, pytest.mark.real]


@pytest.fixture(scope="module")
def hollow(images: Images) -> Image:
    """A plain image of one directory: no data blob, so that its only layer is one that clients can unpack, too."""
    layout = oci.Layout(images.work.path / "hollow")
    layout.add_image("hollow", [layout.add_members([(member("empty/"), b"")])], {"Cmd": ["/none"]})
    images.registry.push(layout.path, "hollow", "t/hollow", "oci")
    name = f"docker://{images.registry.address}/t/hollow"
    return Image(
        images.registry, "t/hollow", "plain", serve.convert(images.work, f"{name}:oci", f"{name}:plain", "--plain")
    )


def listing(puller: Puller, target: Path) -> list[str]:
    with puller.containerd.view(puller.top, target) as shown:
        return os.listdir(shown)


@pytest.mark.parametrize("path", [CRI[0]], ids=str)
@pytest.mark.parametrize("first", ["unpacked", "lazy"])
def test_a_layer_that_one_namespace_has_unpacked_and_another_reads_on_demand(
    puller: Puller, hollow: Image, tmp_path: Path, first: str
) -> None:
    """Its chain id is the same; what it stands for depends on who asked how."""
    bare = Puller(PullPath(DEBIAN, "ctr"), puller.station, "unpacking")
    for each in (bare, puller) if first == "unpacked" else (puller, bare):
        each.pull(hollow)
    assert puller.top == bare.top
    for _ in range(2):
        assert listing(bare, tmp_path) == ["image"], "the metadata as a tar has it"
        assert listing(puller, tmp_path) == ["empty"]
        bare.pull(hollow)
        puller.pull(hollow)
    bare.remove_images()
    assert listing(puller, tmp_path) == ["empty"]
