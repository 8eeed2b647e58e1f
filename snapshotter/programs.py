"""Running a program that answers a question: no shell, bounded in time and output, ended with all that it started."""

import asyncio
import contextlib
import os
import resource
import signal
from collections.abc import Mapping, Sequence

from snapshotter import oom

_STEP = 64 << 10
_END_SECONDS = 5.0


class TooLong(Exception):
    """The program writes more than it may."""


async def ask(
    command: Sequence[str],
    question: bytes,
    *,
    limit: int,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    directory: str | None = None,
    rlimits: Mapping[int, int] = {},
) -> tuple[int, bytes]:
    """Exit status and standard output (at most `limit` bytes); standard error is dropped, it may quote secrets.

    `environment` None: ours. `rlimits`: setrlimit(2) numbers and values. Raises OSError if it cannot be started,
    TimeoutError, TooLong.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, cwd=directory, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        oom.expose(process.pid)
        with contextlib.suppress(ProcessLookupError):
            for number, most in rlimits.items():
                resource.prlimit(process.pid, number, (most, most))
        async with asyncio.timeout(seconds):
            answer = await _exchange(process, question, limit)
            return await process.wait(), answer
    finally:
        await _end(process)


async def _exchange(process: asyncio.subprocess.Process, question: bytes, limit: int) -> bytes:
    assert process.stdin
    assert process.stdout
    # It may answer, or fail, without reading everything; its exit status says which.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(question)
        await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()
    answer = bytearray()
    while piece := await process.stdout.read(_STEP):
        answer += piece
        if len(answer) > limit:
            raise TooLong
    return bytes(answer)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Leave no process and no pipe behind, whatever state they are in."""
    assert process.stdout
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also what it has started, which may hold the pipe
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_SECONDS):
            while await process.stdout.read(_STEP):
                pass  # wait() waits for the end of the pipe, which a full buffer would never see
            await process.wait()
