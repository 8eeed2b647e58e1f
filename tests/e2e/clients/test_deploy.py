"""The files that operators merge into containerd's configuration make its pulls lazy, in every version they are for."""

from dataclasses import replace
from pathlib import Path

import pytest

from snapshotter import config
from tests.e2e.clients.paths import CRI, CTR_TRANSFER, PullPath
from tests.e2e.conftest import Images
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.containerd import Containerd
from tests.harness.crictl import Crictl
from tests.harness.machine import Work
from tests.harness.releases import Layout
from tests.harness.serve import Serve

pytestmark = [pytest.mark.root, pytest.mark.real]

DEPLOY = Path(__file__).parents[3] / "deploy/containerd"
DEFAULTS = config.Config()


def deployed(name: str, layout: Layout) -> str:
    """The file as it is, with the places of this test."""
    text = (DEPLOY / name).read_text()
    [version] = [line for line in text.splitlines() if line.startswith("version =")]
    places = {DEFAULTS.address: str(layout.plugins["coco"]), DEFAULTS.root: layout.exports["root"], version: ""}
    for old, new in places.items():
        assert old in text
        text = text.replace(old, new)
    return (
        f'{version}\n{layout.places()}[plugins."io.containerd.internal.v1.opt"]\n  path = "{layout.home}/opt"\n{text}'
    )


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("containerd-1.toml", CRI[0]),
        ("containerd-1.toml", CRI[1]),
        ("containerd-1.toml", CRI[2]),
        ("containerd-2.toml", CRI[2]),
        ("containerd-2.toml", CTR_TRANSFER),
    ],
    ids=str,
)
def test_pulls_are_lazy(work: Work, images: Images, name: str, path: PullPath) -> None:
    if path.missing:
        pytest.skip(path.missing)
    image = images.sealed()
    daemon = Serve(work, "coco", {"keys": {"files": [str(images.key)]}})
    release = replace(path.release, config=lambda layout: deployed(name, layout))
    exports = {"root": str(daemon.root)}
    containerd = Containerd(work, "containerd", plugins={"coco": daemon.address}, release=release, exports=exports)
    if path.client == "crictl":
        Crictl(containerd)("pull", image.by_digest)
    else:
        containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "coco", image.by_digest)
    assert containerd.content() == {image.digest, image.manifest["config"]["digest"]}
    result = containerd.run(image.by_digest, "/bin/sh", "-ec", READ_ALL)
    assert result.stdout == expected(), result.stderr
