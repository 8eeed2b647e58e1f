"""How far something is, on stderr: one moving line on a terminal, one line per step elsewhere."""

import sys
import time
from typing import TextIO

_REDRAW_SECONDS = 0.1
_BAR = 24


def size(count: float) -> str:
    """Bytes for people: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Progress:
    """Steps with a total in bytes. Not thread-safe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._moving = self._stream.isatty()
        self._what = ""
        self._total = self._done = 0
        self._began = self._drawn = 0.0

    def begin(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began = time.monotonic()
        self._drawn = 0.0

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._moving and now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            filled = min(_BAR, _BAR * self._done // max(self._total, 1))
            bar = "#" * filled + "-" * (_BAR - filled)
            self._stream.write(f"\r{self._what} [{bar}] {size(self._done)} of {size(self._total)}\x1b[K")
            self._stream.flush()

    def end(self) -> None:
        seconds = time.monotonic() - self._began
        rate = f", {size(self._done / seconds)}/s" if seconds > 0.5 else ""
        start, stop = ("\r", "\x1b[K\n") if self._moving else ("", "\n")
        self._stream.write(f"{start}{self._what}: {size(self._done)}{rate}{stop}")
        self._stream.flush()

    def note(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()
