"""Real EROFS mounts by one-shot children: both drivers, refusals, and what a child gets."""

import asyncio
import fcntl
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from snapshotter.config import Erofs, Size
from snapshotter.errors import FailedPrecondition, SnapshotterError, Unavailable
from snapshotter.mounts import drivers
from snapshotter.mounts.drivers import ErofsMounter
from snapshotter.mounts.mountinfo import is_mounted, mount_of, read_mounts
from tests.harness.machine import Work, alive, loops, until

pytestmark = pytest.mark.root

IMAGE = 7
DEVICES = 2


@pytest.fixture
def session(work: Work) -> Iterator[int]:
    """An O_PATH directory with an image of two devices, as blobd would serve it."""
    if shutil.which("mkfs.erofs") is None:
        pytest.skip("not installed: mkfs.erofs")
    source, files = work.directory("source"), work.directory("files")
    (source / "directory").mkdir()
    (source / "directory" / "small").write_text("small\n")
    (source / "large").write_bytes(os.urandom(3 << 20))
    blob, primary = files / f"{IMAGE}-1", files / f"{IMAGE}-0"
    subprocess.run(
        ["mkfs.erofs", "--chunksize=1048576", f"--blobdev={blob}", primary, source], check=True, capture_output=True
    )
    os.truncate(blob, -(-blob.stat().st_size // 4096) * 4096)
    fd = os.open(files, os.O_PATH | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
async def target(work: Work) -> AsyncIterator[Path]:
    path = work.directory("mnt")
    yield path
    for mount in read_mounts():
        if mount.point == str(path):
            await ErofsMounter(-1, Erofs()).unmount(path)


def test_mounts_of_others_may_have_any_name(work: Work) -> None:
    """Names that are no UTF-8, or hold what Python takes for the end of a line."""
    names = [b"\xff\xfe", "\x85\u2028\x0b\x1c".encode(), b"a b\tc\\d\ne", b" - "]
    places = [os.fsencode(work.path) + b"/" + name for name in names]
    for place in places:
        os.mkdir(place)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        assert {os.fsdecode(place) for place in places} <= {mount.point for mount in read_mounts()}
    finally:
        for place in places:
            subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("driver", ["auto", "file", "loop"])
async def test_mounted_image_has_its_content(work: Work, session: int, target: Path, driver: str) -> None:
    mounter = ErofsMounter(session, Erofs(driver=driver, read_ahead=Size(512 << 10)))  # type: ignore[arg-type]
    assert not mounter.is_mounted(target)
    others = file_backed()
    await mounter.mount(IMAGE, DEVICES, target)
    assert mounter.is_mounted(target)
    source = work.path / "source"
    assert (target / "large").read_bytes() == (source / "large").read_bytes()
    assert (target / "directory" / "small").read_text() == "small\n"
    mount = mount_of(target)
    assert mount.kind == "erofs"
    assert [read_ahead(name) for name in file_backed() - others or [mount.device]] == [512]
    await mounter.unmount(target)
    assert not mounter.is_mounted(target)
    until(lambda: not any(str(work.path) in file for file in loops().values()), "loop devices are gone", 10)


def read_ahead(bdi: str) -> int:
    return int(Path("/sys/class/bdi", bdi, "read_ahead_kb").read_text())


def file_backed() -> set[str]:
    return {name for name in os.listdir("/sys/class/bdi") if name.startswith("erofs-")}


async def test_mount_and_unmount_are_idempotent(session: int, target: Path) -> None:
    mounter = ErofsMounter(session, Erofs())
    for _ in range(2):
        await mounter.mount(IMAGE, DEVICES, target)
    assert [mount.point for mount in read_mounts()].count(str(target)) == 1
    for _ in range(2):
        await mounter.unmount(target)


async def test_mount_restricts_nothing_but_writing(session: int, target: Path) -> None:
    """A view of one layer is a bind mount of this directory: nosuid or nodev would reach the container."""
    mounter = ErofsMounter(session, Erofs())
    await mounter.mount(IMAGE, DEVICES, target)
    flags = os.statvfs(target).f_flag
    assert flags & os.ST_RDONLY
    assert not flags & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC)
    with pytest.raises(OSError, match="Read-only"):
        (target / "new").write_text("x")


async def test_unmount_of_a_used_image_says_busy(session: int, target: Path) -> None:
    mounter = ErofsMounter(session, Erofs())
    await mounter.mount(IMAGE, DEVICES, target)
    with (target / "large").open("rb"), pytest.raises(FailedPrecondition) as caught:
        await mounter.unmount(target)
    assert caught.value.reason == "busy"
    await mounter.unmount(target)


@pytest.mark.parametrize("way", ["overlay", "overlay with relative directories", "bind"])
async def test_image_below_another_mount_says_busy(work: Work, session: int, way: str) -> None:
    """The kernel would unmount it: the other mount has a reference of its own."""
    target, above = work.directory("snapshots/12/mnt"), work.directory("above")
    mounter = ErofsMounter(session, Erofs())
    await mounter.mount(IMAGE, DEVICES, target)
    work.directory("snapshots/13/fs")
    command = {
        "overlay": ["mount", "-t", "overlay", "-o", f"lowerdir={work.path}/snapshots/13/fs:{target}", "none"],
        "overlay with relative directories": ["mount", "-t", "overlay", "-o", "lowerdir=12/mnt:13/fs", "none"],
        "bind": ["mount", "--bind", str(target)],
    }
    await asyncio.to_thread(subprocess.run, [*command[way], above], check=True, cwd=work.path / "snapshots")
    with pytest.raises(FailedPrecondition, match=str(above)) as caught:
        await mounter.unmount(target)
    assert caught.value.reason == "busy"
    await asyncio.to_thread(subprocess.run, ["umount", above], check=True)
    await mounter.unmount(target)
    assert not mounter.is_mounted(target)


async def test_discarded_mount_makes_room_while_it_is_used(work: Work, session: int, target: Path) -> None:
    mounter = ErofsMounter(session, Erofs())
    await mounter.mount(IMAGE, DEVICES, target)
    with (target / "directory" / "small").open() as file:
        await mounter.discard(target)
        assert not mounter.is_mounted(target)
        assert file.read() == "small\n"


async def test_stacked_mounts_are_all_removed(session: int, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orphaned child of a killed daemon and its successor may both have mounted."""
    mounter = ErofsMounter(session, Erofs())
    await mounter.mount(IMAGE, DEVICES, target)
    monkeypatch.setattr(drivers, "is_mounted", lambda _: False)
    await mounter.mount(IMAGE, DEVICES, target)
    monkeypatch.undo()
    await mounter.unmount(target)
    assert not mounter.is_mounted(target)


@pytest.mark.parametrize("driver", ["file", "loop"])
async def test_absent_image_is_an_error_that_names_it(work: Work, session: int, target: Path, driver: str) -> None:
    with pytest.raises(SnapshotterError, match=r"image 8 on .*No such file") as caught:
        await ErofsMounter(session, Erofs(driver=driver)).mount(8, 1, target)  # type: ignore[arg-type]
    assert caught.value.reason == "mount"
    assert not any(str(work.path) in file for file in loops().values())


async def test_garbage_image_is_refused_by_every_way(work: Work, session: int, target: Path) -> None:
    (work.path / "files" / "9-0").write_bytes(b"\xe2" * 8192)
    with pytest.raises(SnapshotterError, match=r"file: .*loop: "):
        await ErofsMounter(session, Erofs()).mount(9, 1, target)


async def test_primary_that_cannot_be_mounted_as_a_file_goes_through_a_loop_device(
    work: Work, session: int, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """tmpfs has no read_folio, which the kernel reports as ENOTBLK: so does one without file-backed mounts."""
    memory = Path("/dev/shm", work.path.name)
    shutil.copytree(work.path / "files", memory)
    fd = os.open(memory, os.O_PATH | os.O_CLOEXEC)
    try:
        mounter = ErofsMounter(fd, Erofs())
        caplog.set_level("INFO")
        await mounter.mount(IMAGE, DEVICES, target)
        assert caplog.records[-1].driver == "loop"  # type: ignore[attr-defined]
        assert (target / "directory" / "small").read_text() == "small\n"
        await mounter.unmount(target)
    finally:
        os.close(fd)
        shutil.rmtree(memory)


async def test_child_inherits_the_session_and_nothing_else(
    work: Work, session: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = work.path / "oneshot.py"
    spy.write_text(
        "import json, os\nprint(json.dumps({'error': repr((sorted(map(int, os.listdir('/proc/self/fd')))))}))\n"
    )
    monkeypatch.setattr(drivers, "_ONESHOT", spy)
    lock = os.open(work.path / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.set_inheritable(lock, True)
    with pytest.raises(SnapshotterError) as caught:
        await ErofsMounter(session, Erofs()).mount(IMAGE, DEVICES, target)
    os.close(lock)
    fds = str(caught.value).partition("[")[2].partition("]")[0]
    listing = 3 if session != 3 else 4  # the descriptor of listdir itself
    assert sorted(map(int, fds.split(","))) == sorted([0, 1, 2, listing, session])


@pytest.mark.allow_warnings
async def test_stuck_child_does_not_block_its_caller(
    work: Work, session: int, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = work.path / "oneshot.py"
    stuck.write_text("import signal; signal.pause()")
    monkeypatch.setattr(drivers, "_ONESHOT", stuck)
    mounter = ErofsMounter(session, Erofs(), child_seconds=0.2)
    with pytest.raises(Unavailable) as caught:
        await mounter.mount(IMAGE, DEVICES, target)
    assert caught.value.reason == "mount-stuck"
    pid: int = caplog.records[-1].pid  # type: ignore[attr-defined]
    await asyncio.to_thread(until, lambda: not alive(pid), "the child is gone", 10)


async def test_child_that_dies_is_an_error(
    work: Work, session: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = work.path / "oneshot.py"
    dying.write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(drivers, "_ONESHOT", dying)
    with pytest.raises(SnapshotterError, match="status -9"):
        await ErofsMounter(session, Erofs()).mount(IMAGE, DEVICES, target)


def test_whether_something_is_mounted_is_known_without_reading_all_mounts(work: Work) -> None:
    plain, odd = work.directory("plain"), work.directory("with a space")
    subprocess.run(["mount", "-t", "tmpfs", "none", odd], check=True)
    try:
        assert is_mounted(str(odd))
        assert not is_mounted(str(plain))
        assert not is_mounted(str(odd.parent))
        assert all(is_mounted(mount.point) for mount in read_mounts() if mount.point == "/" or mount.point == str(odd))
    finally:
        subprocess.run(["umount", odd], check=True)
