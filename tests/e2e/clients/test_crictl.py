"""What kubelet does with a pod, on every version."""

from typing import Any

import pytest

from tests.e2e.clients.paths import CRI, CRI_TRANSFER, Puller
from tests.e2e.conftest import Images
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.machine import until
from tests.harness.releases import DEBIAN

pytestmark = [pytest.mark.root, pytest.mark.real]


@pytest.mark.parametrize("path", [*CRI, CRI_TRANSFER], ids=str)
def test_a_pod_from_its_start_to_its_removal(puller: Puller, images: Images) -> None:
    crictl, image, pause = puller.station.crictl, images.sealed(), images.pause()
    reference = puller.pull(image)
    pod = crictl.run_pod("pod")
    script = "echo started; dd if=/dev/zero of=/written bs=1M count=2 2>/dev/null; exec sleep 1000"
    container = crictl.create(pod, "pod", "app", reference, ["/bin/sh", "-c", script])
    assert crictl.state(container) == "CONTAINER_CREATED"
    crictl("start", container)
    assert crictl.state(container) == "CONTAINER_RUNNING"
    assert crictl("exec", "-s", container, "sh", "-c", READ_ALL).rstrip() == expected().rstrip()
    until(lambda: crictl("logs", container) == "started\n", "its log")
    assert puller.containerd.content() == {
        digest for lazy in (image, pause) for digest in (lazy.digest, lazy.manifest["config"]["digest"])
    }

    def written() -> int:
        [shown] = crictl.json("stats", container)["stats"]
        return int(shown["writableLayer"]["usedBytes"]["value"])

    until(lambda: written() >= 2 << 20, "what it wrote is counted")
    guessed = puller.containerd.home / "root/io.containerd.snapshotter.v1.coco"
    place = guessed if puller.path.release is DEBIAN else puller.daemon.root  # 1.6 does not read the plugin's exports

    def filesystems() -> list[dict[str, Any]]:
        status = crictl.json("imagefsinfo")["status"]
        found: list[dict[str, Any]] = status.get("imageFilesystems", [status])
        return found

    assert [each["fsId"]["mountpoint"] for each in filesystems()] == [str(place)]
    counted = ("usedBytes", "inodesUsed")
    until(lambda: all(int(each[it]["value"]) > 0 for each in filesystems() for it in counted), "images take up space")
    crictl("stop", "--timeout", "0", container)
    assert crictl.state(container) == "CONTAINER_EXITED"
    crictl("rm", container)
    crictl("stopp", pod)
    crictl("rmp", pod)
    crictl("rmi", reference, pause.by_tag)
    assert crictl.json("images")["images"] == []
    puller.assert_empty()


@pytest.mark.parametrize("path", CRI, ids=str)
def test_an_image_is_listed_with_its_names_and_can_be_pulled_again(puller: Puller, images: Images) -> None:
    crictl, image = puller.station.crictl, images.sealed()
    for _ in range(2):
        crictl("pull", image.by_tag)
        puller.pull(image)
        [shown] = crictl.json("images")["images"]
        assert (shown["repoTags"], shown["repoDigests"]) == ([image.by_tag], [image.by_digest])
        assert puller.shell(image.by_tag, READ_ALL) == expected()
        crictl("rmi", image.by_digest)
        puller.assert_empty()
