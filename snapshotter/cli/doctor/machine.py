"""The machine as checks see it: files, mounts, processes, sockets. Nothing in here is changed."""

import contextlib
import ctypes
import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from snapshotter import control
from snapshotter.mounts import mountinfo
from snapshotter.mounts.mountinfo import Mount

_FILE_BYTES = 4 << 20
_COMMAND_SECONDS = 20.0
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


class Machine(Protocol):
    """Methods raise OSError as the system does; PermissionError means that root would see more."""

    @property
    def uid(self) -> int: ...

    @property
    def release(self) -> str:
        """`uname -r`."""

    def read(self, path: Path | str) -> str:
        """The beginning of a text file."""

    def digest(self, path: Path) -> str:
        """`sha256:…` of a regular file's content."""

    def status(self, path: Path | str) -> os.stat_result:
        """Of the file itself, links are not followed."""

    def names(self, path: Path | str) -> list[str]: ...

    def space(self, path: Path | str) -> os.statvfs_result:
        """Of the file system on which `path` is, or will be."""

    def mounts(self) -> list[Mount]: ...

    def mount_namespace(self, pid: int) -> str:
        """A name that is equal for processes that share one; 0 is this process."""

    def peer(self, path: Path | str) -> int:
        """The process that listens on a Unix stream socket; 0 if that cannot be seen from here."""

    def processes(self, name: str) -> list[int]:
        """Pids of the processes of that name."""

    def started(self, pid: int) -> float:
        """When a process began, in seconds since the epoch."""

    def output(self, *command: str) -> str | None:
        """Standard output of a command; None if it does not exist or fails."""

    def ask(self, path: str, message: control.Message) -> control.Message:
        """One answer of a worker. Raises OSError, EOFError."""

    def stream(self, path: str, message: control.Message) -> Iterator[control.Message]:
        """The parts of an answer that comes in several, without its end."""

    def lock_holder(self, path: str) -> int | None: ...

    def connect(self, host: str, port: int) -> None:
        """Whether somebody accepts there. Raises OSError."""

    def now(self) -> float: ...

    def clock_is_synchronised(self) -> bool: ...


class ThisMachine:
    """The one this runs on."""

    @property
    def uid(self) -> int:
        return os.geteuid()

    @property
    def release(self) -> str:
        return os.uname().release

    def read(self, path: Path | str) -> str:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_FILE_BYTES)

    def digest(self, path: Path) -> str:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"

    def status(self, path: Path | str) -> os.stat_result:
        return os.lstat(path)

    def names(self, path: Path | str) -> list[str]:
        return os.listdir(path)

    def space(self, path: Path | str) -> os.statvfs_result:
        existing = next(place for place in (Path(path), *Path(path).parents) if place.exists())
        return os.statvfs(existing)

    def mounts(self) -> list[Mount]:
        return mountinfo.read_mounts()

    def mount_namespace(self, pid: int) -> str:
        return os.readlink(f"/proc/{pid or 'self'}/ns/mnt")

    def peer(self, path: Path | str) -> int:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(path))
            return control.peer_pid(client)

    def processes(self, name: str) -> list[int]:
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{entry}/comm").read_text().strip() == name[:15]:
                        found.append(int(entry))
        return found

    def started(self, pid: int) -> float:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")

    def output(self, *command: str) -> str | None:
        try:
            done = subprocess.run(  # noqa: S603 - system programs by fixed names
                command, capture_output=True, text=True, errors="replace", timeout=_COMMAND_SECONDS, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    def ask(self, path: str, message: control.Message) -> control.Message:
        answer, received = control.request(path, message)
        control.close_all(received)
        return answer

    def stream(self, path: str, message: control.Message) -> Iterator[control.Message]:
        return (part for part in control.stream(path, message) if not part.get("end"))

    def lock_holder(self, path: str) -> int | None:
        return control.lock_holder(path)

    def connect(self, host: str, port: int) -> None:
        socket.create_connection((host, port), timeout=5).close()

    def now(self) -> float:
        return time.time()

    def clock_is_synchronised(self) -> bool:
        timex = ctypes.create_string_buffer(512)  # struct timex, all zero: only look
        return bool(ctypes.CDLL(None).adjtimex(timex) != _TIME_ERROR)
