"""After `materialize` nerdctl has nothing left to fetch, on containerd 1.7 and 2.4."""

import json

import pytest

from tests.e2e.clients.paths import NERDCTL_NYDUS, Puller
from tests.e2e.conftest import Images
from tests.harness.serve import program

pytestmark = [pytest.mark.root, pytest.mark.real]


@pytest.mark.parametrize("path", NERDCTL_NYDUS, ids=str)
def test_nerdctl_saves_commits_and_pushes_what_is_there(puller: Puller, images: Images) -> None:
    nerdctl, image = puller.nerdctl, images.sealed()
    reference = puller.pull(image)
    result = program(
        puller.station.daemon._work, "materialize", reference, "--json", "--config", puller.daemon.config,
        "--containerd", puller.containerd.layout.socket, "--namespace", puller.namespace,
    )  # fmt: skip
    assert json.loads(result.stdout)["fetched"] == len(image.layers), result.stderr
    mark = images.registry.mark()
    archive = puller.containerd.home / f"{puller.namespace}.tar"
    nerdctl("save", "-o", str(archive), reference)
    assert archive.stat().st_size > sum(layer["size"] for layer in image.manifest["layers"])
    archive.unlink()
    nerdctl("run", "-d", "--net", "none", "--pull", "never", "--name", "changing", reference, "sleep", "1000")
    committed = f"{images.registry.address}/t/committed-{puller.namespace}:1"
    nerdctl("commit", "changing", committed)
    nerdctl("rm", "-f", "changing")
    nerdctl("push", committed)
    fetched = [request for request in images.registry.since(mark).of(set(image.layers)) if request.method == "GET"]
    assert not [request for request in fetched if not request.agent.startswith("coco-snapshotter")]
