"""The data plane as snapshotd sees it: an image goes to the keeper, which holds it, and to blobd, which serves it."""

from snapshotter import failpoints
from snapshotter.ondemand.client import BlobdClient, Peer


class DataPlane:
    """Keeper first on the way in, blobd first on the way out: what blobd serves, the keeper can always give back."""

    def __init__(self, keeper: Peer, blobd: BlobdClient) -> None:
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
        await self._keeper.call({"op": "drop", "name": f"image-{attach_id}"})
        failpoints.hit("detach.done")

    async def _put(self, attach_id: int, memfd: int) -> None:
        await self._keeper.call({"op": "put", "name": f"image-{attach_id}"}, memfd)

    async def share_logins(self, memfd: int) -> None:
        """Logins that blobd, and successors of this process and of blobd, are to know. Raises Unavailable."""
        await self._keeper.call({"op": "put", "name": "logins"}, memfd)
        await self._blobd.logins(memfd)
