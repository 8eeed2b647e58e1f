"""The snapshot service as a process on a root of its own."""

import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.conformance.client import Client
from tests.harness.machine import Work
from tests.harness.process import Process


class Daemon:
    """Started at once. `address` and `root` stay the same when it is started again."""

    def __init__(self, work: Work, *flags: str, environment: Mapping[str, str] | None = None) -> None:
        self._work, self._flags = work, flags
        self.root, self.address = work.path / "r", work.path / "s.sock"
        self.start(environment)

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        self.spawn(environment)
        self.process.wait_until(self._accepts, "the socket accepts")

    def spawn(self, environment: Mapping[str, str] | None = None) -> None:
        """Start without waiting."""
        command = [sys.executable, "-m", "tests.conformance.launcher", self.root, self.address, *self._flags]
        paths = {"PYTHONPATH": str(Path(__file__).parents[2])} | dict(environment or {})
        self.process = Process(self._work, "snapshots", command, environment=paths)

    def restart(self, environment: Mapping[str, str] | None = None) -> None:
        self.process.stop()
        self.start(environment)

    def client(self, plugin: str = "test", **options: str) -> Client:
        client = Client(self.address, plugin, **options)
        self._work.stack.callback(client.close)
        return client

    def names(self) -> set[str]:
        """What is in the directory of snapshots."""
        return {path.name for path in (self.root / "snapshots").iterdir()}

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.address)) == 0
