"""Our own program: `serve` as a process of a run, `status`, and the offline commands."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.harness.machine import Work, alive, mounts, unmount, until
from tests.harness.process import Process

PROGRAM = (sys.executable, "-m", "snapshotter")
WORKERS = ("keeper", "snapshotd", "blobd")


def toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """A nested table of strings, numbers, booleans and lists, also of tables, as TOML."""
    text = inner = ""
    for key, value in table.items():
        if isinstance(value, Mapping):
            inner += f"\n[{prefix}{key}]\n{toml(value, f'{prefix}{key}.')}"
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            inner += "".join(f"\n[[{prefix}{key}]]\n{toml(entry)}" for entry in value)
        else:
            text += f"{key} = {json.dumps(value)}\n"
    return text + inner


def program(
    work: Work, *arguments: str | Path, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command of the program to its end."""
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False,
        env=work.environment | dict(environment or {}), stdin=subprocess.DEVNULL, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def convert(work: Work, source: str, target: str, *options: str | Path, **more: Any) -> str:
    """`convert`; returns the manifest digest of the result, raises with its last words when it fails."""
    result = program(work, "convert", source, target, *options, **more)
    if result.returncode:
        raise RuntimeError(f"convert ended with {result.returncode}:\n{result.stderr[-3000:]}")
    return result.stdout.strip().splitlines()[-1].rpartition("@")[2]


class Serve:
    """A running `serve`: keeper, snapshotd and blobd. `settings` are merged into the configuration file."""

    def __init__(
        self,
        work: Work,
        name: str = "coco",
        settings: Mapping[str, Any] | None = None,
        *,
        root: Path | None = None,
        cache: Path | None = None,
        environment: Mapping[str, str] | None = None,
        start: bool = True,
    ) -> None:
        self._work = work
        self.name = name
        self.home = work.directory(name)
        self.root = root or self.home / "root"
        self.cache = cache or self.home / "cache"
        self.address = self.home / "coco.sock"
        self.config = self.home / "config.toml"
        self.environment = {"PYTHONPATH": str(Path(__file__).parents[2])} | dict(environment or {})
        table: dict[str, Any] = {
            "root": str(self.root), "cache_dir": str(self.cache), "address": str(self.address),
            "log": {"level": "debug"},
        }  # fmt: skip
        self.config.write_text(toml(table | dict(settings or {})))
        work.stack.callback(self.stop)
        self.process: Process | None = None
        if start:
            self.start()

    def spawn(self) -> Process:
        """Start without waiting: for tests in which it must refuse."""
        self.process = Process(
            self._work, f"{self.name}-serve", [*PROGRAM, "serve", "--config", self.config], environment=self.environment
        )
        return self.process

    def start(self, timeout: float = 30) -> None:
        """Start and wait until the socket accepts and all three processes answer."""
        process = self.spawn()
        process.wait_until(self.accepts, f"{self.address} accepts", timeout)
        process.wait_until(lambda: self.try_status() is not None, "status answers", timeout)

    def accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(2)
            return client.connect_ex(str(self.address)) == 0

    def try_status(self) -> dict[str, Any] | None:
        """The status document; None unless all three processes answer."""
        result = program(self._work, "status", "--config", self.config, "--json", timeout=30)
        return json.loads(result.stdout) if result.returncode == 0 else None

    def status(self) -> dict[str, Any]:
        found = self.try_status()
        if found is None:
            raise RuntimeError(f"{self.name}: status fails\n{self.log()[-2000:]}")
        return found

    def pids(self) -> dict[str, int]:
        return {name: int(pid) for name, pid in self.status()["pids"].items()}

    def kill(self, worker: str) -> int:
        """kill -9 one of WORKERS; returns the pid it had. When the keeper dies, `start()` brings up a new one."""
        pid = self.pids()[worker]
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid), f"{worker} is gone", 10)
        return pid

    def wait_replaced(self, worker: str, old: int, timeout: float = 20) -> int:
        """Wait until `worker` lives with another pid and everything answers again."""

        def replaced() -> int:
            status = self.try_status()
            pid = int(status["pids"][worker]) if status else 0
            return pid if pid != old else 0

        return until(replaced, f"a new {worker}", timeout, every=0.1)

    def images_mounted(self) -> list[str]:
        """EROFS mount points under the root."""
        return [m.target for m in mounts() if m.kind == "erofs" and m.target.startswith(f"{self.root}/")]

    def log(self) -> str:
        return self.process.errors() + self.process.output() if self.process else ""

    def events(self) -> list[dict[str, Any]]:
        """The structured log, oldest first."""
        found = []
        for line in self.log().splitlines():
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    found.append(event)
        return found

    def terminate(self, timeout: float = 12) -> int:
        """SIGTERM to the keeper and its exit status. Workers that keep serving live images are left alone."""
        assert self.process is not None
        return self.process.stop(timeout)

    def stop(self) -> None:
        """End all three, with images unmounted: what a test's cleanup wants. Safe to call again."""
        if self.process is None:
            return
        self.terminate()
        for target in reversed(self.images_mounted()):
            unmount(target) or unmount(target, detach=True)
        for lock in ("snapshotd.lock", "blobd.lock"):
            with suppress(OSError, ValueError):
                pid = int((self.root / lock).read_text())
                if self._owns(pid):
                    os.kill(pid, signal.SIGTERM)
                    until(lambda pid=pid: not alive(pid), f"{lock} holder {pid} ends", 10)  # type: ignore[misc]
        self.process = None

    def _owns(self, pid: int) -> bool:
        with suppress(OSError):
            return self._work.marker.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False


def refs(address: str, repository: str, digest: str) -> str:
    """An image reference pinned by digest."""
    return f"{address}/{repository}@{digest}"


def key_pair(directory: Path, name: str = "tenant") -> tuple[Path, Path]:
    """A fresh P-256 key: (private PEM, public PEM)."""
    private, public = directory / f"{name}.pem", directory / f"{name}.pub.pem"
    run: Sequence[Sequence[str]] = (
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(private)],
        ["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(public)],
    )
    for command in run:
        subprocess.run(command, check=True, capture_output=True)
    private.chmod(0o600)
    return private, public
