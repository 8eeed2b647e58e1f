"""Talking to keeper and blobd from snapshotd. Waits out a restart of theirs, for a bounded time."""

import asyncio
from pathlib import Path
from typing import Any

from snapshotter import control
from snapshotter.errors import FailedPrecondition, IntegrityError, InvalidArgument, SnapshotterError, Unavailable
from snapshotter.log import bound_request

_PAUSE_SECONDS = 0.05
_ERRORS: dict[str, type[SnapshotterError]] = {
    "invalid-argument": InvalidArgument,
    "failed-precondition": FailedPrecondition,
    "internal": IntegrityError,
}


class Peer:
    """A process of this node behind its control socket. Every call ends within `patience` seconds plus one answer's."""

    def __init__(self, name: str, path: Path, patience: float = 20.0, timeout: float = 10.0) -> None:
        self._name = name
        self._path = path
        self._patience = patience
        self._timeout = timeout

    async def call(self, message: control.Message, *fds: int) -> dict[str, Any]:
        """All requests are idempotent, so one whose answer was lost is simply sent again."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        if request := bound_request():
            message = message | {"request": request}
        while True:
            try:
                answer, received = await asyncio.to_thread(control.request, self._path, message, fds, self._timeout)
                control.close_all(received)
                return answer
            except control.ControlError as error:
                raise _ERRORS.get(error.reason, Unavailable)(f"{self._name}: {error}", reason=error.reason) from None
            except (OSError, EOFError) as error:
                if loop.time() >= deadline:
                    raise Unavailable(f"{self._name} does not answer: {error}") from error
                await asyncio.sleep(_PAUSE_SECONDS)


class BlobdClient:
    """What blobd does for snapshotd."""

    def __init__(self, path: Path, patience: float = 20.0, timeout: float = 10.0) -> None:
        """See Peer."""
        self._call = Peer("blobd", path, patience, timeout).call

    async def attach(self, attach_id: int, memfd: int) -> None:
        """Serve the image in `memfd`, which stays the caller's. Idempotent. Raises Unavailable, IntegrityError."""
        await self._call({"op": "attach", "id": attach_id}, memfd)

    async def detach(self, attach_id: int) -> None:
        """Forget an image; unknown ones are no error. Raises FailedPrecondition while it is in use."""
        await self._call({"op": "detach", "id": attach_id})

    async def logins(self, memfd: int) -> None:
        """Use the logins in `memfd` (credentials/remembered), which stays the caller's. Raises Unavailable."""
        await self._call({"op": "logins"}, memfd)

    async def status(self) -> dict[str, Any]:
        """pid, images [{id, bootstrap, manifest, devices, open}], parked, cache {bytes, entries}, counters."""
        return await self._call({"op": "status"})

    async def attached(self, attach_id: int) -> int | None:
        """Number of devices of an attached image, None if it is not attached."""
        for image in (await self.status())["images"]:
            if image["id"] == attach_id:
                return int(image["devices"])
        return None
