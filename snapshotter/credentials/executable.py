"""Programs that know credentials: started without a shell, bounded in time and output, and never quoted."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

from snapshotter.errors import Unavailable

_SECONDS = 30.0
_PARALLEL = 4


class Executables:
    """Runs a few programs at a time. `limit`: bytes of one answer; `seconds`: of one run."""

    def __init__(self, limit: int, seconds: float = _SECONDS) -> None:
        self._limit = limit
        self._seconds = seconds
        self._parallel = asyncio.Semaphore(_PARALLEL)

    async def ask(
        self, command: Sequence[str], question: bytes, environment: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Exit status, and what the program wrote to its standard output; its standard error is dropped.

        Raises Unavailable, which shows neither.
        """
        what = f"credential program {command[0]}"
        async with self._parallel:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL, cwd="/", start_new_session=True,
                    env={**os.environ, **(environment or {})},
                )  # fmt: skip
            except OSError as error:
                raise Unavailable(f"{what}: {error.strerror}") from None
            try:
                async with asyncio.timeout(self._seconds):
                    return await self._converse(process, question, what)
            except TimeoutError:
                raise Unavailable(f"{what}: no answer in {self._seconds:g} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):  # also what it has started
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    async def _converse(self, process: asyncio.subprocess.Process, question: bytes, what: str) -> tuple[int, bytes]:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # it need not read
            process.stdin.write(question)
            await process.stdin.drain()
        process.stdin.close()
        answer = bytearray()
        while piece := await process.stdout.read(64 << 10):
            answer += piece
            if len(answer) > self._limit:
                raise Unavailable(f"{what}: answers more than limits.credential_bytes = {self._limit}")
        return await process.wait(), bytes(answer)
