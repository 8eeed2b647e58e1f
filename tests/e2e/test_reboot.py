"""After a reboot: our root was in memory and is gone, containerd's records are still there."""

import os
import shutil

import pytest

from tests.e2e.conftest import Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.machine import until

pytestmark = [pytest.mark.root, pytest.mark.real]


def reboot(guest: Node, *, cache_survives: bool) -> None:
    """Everything ends; what lies in memory is gone."""
    guest.containerd.process.stop()
    guest.daemon.stop()
    for directory in (guest.daemon.root, guest.containerd.home / "state"):
        shutil.rmtree(directory, onerror=lambda *_: None)  # a tmpfs stays, without content
        assert not directory.exists() or not os.listdir(directory)
    if not cache_survives:
        shutil.rmtree(guest.daemon.cache)
    guest.daemon.start()
    guest.containerd.start_daemon()


@pytest.mark.parametrize(("mode", "cache_survives"), [("open", False), ("confidential", True)])
def test_images_are_served_again(node: NodeMaker, images: Images, mode: str, cache_survives: bool) -> None:
    guest = node(mode=mode)
    image = images.sealed()
    reference = guest.pull(image)
    assert guest.shell(reference, READ_ALL) == expected()
    named = ("--snapshotter", "coco")
    guest.containerd.ctr("containers", "create", *named, reference, "before", "/bin/cat", "/data/small")
    mark = images.registry.mark()
    reboot(guest, cache_survives=cache_survives)
    assert guest.daemon.status()["images"] == []
    rows = guest.containerd.ctr("snapshots", *named, "usage", "-b").splitlines()[1:]
    assert len(rows) == len(image.layers)
    assert all(int(row.split()[-2]) > 0 for row in rows), "CRI asks once and keeps the answer"

    assert guest.shell(reference, READ_ALL) == expected(), "at once"
    assert guest.pull(image) == reference, "and after an ordinary pull"
    assert guest.shell(reference, READ_ALL) == expected()
    asked = images.registry.since(mark)
    assert not asked.by("containerd").of(set(image.layers)), "which downloads no layer"
    if cache_survives:
        assert not asked.by("coco-snapshotter").of({image.digest, image.layers[-1]}), "nor needs we to"

    started = guest.containerd.try_ctr("tasks", "start", "--detach", "before")
    assert started.returncode != 0, "what the old container wrote is lost"
    assert "before" not in guest.containerd.ctr("tasks", "ls")
    guest.containerd.ctr("containers", "rm", "before")
    guest.containerd.remove_image(reference)
    guest.containerd.wait_for_no_snapshots()
    until(guest.is_empty, "nothing is mounted or attached", 30)
    assert guest.shell(guest.pull(image), READ_ALL) == expected(), "from the beginning"


def test_an_image_that_may_not_run_any_more_is_refused(node: NodeMaker, images: Images) -> None:
    guest = node(mode="confidential")
    reference = guest.pull(images.sealed())
    pin = f"{images.registry.address}/{images.repository}@{images.sealed(2).digest}"
    with guest.daemon.config.open("a") as config:
        config.write(f'\n[policy]\npins = ["{pin}"]\n')
    reboot(guest, cache_survives=True)
    result = guest.containerd.run(reference, "/bin/cat", "/data/small")
    assert result.returncode != 0
    assert "reason=unauthentic-image" in result.stderr
    assert guest.daemon.status()["images"] == []


def test_an_unpacked_image_that_is_lost_is_an_error(node: NodeMaker, images: Images) -> None:
    """Its files were in our root. containerd would not download them again unless the image is removed."""
    guest = node(mode="open")
    image = images.ordinary()
    reference = guest.pull(image)
    assert guest.shell(reference, READ_ALL) == expected()
    reboot(guest, cache_survives=True)
    result = guest.containerd.run(reference, "/bin/cat", "/data/small")
    assert result.returncode != 0
    assert "does not exist" in result.stderr
    guest.containerd.remove_image(reference)
    guest.containerd.wait_for_no_snapshots()
    assert guest.shell(guest.pull(image), READ_ALL) == expected()
