"""A snapshot service for the whole session; each test has a plugin name of its own, which is a store of its own."""

import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.conformance.client import Client
from tests.conformance.daemon import Daemon
from tests.harness.machine import Work

_plugins = itertools.count()


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
