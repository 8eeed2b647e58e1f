"""Keeper and blobd lost at the same instant: the one loss. What is left must fail cleanly, what comes must work."""

import os
import signal

import pytest

from tests.e2e.conftest import Images, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.machine import alive, until

pytestmark = [pytest.mark.root, pytest.mark.real]


def test_new_containers_run_after_the_session_was_lost(node: NodeMaker, images: Images) -> None:
    guest = node()
    reference = guest.pull(images.sealed())
    container = guest.containerd.start(reference, "/bin/sleep", "1000")
    container.wait_running()
    try:
        pids = guest.daemon.pids()
        for worker in ("keeper", "blobd"):
            os.kill(pids[worker], signal.SIGKILL)
            until(lambda pid=pids[worker]: not alive(pid), "killed", 10)  # type: ignore[misc]
        old = guest.daemon.images_mounted()
        guest.daemon.start()
        guest.containerd.wait_connected()
        assert guest.daemon.pids()["snapshotd"] != pids["snapshotd"]
        until(lambda: not guest.daemon.images_mounted(), "the dead mount is off its path", 10)
        assert guest.shell(reference, READ_ALL) == expected()
        assert guest.daemon.images_mounted() == old
        assert container.exec("/bin/sh", "-c", READ_ALL).stdout != expected(), "the old container cannot be helped"
    finally:
        container.kill()
