"""A misbehaving registry and a client of it whose clock stands still."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from snapshotter.config import Limits, Registry
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.reference import Reference
from tests.harness.sim_registry import FakeClock, SimRegistry


@pytest.fixture
async def sim() -> AsyncIterator[SimRegistry]:
    async with SimRegistry() as registry:
        yield registry


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


class Clients:
    """Makes clients that are closed at the end of the test."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._open: list[RegistryClient] = []

    async def make(
        self, limits: Limits | None = None, remembered: RememberedLogins | None = None, **config: Any
    ) -> RegistryClient:
        """A client with these `[registry]` settings."""
        client = RegistryClient(Registry(**config), limits or Limits(), clock=self._clock, remembered=remembered)
        await client.__aenter__()
        self._open.append(client)
        return client

    async def close(self) -> None:
        for client in self._open:
            await client.__aexit__()


@pytest.fixture
async def clients(clock: FakeClock) -> AsyncIterator[Clients]:
    made = Clients(clock)
    yield made
    await made.close()


@pytest.fixture
def image(sim: SimRegistry) -> Reference:
    return Reference.parse(f"{sim.address}/team/app:1")


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Let the loop run until something has happened."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what happens has no event
            await asyncio.sleep(0.005)
