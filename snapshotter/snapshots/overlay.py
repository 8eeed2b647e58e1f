"""Mount shapes: what a client must mount to see a snapshot. Those of containerd's own overlay snapshotter.

| snapshot | mounts |
|---|---|
| active without lower directories | bind of its files, rw |
| view without | bind of its files, ro |
| view with exactly one | bind of that one, ro |
| view with more | overlay of lower directories only |
| active with one or more | overlay with upper and work directory |
"""

from collections.abc import Sequence
from pathlib import Path

from snapshotter.snapshots.directories import Directories
from snapshotter.snapshots.model import Kind, Mount

_ALL_IDS = ["0", "0", "4294967295"]


def options(index: Path = Path("/sys/module/overlay/parameters/index"), proc: Path = Path("/proc")) -> tuple[str, ...]:
    """Options for every overlay on this kernel.

    No index, because overlays share lower directories; user xattrs where a user namespace allows no others.
    """
    without_index = ("index=off",) if index.exists() else ()
    userxattr = ("userxattr",) if (proc / "self/uid_map").read_text().split() != _ALL_IDS else ()
    return without_index + userxattr


def mounts(
    directories: Directories,
    number: int,
    kind: Kind,
    lower: Sequence[Path],
    extra: Sequence[str],
    mapping: Sequence[str] = (),
) -> tuple[Mount, ...]:
    """For the active snapshot or view `number` on `lower` (top first); `extra` as from `options`.

    `mapping` goes into every mount: the client takes it out again and has the kernel map ids.
    """
    files = str(directories.files(number))
    stack = "lowerdir=" + ":".join(map(str, lower))
    if kind is Kind.ACTIVE:
        if not lower:
            return (Mount("bind", files, (*mapping, "rw", "rbind")),)
        upper = f"upperdir={files}"
        work = f"workdir={directories.work(number)}"
        return (Mount("overlay", "overlay", (*mapping, *extra, work, upper, stack)),)
    if len(lower) > 1:
        return (Mount("overlay", "overlay", (*mapping, *extra, stack)),)
    return (Mount("bind", str(lower[0]) if lower else files, (*mapping, "ro", "rbind")),)
