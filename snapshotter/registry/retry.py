"""When to try again and how long to wait: exponential back-off, full jitter, Retry-After, one deadline for all tries.

Only `Transient` errors are tried again. Bytes that are not what they should be, and answers that mean "no", are final.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Protocol, TypeVar

from snapshotter.errors import RegistryUnavailable

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_LONGEST_RETRY_AFTER_SECONDS = 60.0

_T = TypeVar("_T")

TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})


class Transient(RegistryUnavailable):
    """A failure that may be gone on the next try: no connection, a cut one, a stall, 429, 5xx."""

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Clock(Protocol):
    """Time, replaceable in tests."""

    def monotonic(self) -> float: ...

    def time(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...

    def jitter(self) -> float:
        """A random number in 0…1."""


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def jitter(self) -> float:
        return random.random()  # noqa: S311 - spreads retries, guards nothing


class Attempts:
    """The tries of one operation. Bytes that arrived reset the count, never the deadline."""

    def __init__(self, clock: Clock, retries: int, deadline: float) -> None:
        self._clock = clock
        self._retries = retries
        self._failures = 0
        self.deadline = deadline  # on clock.monotonic()

    @property
    def remaining_seconds(self) -> float:
        return self.deadline - self._clock.monotonic()

    def progressed(self) -> None:
        self._failures = 0

    async def run(self, operation: Callable[[], Awaitable[_T]]) -> _T:
        """The result of `operation`, tried until it succeeds, fails for good, or is given up."""
        while True:
            try:
                return await operation()
            except Transient as error:
                await self.pause(error)

    async def pause(self, error: Transient) -> None:
        """Wait before the next try, or raise `error` when there is none left."""
        self._failures += 1
        longest = min(_FIRST_PAUSE_SECONDS * 2.0 ** (self._failures - 1), _LONGEST_PAUSE_SECONDS)
        seconds = self._clock.jitter() * longest
        if error.retry_after_seconds is not None:
            seconds = max(seconds, min(error.retry_after_seconds, _LONGEST_RETRY_AFTER_SECONDS))
        if self._failures > self._retries or seconds >= self.remaining_seconds:
            raise error
        await self._clock.sleep(seconds)


def retry_after_seconds(value: str | None, now: float) -> float | None:
    """Read a Retry-After header (RFC 9110 §10.2.3): seconds or a date. None if absent or unreadable."""
    if value is None or len(value) > 64:
        return None
    if value.isascii() and value.isdigit():
        return float(min(int(value), 1 << 31))
    try:
        moment = parsedate_to_datetime(value)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return max(0.0, seconds)
