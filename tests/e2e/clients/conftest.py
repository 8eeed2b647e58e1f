"""Daemons that all tests of real clients share, and a client for each test."""

from collections.abc import Iterator

import pytest

from tests.e2e.clients.paths import Puller, PullPath, Stations
from tests.e2e.conftest import Images
from tests.harness.machine import Work


@pytest.fixture(scope="package")
def stations(images: Images) -> Iterator[Stations]:
    with Work("clients") as work:
        yield Stations(work, images)


@pytest.fixture
def puller(stations: Stations, path: PullPath) -> Iterator[Puller]:
    """The client of `path`, a parameter of the test."""
    if path.missing:
        pytest.skip(path.missing)
    with stations.puller(path) as made:
        yield made
