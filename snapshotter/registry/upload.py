"""Uploading one blob: POST for a place, one streaming PUT, hashing on the way (distribution-spec v1.1, Push).

A try that breaks begins again from the start of the content; registries disagree too much about resuming.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeAlias

from yarl import URL

from snapshotter.config import Registry
from snapshotter.digest import Digest
from snapshotter.errors import DigestMismatch, SnapshotterError
from snapshotter.registry import ranges, redirects
from snapshotter.registry.endpoint import Endpoint, Scope
from snapshotter.registry.retry import Attempts, Transient
from snapshotter.registry.session import Session

_READ_BYTES = 1 << 20

BlobContent: TypeAlias = Path | Callable[[], AsyncIterator[bytes]]


async def read_file(path: Path) -> AsyncIterator[bytes]:
    """A file in pieces of 1 MiB, read in a thread."""
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while piece := await asyncio.to_thread(file.read, _READ_BYTES):
            yield piece
    finally:
        file.close()


class CheckedContent:
    """Content on its way out. Never gives more than `size` bytes, and fails at its end unless it has `digest`.

    An HTTP client wraps what an iterator raises; `failure` keeps it.
    """

    def __init__(self, source: BlobContent, digest: Digest, size: int) -> None:
        self._source = source
        self._digest = digest
        self._size = size
        self.failure: Exception | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        """One pass over the content. Raises DigestMismatch; OSError of the file becomes SnapshotterError."""
        try:
            async for piece in self._checked():
                yield piece
        except Exception as error:
            self.failure = error
            raise

    async def _checked(self) -> AsyncIterator[bytes]:
        hasher = hashlib.sha256()
        left = self._size
        pieces = read_file(self._source) if isinstance(self._source, Path) else self._source()
        try:
            async for piece in pieces:
                left -= len(piece)
                if left < 0:
                    raise DigestMismatch(f"content of {self._digest}: more than {self._size} bytes")
                hasher.update(piece)
                # The last byte is only given out when everything is known to be right, so that
                # no registry can take a wrong blob for complete.
                if left == 0 and hasher.hexdigest() != self._digest.hex:
                    raise DigestMismatch(f"content of {self._digest}: is sha256:{hasher.hexdigest()}")
                yield piece
        except OSError as error:
            raise SnapshotterError(f"content of {self._digest}: {error.strerror}") from error
        if left:
            raise DigestMismatch(f"content of {self._digest}: {left} bytes short of {self._size}")
        if self._size == 0 and hasher.hexdigest() != self._digest.hex:
            raise DigestMismatch(f"content of {self._digest}: is empty")


class Upload:
    """One blob to one repository."""

    def __init__(
        self,
        session: Session,
        endpoint: Endpoint,
        scope: Scope,
        config: Registry,
        digest: Digest,
        size: int,
        source: BlobContent,
    ) -> None:
        self._session = session
        self._endpoint = endpoint
        self._scope = scope
        self._config = config
        self._digest = digest
        self._size = size
        self._source = source

    async def run(self, what: str, start: URL, attempts: Attempts) -> None:
        """One try. Raises Transient when the connection breaks or the registry takes nothing for too long."""
        target = await self._place(what, start, attempts)
        content = CheckedContent(self._source, self._digest, self._size)
        try:
            await self._put(what, target, content, attempts)
        except Transient:
            if content.failure is not None:
                raise content.failure from None
            raise

    async def _place(self, what: str, start: URL, attempts: Attempts) -> URL:
        """Where to PUT the content."""
        async with self._session.send(
            self._endpoint,
            "POST",
            start,
            what=what,
            scope=self._scope,
            deadline=attempts.deadline,
            body=lambda: b"",
            expect=(202,),
        ) as answer:
            location = redirects.next_hop(what, start, answer.headers.get("Location"))
        joint = "&" if location.raw_query_string else "?"
        return URL(f"{location}{joint}digest={self._digest}", encoded=True)

    async def _put(self, what: str, target: URL, content: CheckedContent, attempts: Attempts) -> None:
        loop = asyncio.get_running_loop()
        progress_seconds = self._config.progress_timeout_seconds

        async def pieces() -> AsyncIterator[bytes]:
            async for piece in content.pieces():
                patience.reschedule(loop.time() + progress_seconds)
                yield piece
            # All is sent; storing it may take the registry longer than taking it.
            patience.reschedule(loop.time() + attempts.remaining_seconds)

        try:
            async with asyncio.timeout(attempts.remaining_seconds) as patience:
                async with self._session.send(
                    self._endpoint,
                    "PUT",
                    target,
                    what=what,
                    scope=self._scope,
                    headers={"Content-Type": "application/octet-stream", "Content-Length": str(self._size)},
                    deadline=attempts.deadline,
                    body=pieces,
                    expect=(200, 201, 204),
                    patience_seconds=self._config.total_timeout_seconds,
                ) as answer:
                    stored = ranges.stated_digest(what, answer.headers)
        except TimeoutError:
            raise Transient(f"{what}: registry takes nothing") from None
        if stored not in (None, self._digest):
            raise DigestMismatch(f"{what}: registry stored {stored}")
