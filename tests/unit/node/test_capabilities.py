"""Which way to mount is tried on which kernel, and how mountinfo is read."""

import pytest

from snapshotter.mounts.capabilities import Attempt, attempts, directio_is_safe, kernel_version
from snapshotter.mounts.drivers import used_by
from snapshotter.mounts.mountinfo import Mount, read_mounts


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.18.44-fc-v669", (6, 18, 44)),
        ("6.1.0-50-cloud-amd64", (6, 1, 0)),
        ("6.12", (6, 12, 0)),
        ("7.0-rc1", (7, 0, 0)),
        ("unknown", (0, 0, 0)),
    ],
)
def test_kernel_version(release: str, version: tuple[int, int, int]) -> None:
    assert kernel_version(release) == version


@pytest.mark.parametrize("version", [(6, 12, 0), (6, 12, 71), (6, 13, 0), (6, 17, 9), (6, 18, 10), (6, 19, 0)])
def test_directio_is_not_used_on_kernels_where_it_frees_memory_in_use(version: tuple[int, int, int]) -> None:
    assert not directio_is_safe(version)
    assert Attempt("file", True) not in attempts("auto", version)


@pytest.mark.parametrize("version", [(6, 12, 72), (6, 18, 11), (6, 19, 1), (7, 1, 0)])
def test_directio_is_preferred_where_it_is_safe(version: tuple[int, int, int]) -> None:
    assert attempts("auto", version)[0] == Attempt("file", True)


def test_configured_driver_is_the_only_one_tried() -> None:
    assert {attempt.driver for attempt in attempts("loop", (6, 18, 44))} == {"loop"}
    assert {attempt.driver for attempt in attempts("file", (6, 1, 0))} == {"file"}


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ("rw,lowerdir=/r/snapshots/13/fs:/r/snapshots/12/mnt,upperdir=/u,workdir=/w", True),
        ("rw,lowerdir=13/fs:12/mnt,upperdir=/u", True),
        ("rw,lowerdir=snapshots/13/fs:snapshots/12/mnt,upperdir=/u", True),
        ("rw,lowerdir=/other/root/snapshots/12/mnt,upperdir=/u", False),
        ("rw,lowerdir+=/r/snapshots/12/mnt,lowerdir+=/x", True),
        ("rw,lowerdir=/r/snapshots/112/mnt:/r/snapshots/12/mnt2:/r/snapshots/12/mnt/sub", False),
    ],
)
def test_image_is_used_by_an_overlay_that_names_it(options: str, used: bool) -> None:
    mounts = [
        Mount(1, "0:39", "/", "/r/snapshots/12/mnt", "erofs", "x", "ro"),
        Mount(2, "0:40", "/", "/run/rootfs", "overlay", "overlay", options),
    ]
    assert used_by("/r/snapshots/12/mnt", mounts) == ("/run/rootfs" if used else "")


def test_mountinfo_escapes_and_optional_fields() -> None:
    text = (
        "42 27 0:39 / /a\\040b\\134c ro,relatime shared:5 master:1 - erofs /proc/self/fd/6/7-0 ro,directio\n"
        "43 27 0:40 /sub /d rw - tmpfs tmpfs rw\n"
    )
    assert read_mounts(text) == [
        Mount(42, "0:39", "/", "/a b\\c", "erofs", "/proc/self/fd/6/7-0", "ro,directio"),
        Mount(43, "0:40", "/sub", "/d", "tmpfs", "tmpfs", "rw"),
    ]
