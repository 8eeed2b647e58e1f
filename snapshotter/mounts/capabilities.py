"""What this kernel can do for EROFS mounts: which drivers to try, in which order."""

import os
import re
from typing import Literal, NamedTuple

Version = tuple[int, int, int]

# `directio` frees memory in use: CVE-2026-23224, fixed by 1caf50ce4af0. First and last bad release of each series.
_DIRECTIO_BROKEN: tuple[tuple[Version, Version], ...] = (
    ((6, 12, 0), (6, 12, 71)),
    ((6, 13, 0), (6, 18, 10)),
    ((6, 19, 0), (6, 19, 0)),
)


class Attempt(NamedTuple):
    """One way to mount: EROFS on files, or on loop devices over these; past the backing file's page cache or not."""

    driver: Literal["file", "loop"]
    directio: bool


def kernel_version(release: str | None = None) -> Version:
    """Version of `uname -r` text such as "6.18.44-cloud"; of the running kernel by default. (0, 0, 0) if unreadable.

    Distributions that hide the stable release (Debian's "6.1.0-50") look older than they are, which is the safe side.
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release or os.uname().release)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (0, 0, 0)


def directio_is_safe(version: Version) -> bool:
    return not any(first <= version <= last for first, last in _DIRECTIO_BROKEN)


def attempts(driver: Literal["auto", "file", "loop"], version: Version) -> tuple[Attempt, ...]:
    """Ways to mount, best first. The kernel itself says which of them it lacks (EINVAL, ENOTBLK)."""
    file = [Attempt("file", True)] if directio_is_safe(version) else []
    ways = (*file, Attempt("file", False), Attempt("loop", True), Attempt("loop", False))
    return tuple(way for way in ways if driver in ("auto", way.driver))
