"""Asking another process of the node something, with an end to the patience: a frozen one must not freeze who asks."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from snapshotter import control

PATIENCE_SECONDS = 1.0
_ANSWER_SECONDS = 30.0  # then the question is given up and the next one may be asked


class Peer:
    """The process behind the control socket at `path`. At most one question of a kind is on its way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._asked: dict[str, asyncio.Task[dict[str, Any] | None]] = {}

    async def ask(self, op: str) -> dict[str, Any] | None:
        """The answer; None if there is none within `PATIENCE_SECONDS`."""
        task = self._asked.get(op)
        if task is None or task.done():
            task = self._asked[op] = asyncio.create_task(self._request(op))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await asyncio.shield(task)
        return None

    async def _request(self, op: str) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, EOFError):  # also a TimeoutError
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await control.request_async(self._path, {"op": op})
        return None
