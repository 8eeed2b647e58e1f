"""Mounting what the service returns, changing what is inside, and comparing directory trees."""

import ctypes
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from snapshotter.snapshots.model import Mount
from tests.harness.machine import unmount, until

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC = 1, 32, 4096, 16384
_PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)

Change = Callable[[Path], None]


def _mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    arguments = (os.fsencode(source), os.fsencode(target), kind.encode(), flags, options.encode() or None)
    if _libc.mount(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"mount: {os.strerror(number)}", str(target))


def _mount_overlay(mount: Mount, target: Path) -> None:
    """Long option strings are made shorter by standing in a common directory, as containerd does."""
    options = ",".join(mount.options)
    if len(options) < _PAGE - 512:
        return _mount(mount.source, target, "overlay", 0, options)
    directory = os.path.dirname(next(o for o in mount.options if o.startswith("lowerdir=")).rpartition(":")[2])
    common = os.path.dirname(directory)
    before = os.getcwd()
    os.chdir(common)
    try:
        return _mount(mount.source, target, "overlay", 0, options.replace(f"{common}/", ""))
    finally:
        os.chdir(before)


@contextmanager
def mounted(mounts: Sequence[Mount], directory: Path) -> Iterator[Path]:
    """Mount on a new directory below `directory`."""
    target = Path(tempfile.mkdtemp(prefix="mount-", dir=directory))
    target.chmod(0o755)
    count = 0
    try:
        for mount in mounts:
            if mount.kind == "overlay":
                _mount_overlay(mount, target)
            else:
                assert mount.kind == "bind", mount
                _mount(mount.source, target, "", MS_BIND | MS_REC, "")
                if "ro" in mount.options:
                    _mount("", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY, "")
            count += 1
        yield target
    finally:
        for _ in range(count):  # somebody else on this machine may look into it at this moment
            until(lambda: unmount(str(target)), f"{target} is unmounted", 10)
        target.rmdir()


def content(top: Path) -> dict[str, object]:
    """Everything that a comparison of two trees looks at, by path. Hard links are compared as groups."""
    found: dict[str, object] = {}
    groups: dict[int, str] = {}
    for directory, names, files in os.walk(top):
        names.sort()
        for name in sorted([*names, *files]):
            path = Path(directory, name)
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            body: object = None
            if kind == stat.S_IFREG:
                body = path.read_bytes()
            elif kind == stat.S_IFLNK:
                body = os.readlink(path)
            relative = str(path.relative_to(top))
            link = groups.setdefault(status.st_ino, relative) if kind == stat.S_IFREG else None
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            found[relative] = (oct(status.st_mode), status.st_uid, status.st_gid, body, link, xattrs)
    return found


# changes


def create(path: str, text: str, mode: int) -> Change:
    def change(top: Path) -> None:
        file = top / path.lstrip("/")
        file.write_text(text)
        file.chmod(mode)

    return change


def directory(path: str, mode: int) -> Change:
    def change(top: Path) -> None:
        new = top / path.lstrip("/")
        new.mkdir()
        new.chmod(mode)

    return change


def delete(path: str) -> Change:
    def change(top: Path) -> None:
        old = top / path.lstrip("/")
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()

    return change


def own(path: str, uid: int, gid: int) -> Change:
    return lambda top: os.chown(top / path.lstrip("/"), uid, gid)


def link(old: str, new: str) -> Change:
    return lambda top: os.link(top / old.lstrip("/"), top / new.lstrip("/"))


def symlink(target: str, new: str) -> Change:
    return lambda top: os.symlink(target, top / new.lstrip("/"))


def rename(old: str, new: str) -> Change:
    return lambda top: os.rename(top / old.lstrip("/"), top / new.lstrip("/"))


def xattr(path: str, key: str, value: bytes) -> Change:
    return lambda top: os.setxattr(top / path.lstrip("/"), key, value)
