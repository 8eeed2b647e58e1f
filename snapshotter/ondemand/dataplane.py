"""The data plane as snapshotd sees it: an image goes to the keeper, which holds it, and to blobd, which serves it."""

import asyncio
from pathlib import Path

from snapshotter import control, failpoints
from snapshotter.errors import Unavailable
from snapshotter.ondemand.client import BlobdClient


class DataPlane:
    """Keeper first on the way in, blobd first on the way out: what blobd serves, the keeper can always give back."""

    def __init__(self, keeper: Path, blobd: BlobdClient) -> None:
        self._keeper = keeper
        self._blobd = blobd

    async def attached(self, attach_id: int) -> int | None:
        """Number of devices of an attached image, None if it is not attached. Raises Unavailable."""
        return await self._blobd.attached(attach_id)

    async def attach(self, attach_id: int, memfd: int) -> None:
        """Idempotent; `memfd` stays the caller's. Raises Unavailable, IntegrityError."""
        await self._put(attach_id, memfd)
        failpoints.hit("attach.kept")
        await self._blobd.attach(attach_id, memfd)
        failpoints.hit("attach.served")
        await self._put(attach_id, memfd)  # again: a keeper that took over meanwhile has only what blobd had then

    async def detach(self, attach_id: int) -> None:
        """Forget an image and its keys. Raises FailedPrecondition while it is in use."""
        await self._blobd.detach(attach_id)
        failpoints.hit("detach.served")
        await self._ask_keeper({"op": "drop", "name": f"image-{attach_id}"})
        failpoints.hit("detach.done")

    async def _put(self, attach_id: int, memfd: int) -> None:
        await self._ask_keeper({"op": "put", "name": f"image-{attach_id}"}, memfd)

    async def share_logins(self, memfd: int) -> None:
        """Logins that blobd, and successors of this process and of blobd, are to know. Raises Unavailable."""
        await self._ask_keeper({"op": "put", "name": "logins"}, memfd)
        await self._blobd.logins(memfd)

    async def _ask_keeper(self, message: control.Message, *fds: int) -> None:
        try:
            _, received = await asyncio.to_thread(control.request, self._keeper, message, fds)
        except (OSError, EOFError) as error:
            raise Unavailable(f"keeper does not answer: {error}") from error
        control.close_all(received)
