"""What a run leaves on the machine, and its removal: mounts, loop devices, processes, shared directories.

Every process started by the harness carries a marker variable in its environment; children inherit it, and a
container's processes are known by their mounts. So a check looks only at what *this* run made and is not disturbed by
others on the same machine.
"""

import ctypes
import os
import shutil
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

MARKER = "COCO_TEST_RUN"
_OWNER = ".owner"  # file in a run's directory: pid and marker of who will clean it up
_MNT_DETACH = 2
# Fixed places where containerd's shims, runc and CNI leave directories behind, wherever containerd's own root is.
_SHARED = ("/run/containerd", "/run/runc", "/run/netns", "/opt/containerd", "/var/lib/containerd", "/var/lib/cni")
_CGROUPS = Path("/sys/fs/cgroup")
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    target: str
    kind: str
    source: str
    options: str


def mounts(pid: int | str = "self") -> list[Mount]:
    """The mounts a process sees, in the order of mounting. Empty when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        left, _, right = line.partition(" - ")
        kind, source, options = right.split(" ", 2)
        found.append(Mount(left.split(" ")[4].encode().decode("unicode_escape"), kind, source, options))
    return found


def loops() -> dict[str, str]:
    """Attached loop devices and their backing files."""
    found = {}
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            found[f"/dev/{path.parts[3]}"] = path.read_text().strip()
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def processes_with(marker: str, path: str) -> list[int]:
    """Living processes whose environment holds `marker`, or that live in a mount namespace made of files of `path`."""
    ours = os.stat("/proc/self/ns/mnt").st_ino
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid() or not alive(int(name)):
            continue
        with suppress(OSError):
            inside = (
                os.stat(f"/proc/{name}/ns/mnt").st_ino != ours and path in Path(f"/proc/{name}/mountinfo").read_text()
            )
            if inside or marker.encode() in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


def parent(pid: int) -> int:
    """The parent's pid; 0 when the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:160]
    return "?"


def until(condition: Callable[[], T], what: str, timeout: float = 30.0, every: float = 0.02) -> T:
    """Poll until `condition()` is true and return its value; raises TimeoutError naming `what`."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {what}")
        time.sleep(every)
    return value


def kill_all(pids: list[int]) -> None:
    """SIGKILL and wait until gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(TimeoutError):
        until(lambda: not any(alive(pid) for pid in pids), "killed processes are gone", 5)


def unmount(target: str, *, detach: bool = False) -> bool:
    return bool(_libc.umount2(os.fsencode(target), _MNT_DETACH if detach else 0) == 0)


class LeftBehindError(AssertionError):
    """A run ended and something of it was still there."""


class Work:
    """A temporary directory and everything that lives in it.

    Parts are stopped in reverse order of `stack`; whatever is left then is named in LeftBehindError and removed.
    """

    def __init__(self, label: str = "test", parent: Path | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"coco-{label}-", dir=parent))
        self.marker = f"{MARKER}={uuid.uuid4().hex}"
        self.stack = ExitStack()
        self._before = _shared_entries()
        (self.path / _OWNER).write_text(f"{os.getpid()} {self.marker}")

    @classmethod
    def abandoned(cls) -> list["Work"]:
        """Runs whose process was killed before it could clean up."""
        found = []
        for file in Path(tempfile.gettempdir()).glob(f"coco-*/{_OWNER}"):
            with suppress(OSError, ValueError):
                pid, marker = file.read_text().split(" ", 1)
                if not alive(int(pid)):
                    run = cls.__new__(cls)
                    run.path, run.marker, run.stack, run._before = file.parent, marker, ExitStack(), _shared_entries()
                    found.append(run)
        return found

    @property
    def environment(self) -> dict[str, str]:
        """For processes of this run: the marker, and no proxies, since everything is on loopback."""
        name, _, value = self.marker.partition("=")
        kept = {key: text for key, text in os.environ.items() if not key.lower().endswith("_proxy")}
        return kept | {name: value}

    def directory(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def mounted(self) -> list[str]:
        """Mount points inside the directory, innermost last."""
        return [mount.target for mount in mounts() if f"{mount.target}/".startswith(f"{self.path}/")]

    def processes(self) -> list[int]:
        return processes_with(self.marker, str(self.path))

    def leftovers(self) -> list[str]:
        """What is still there, in words."""
        found = [f"process {pid} {command_line(pid)}" for pid in self.processes()]
        found += [f"mount {target}" for target in self.mounted()]
        found += [f"loop {device} on {file}" for device, file in loops().items() if file.startswith(str(self.path))]
        found += [f"file {path}" for path in self._new_shared() if path.is_socket()]
        return found

    def remove(self) -> None:
        """Kill, unmount and delete everything of this run; does not raise."""
        kill_all(self.processes())
        for target in reversed(self.mounted()):
            unmount(target) or unmount(target, detach=True)
        for path in sorted(self._new_shared(), reverse=True):
            with suppress(OSError):  # directories only when empty: somebody else may use them
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(self.path, ignore_errors=True)

    def _new_shared(self) -> list[Path]:
        """Entries of the shared places that appeared during this run and name it, and empty directories there."""
        new = [path for path in _shared_entries() - self._before if path.is_dir() or path.is_socket()]
        return [path for path in new if path.is_dir() or not _listening(path)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stack.__exit__(kind, error, trace)
        finally:
            left = self.leftovers()
            self.remove()
        if left and error is None:
            raise LeftBehindError("left behind: " + "; ".join(left))


def _shared_entries() -> set[Path]:
    found: set[Path] = set()
    for top in map(Path, _SHARED):
        if top.exists():
            found.add(top)
            found.update(top.rglob("*"))
    for controller in _CGROUPS.glob("*"):
        found.update(controller.glob("k8s.io"))
    return found


def _listening(path: Path) -> bool:
    """Whether a process still listens on a unix socket path."""
    return any(line.endswith(f" {path}") for line in Path("/proc/net/unix").read_text().splitlines())


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
