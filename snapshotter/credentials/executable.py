"""Programs that know credentials: a few at a time, and never quoted."""

import asyncio
import os
from collections.abc import Mapping, Sequence

from snapshotter import programs
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
                return await programs.ask(
                    command, question, limit=self._limit, seconds=self._seconds, directory="/",
                    environment={**os.environ, **(environment or {})},
                )  # fmt: skip
            except TimeoutError:
                raise Unavailable(f"{what}: no answer in {self._seconds:g} s") from None
            except OSError as error:
                raise Unavailable(f"{what}: {error.strerror}") from None
            except programs.TooLong:
                text = f"{what}: answers more than limits.credential_bytes = {self._limit}"
                raise Unavailable(text) from None
