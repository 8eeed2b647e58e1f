"""Measuring and destroying directory trees that containers made, and giving new ones their attributes."""

import os
from pathlib import Path

import pytest

from snapshotter.snapshots.directories import Directories, RootAttributes, destroy, measure
from snapshotter.snapshots.model import Kind, Mount, Usage
from snapshotter.snapshots.overlay import mounts, options


@pytest.fixture
def made(tmp_path: Path) -> Directories:
    return Directories(tmp_path)


def test_modes_do_not_depend_on_the_umask(made: Directories) -> None:
    for umask in (0, 0o077):
        before = os.umask(umask)
        try:
            path = made.make("active", RootAttributes())
        finally:
            os.umask(before)
        assert [path.joinpath(name).stat().st_mode & 0o7777 for name in ("", "fs", "work")] == [0o700, 0o755, 0o711]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_root_directory_keeps_owner_and_special_bits(made: Directories) -> None:
    path = made.place(made.make("view", RootAttributes(0o3770, 12, 34)), 7)
    assert path == made.path(7)
    assert made.attributes(7) == RootAttributes(0o3770, 12, 34)
    assert not made.work(7).exists()


def test_usage_counts_blocks_once_and_follows_nothing(tmp_path: Path) -> None:
    top, outside = tmp_path / "top", tmp_path / "outside"
    (top / "a" / "b").mkdir(parents=True)
    outside.mkdir()
    (outside / "big").write_bytes(bytes(1 << 20))
    empty = measure(top)
    assert empty.inodes == 3
    (top / "file").write_bytes(b"x" * 100_000)
    one = measure(top)
    assert one == Usage(empty.size + (top / "file").stat().st_blocks * 512, 4)
    os.link(top / "file", top / "a" / "again")
    os.symlink("../../../outside", top / "a" / "b" / "link")
    assert measure(top) == Usage(one.size, 5)
    with (top / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert measure(top) == Usage(one.size, 6)


def test_very_deep_trees_are_measured_and_destroyed(tmp_path: Path) -> None:
    """Deeper than a path can be long, than Python recurses and than there are descriptors."""
    top = tmp_path / "top"
    top.mkdir()
    directory = os.open(top, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=directory)
        os.symlink("/", "link", dir_fd=directory)
        below = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    assert measure(top).inodes > 900
    destroy(top)
    assert list(tmp_path.iterdir()) == []


def test_wide_trees_are_destroyed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "x").mkdir(parents=True)
    for name in range(5000):
        (top / "x" / str(name)).touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    os.symlink(outside, top / "x" / "link")
    destroy(top)
    assert list(tmp_path.iterdir()) == [outside]


def test_retired_directories_have_names_of_their_own(made: Directories) -> None:
    for _ in range(2):
        made.place(made.make("remote", RootAttributes()), 5)
        assert made.retire("5").name.startswith("old-5-")
    assert len(made.names()) == 2


def test_mount_shapes(made: Directories) -> None:
    a, b = Path("/a"), Path("/b")
    fs, work = str(made.files(1)), f"workdir={made.work(1)}"
    cases = {
        (Kind.ACTIVE, ()): Mount("bind", fs, ("rw", "rbind")),
        (Kind.VIEW, ()): Mount("bind", fs, ("ro", "rbind")),
        (Kind.VIEW, (a,)): Mount("bind", "/a", ("ro", "rbind")),
        (Kind.VIEW, (a, b)): Mount("overlay", "overlay", ("x", "lowerdir=/a:/b")),
        (Kind.ACTIVE, (a,)): Mount("overlay", "overlay", ("x", work, f"upperdir={fs}", "lowerdir=/a")),
    }
    for (kind, lower), expected in cases.items():
        assert mounts(made, 1, kind, lower, ("x",)) == (expected,)


def test_overlay_options_follow_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/uid_map").write_text("         0          0 4294967295\n")
    assert options(tmp_path / "index", tmp_path) == ()
    (tmp_path / "index").write_text("Y")
    (tmp_path / "self/uid_map").write_text("         0     100000      65536\n")
    assert options(tmp_path / "index", tmp_path) == ("index=off", "userxattr")
