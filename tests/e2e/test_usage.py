"""What clients are told about sizes: of snapshots, and of the file system inside a container."""

import os
from pathlib import Path

import pytest

from tests.e2e.conftest import Images, NodeMaker

pytestmark = [pytest.mark.root, pytest.mark.real]

FREE = "set -- $(busybox df -k / | busybox tail -n 1); echo $2 $4"  # blocks of the file system, and those left


@pytest.mark.parametrize("mode", ["open", "confidential"])
def test_no_snapshot_is_nothing_and_no_file_system_is_empty(
    node: NodeMaker, images: Images, tmp_path: Path, mode: str
) -> None:
    guest = node(mode=mode)  # confidential: all state is on a tmpfs, which gives directories no blocks
    image = images.sealed()
    reference = guest.pull(image)
    written = "busybox dd if=/dev/zero of=/written bs=1k count=2000 2>/dev/null"
    container = guest.containerd.start(reference, "/bin/sh", "-c", f"{written}; echo done; exec sleep 1000")
    try:
        assert container.stdout.readline() == "done\n"
        _, *rows = guest.containerd.ctr("snapshots", "--snapshotter", "coco", "usage").splitlines()
        sizes = {key: (float(size), unit, int(inodes)) for key, size, unit, inodes in map(str.split, rows)}
    finally:
        container.kill()
    assert len(sizes) == len(image.layers) + 1
    assert all(size > 0 and inodes > 0 for size, _, inodes in sizes.values()), sizes
    assert [unit for key, (_, unit, _) in sizes.items() if not key.startswith("sha256:")] == ["MiB"], sizes
    total, left = map(int, guest.shell(reference, FREE).split())
    disk = os.statvfs(guest.daemon.root)
    assert total == disk.f_blocks * disk.f_frsize // 1024, "a container sees what its own files can take up"
    assert left > 0
    read_only = guest.containerd.run(reference, "/bin/sh", "-c", FREE, options=["--read-only"])
    assert read_only.stdout.split()[0] == str(total)
    [top] = [key for key, (_, _, inodes) in sizes.items() if key.startswith("sha256:") and inodes == 3]
    with guest.containerd.view(top, tmp_path) as target:
        shown = os.statvfs(target)
        assert (shown.f_blocks > 0, shown.f_bfree) == (True, 0), "the image alone: full, and of the size of its files"
