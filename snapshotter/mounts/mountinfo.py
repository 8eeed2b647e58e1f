"""/proc/self/mountinfo, parsed (proc_pid_mountinfo(5)). Unlike stat, reading it never blocks on a file system."""

import os
import re
from pathlib import Path
from typing import NamedTuple

_ESCAPE = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One mount; `device` is "MAJ:MIN", `options` are those of the super block (overlay: lowerdir= and so on)."""

    id: int
    device: str
    root: str
    point: str
    kind: str
    source: str
    options: str


def read_mounts(text: str | None = None) -> list[Mount]:
    """All mounts of this process's namespace, in kernel order."""
    mounts = []
    for line in (_read() if text is None else text).split("\n")[:-1]:  # names may hold what else ends a line
        left, _, right = line.partition(" - ")
        number, _, device, root, point = left.split(" ")[:5]
        kind, source, options = [*right.split(" "), "", ""][:3]
        mounts.append(Mount(int(number), device, _plain(root), _plain(point), kind, _plain(source), _plain(options)))
    return mounts


def is_mounted(point: str) -> bool:
    """Whether something is mounted there; on a node with many mounts far cheaper than reading them all."""
    written = re.sub(r"[ \t\n\\]", lambda match: f"\\{ord(match[0]):03o}", point)
    lines = (f"{line}\n" for line in _read().split("\n") if written in line)
    return any(mount.point == point for mount in read_mounts("".join(lines)))


def mount_of(path: Path) -> Mount:
    """The mount that `path` lies on. Not for paths inside our own EROFS mounts."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    number = int(re.search(r"^mnt_id:\s*(\d+)$", info, re.MULTILINE)[1])  # type: ignore[index]  # always there
    return next(mount for mount in read_mounts() if mount.id == number)


def _read() -> str:
    """As file names are decoded: others mount what they like, wherever they like."""
    return Path("/proc/self/mountinfo").read_text(errors="surrogateescape")


def _plain(text: str) -> str:
    """Undo the octal escapes of space, tab, newline and backslash."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
