"""Containers whose ids the host maps: containerd 2 has the kernel map the image's, 1.7 copies it with other owners."""

import re
from pathlib import Path

import pytest

from tests.e2e.clients.paths import CRI, CTR_TRANSFER, Puller
from tests.e2e.conftest import Image, Images
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.containerd import Container

pytestmark = [pytest.mark.root, pytest.mark.real]

MAPPED = ("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536", "--remap-labels")
OWNERS = "stat -c '%u:%g %n' / /bin/busybox /data/small"
WRITE = "echo more >>/data/small; cat /data/small; rm /data/text; mkdir /new; chown 5:6 /new; stat -c '%u:%g %n' /new"
SEEN = "0:0 /\n0:0 /bin/busybox\n0:0 /data/small\nsmall 1\nmore\n5:6 /new\n"


@pytest.fixture
def puller(puller: Puller) -> Puller:
    """A container's root, who is nobody on the host, must get to its files."""
    for directory in (puller.containerd.home.parent, puller.containerd.home):
        directory.chmod(0o711)
    return puller


def outside(puller: Puller, container: Container, path: str) -> tuple[int, int]:
    """Who owns a file of a container, as the host sees it."""
    found = re.search(rf"^{container.identity}\s+(\d+)", puller.containerd.ctr("tasks", "ls"), re.MULTILINE)
    assert found
    status = Path(f"/proc/{found[1]}/root{path}").stat()
    return status.st_uid, status.st_gid


@pytest.mark.parametrize(
    ("path", "kind"), [(CTR_TRANSFER, "sealed"), (CTR_TRANSFER, "ordinary"), (CRI[1], "sealed")], ids=str
)
def test_a_container_in_a_user_namespace(puller: Puller, images: Images, kind: str) -> None:
    image: Image = getattr(images, kind)()
    reference = puller.pull(image)
    # It comes first and stays: containerd takes the mapped clone away after its last user, also from under the next.
    container = puller.containerd.start(reference, "/bin/sleep", "1000", options=MAPPED)
    try:
        container.wait_running()
        for path in ("/", "/bin/busybox", "/data/small"):
            assert outside(puller, container, path) == (100000, 200000), path
        assert puller.shell(reference, f"{READ_ALL}; {OWNERS}; {WRITE}", *MAPPED) == expected() + SEEN
        assert puller.shell(reference, READ_ALL) == expected(), "and one in none"
    finally:
        container.kill()


@pytest.mark.parametrize("path", [CTR_TRANSFER], ids=str)
def test_sigterm_leaves_a_mapped_container_its_files(puller: Puller, images: Images) -> None:
    """Its mount names a clone of the image's, which containerd has made and taken away again."""
    image = images.sealed()
    reference = puller.pull(image)
    container = puller.containerd.start(reference, "/bin/sleep", "1000", options=MAPPED)
    container.wait_running()
    try:
        kinds = [kind for _, kind in puller.containerd.snapshots().values()]
        assert kinds.count("Committed") == len(image.layers), "no copy was made to give files another owner"
        assert puller.daemon.terminate() == 0
        try:
            assert len(puller.daemon.images_mounted()) == 1
            assert container.exec("/bin/sh", "-c", READ_ALL).stdout == expected()
        finally:
            puller.daemon.start()
            puller.containerd.wait_connected()
        assert container.exec("/bin/md5sum", "/bin/busybox").returncode == 0
    finally:
        container.kill()


@pytest.mark.parametrize("path", [CRI[0], CTR_TRANSFER], ids=str)
def test_without_labels_the_client_changes_the_owners_of_a_copy(puller: Puller, images: Images) -> None:
    reference = puller.pull(images.sealed())
    maps = MAPPED[:-1]
    assert puller.shell(reference, f"{READ_ALL}; {OWNERS}; {WRITE}", *maps) == expected() + SEEN
