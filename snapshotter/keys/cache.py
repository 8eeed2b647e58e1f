"""Resources that were released, kept in memory for a while and overwritten afterwards."""

import asyncio
from typing import Final

from snapshotter.crypto.secret import SecretBytes
from snapshotter.keys.resource import ResourceUri
from snapshotter.registry.retry import Clock

_ENTRIES: Final = 256


class ResourceCache:
    """Holds at most 256 resources, each for `seconds` after its release; 0 keeps none. Never on a disk."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._seconds = seconds
        self._clock = clock
        self._held: dict[ResourceUri, tuple[SecretBytes, float]] = {}  # oldest first

    def get(self, uri: ResourceUri) -> SecretBytes | None:
        """A copy that the caller wipes."""
        self._expire()
        held = self._held.get(uri)
        return SecretBytes(held[0].expose()) if held else None

    def put(self, uri: ResourceUri, secret: SecretBytes) -> None:
        """Keeps a copy."""
        if self._seconds <= 0:
            return
        self._drop(uri)
        while len(self._held) >= _ENTRIES:
            self._drop(next(iter(self._held)))
        self._held[uri] = SecretBytes(secret.expose()), self._clock.monotonic() + self._seconds
        # Nobody may ask again, and what is not needed must not stay in memory.
        asyncio.get_running_loop().call_later(self._seconds + 1, self._expire)

    def clear(self) -> None:
        for uri in list(self._held):
            self._drop(uri)

    def __len__(self) -> int:
        return len(self._held)

    def _expire(self) -> None:
        now = self._clock.monotonic()
        for uri in [uri for uri, (_, until) in self._held.items() if until <= now]:
            self._drop(uri)

    def _drop(self, uri: ResourceUri) -> None:
        held = self._held.pop(uri, None)
        if held:
            held[0].wipe()
