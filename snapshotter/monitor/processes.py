"""What the kernel says about our processes, from /proc."""

import os
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Process(NamedTuple):
    resident_bytes: int
    cpu_seconds: float
    threads: int
    started: float  # seconds since the epoch
    open_files: int


def look(pid: int) -> Process | None:
    """None if there is no such process. Blocks for as long as it takes to list its descriptors."""
    directory = Path(f"/proc/{pid}")
    try:
        # Behind the name, which may hold anything, fields 3… of proc(5).
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        open_files = len(os.listdir(directory / "fd"))
    except OSError:
        return None
    return Process(
        resident_bytes=int(fields[21]) * _PAGE,
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS,
        threads=int(fields[17]),
        started=_boot_time() + int(fields[19]) / _TICKS,
        open_files=open_files,
    )


def _boot_time() -> float:
    lines = Path("/proc/stat").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("btime "))
