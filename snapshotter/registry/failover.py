"""Which of several hosts to ask, and when to ask another one.

Hosts are tried in the order of their configuration; whatever goes wrong with one, from refusal to wrong bytes, the next
one gets its turn at once. A host that did not answer is asked last until a request in the background finds it well
again, so that reads do not wait for it; a host that has no object, or a wrong one, is asked last for that object.
Nothing here keeps a host from being asked when there is no better one.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from yarl import URL

from snapshotter.errors import IntegrityError, RegistryUnavailable, SnapshotterError
from snapshotter.monitor.tally import Counts
from snapshotter.registry.endpoint import Endpoint
from snapshotter.registry.retry import Attempts, Clock, Transient

log = structlog.get_logger(__name__)

_FIRST_REST_SECONDS = 1.0
_LONGEST_REST_SECONDS = 60.0
_WITHOUT_SECONDS = 60.0  # a host that did not have an object, or did not give it to us
_WRONG_SECONDS = 300.0  # a host that gave wrong bytes
_MOST_OBJECTS = 4096
_MOST_HOSTS = 1024

_T = TypeVar("_T")
Probe = Callable[[Endpoint], Awaitable[None]]


@dataclass(slots=True)
class _Rest:
    """A host that did not answer: not asked before `until`, and then by a probe."""

    until: float
    seconds: float
    probe: asyncio.Task[None] | None = None


class Health:
    """What is known about hosts. `probe` asks one for anything, and raises while it is not well."""

    def __init__(self, clock: Clock, probe: Probe) -> None:
        self.failures = Counts()  # by host and reason
        self._clock = clock
        self._probe = probe
        self._resting: OrderedDict[URL, _Rest] = OrderedDict()
        self._worse: OrderedDict[tuple[URL, Hashable], float] = OrderedDict()  # until when

    async def close(self) -> None:
        probes = [rest.probe for rest in self._resting.values() if rest.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def order(self, hosts: Sequence[Endpoint], key: Hashable) -> list[Endpoint]:
        """The hosts as they should be asked for the object `key`."""
        if len(hosts) == 1:
            return list(hosts)
        now = self._clock.monotonic()

        def rank(host: Endpoint) -> int:
            origin = host.url.origin()
            if self._rests(host, now):
                return 2
            return 1 if self._worse.get((origin, key), 0.0) > now else 0

        return sorted(hosts, key=rank)

    def _rests(self, host: Endpoint, now: float) -> bool:
        rest = self._resting.get(host.url.origin())
        if rest is not None and now >= rest.until and rest.probe is None:
            rest.probe = asyncio.create_task(self._recover(host, rest))
        return rest is not None

    async def _recover(self, host: Endpoint, rest: _Rest) -> None:
        origin = host.url.origin()
        try:
            await self._probe(host)
        except SnapshotterError:
            rest.seconds = min(2 * rest.seconds, _LONGEST_REST_SECONDS)
            rest.until = self._clock.monotonic() + rest.seconds
        else:
            log.info("host answers again", host=str(origin))
            self._resting.pop(origin, None)
        finally:
            rest.probe = None

    def failed(self, host: Endpoint, key: Hashable, error: SnapshotterError) -> None:
        """`host` did not serve the object."""
        origin, now = host.url.origin(), self._clock.monotonic()
        self._set_back(origin, key, _WRONG_SECONDS if isinstance(error, IntegrityError) else _WITHOUT_SECONDS)
        if isinstance(error, RegistryUnavailable) and error.reason == RegistryUnavailable.default_reason:
            pause = (error.retry_after_seconds if isinstance(error, Transient) else None) or 0.0
            rest = self._resting.setdefault(origin, _Rest(0.0, _FIRST_REST_SECONDS))
            rest.until = max(rest.until, now + max(rest.seconds, min(pause, _LONGEST_REST_SECONDS)))
            _trim(self._resting, _MOST_HOSTS)

    def distrust(self, host: Endpoint, key: Hashable) -> None:
        """Bytes of the object that came from `host` are wrong: it is asked last for it."""
        log.warning("host served wrong bytes", host=str(host.url.origin()))
        self._set_back(host.url.origin(), key, _WRONG_SECONDS)

    def _set_back(self, origin: URL, key: Hashable, seconds: float) -> None:
        self._worse[origin, key] = self._clock.monotonic() + seconds
        self._worse.move_to_end((origin, key))
        _trim(self._worse, _MOST_OBJECTS)


class Tour:
    """One operation's way through the hosts: ask `host`, and say `failed` for each that fails until one does not."""

    def __init__(
        self, hosts: Sequence[Endpoint], key: Hashable, health: Health, attempts: Attempts, *, hurries: bool = False
    ) -> None:
        """`hurries`: the caller will ask others, should all of `hosts` fail."""
        self._hosts = hosts
        self._hurries = hurries
        self._key = key
        self._health = health
        self._attempts = attempts
        self._errors: dict[Endpoint, SnapshotterError] = {}
        self._left = health.order(hosts, key)

    @property
    def host(self) -> Endpoint:
        return self._left[0]

    @property
    def hurries(self) -> bool:
        """Others can be asked instead."""
        return self._hurries or len(self._left) > 1

    async def run(self, operation: Callable[[], Awaitable[_T]]) -> _T:
        """The result of `operation`, which asks `host`."""
        while True:
            try:
                return await operation()
            except SnapshotterError as error:
                await self.failed(error)

    async def failed(self, error: SnapshotterError) -> None:
        """Go on to the next host; at the end of a round wait, and ask those again whose failure may pass.

        Raises the error of the registry itself when there is nobody left to ask.
        """
        host = self._left.pop(0)
        self._errors[host] = error
        self._health.failures.add(str(host.url.origin()), error.reason)
        if len(self._hosts) > 1:
            self._health.failed(host, self._key, error)
            log.info("host did not serve", host=str(host.url.origin()), error=str(error))
        if self._left:
            return
        self._left = [host for host in self._hosts if isinstance(self._errors[host], Transient)]
        if not self._left:
            raise self._errors[self._hosts[-1]]
        last = self._errors[self._left[-1]]
        assert isinstance(last, Transient)
        try:
            await self._attempts.pause(last)
        except Transient:
            raise self._errors[self._hosts[-1]] from None


def _trim(table: "OrderedDict[Any, Any]", most: int) -> None:
    while len(table) > most:
        table.popitem(last=False)
