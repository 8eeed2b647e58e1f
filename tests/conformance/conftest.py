"""A snapshot service for the whole session; each test has a plugin name of its own, which is a store of its own."""

import itertools
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.conformance.client import Client
from tests.harness.machine import Work
from tests.harness.process import Process

_plugins = itertools.count()


class Daemon:
    """The service as a process on its own root."""

    def __init__(self, work: Work, *flags: str, environment: Mapping[str, str] | None = None) -> None:
        self._work, self._flags = work, flags
        self.root, self.address = work.path / "r", work.path / "s.sock"
        self.start(environment)

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "tests.conformance.launcher", self.root, self.address, *self._flags]
        paths = {"PYTHONPATH": str(Path(__file__).parents[2])} | dict(environment or {})
        self.process = Process(self._work, "snapshots", command, environment=paths)
        self.process.wait_until(self._accepts, "the socket accepts")

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.address)) == 0

    def client(self, plugin: str = "test", **options: str) -> Client:
        client = Client(self.address, plugin, **options)
        self._work.stack.callback(client.close)
        return client


@pytest.fixture(scope="session")
def shared_daemon() -> Iterator[Daemon]:
    with Work("conformance") as work:
        yield Daemon(work)


@pytest.fixture
def sn(shared_daemon: Daemon) -> Iterator[Client]:
    """A client whose plugin name nobody else uses."""
    client = Client(shared_daemon.address, f"plugin-{next(_plugins)}")
    yield client
    client.close()


@pytest.fixture
def daemon(work: Work) -> Callable[..., Daemon]:
    """Starts a service of the test's own."""
    return lambda *flags, **options: Daemon(work, *flags, **options)
