"""Which files our processes write, as the kernel saw it: fanotify events of whole file systems (fanotify(7))."""

import ctypes
import os
import select
import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_UNLIMITED_QUEUE = 0x1, 0x2, 0x10
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100
_FAN_CLOSE_WRITE, _FAN_Q_OVERFLOW = 0x8, 0x4000
_EVENT = struct.Struct("=IBBHQii")  # event_len, vers, reserved, metadata_len, mask, fd, pid
_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


class WriteWatch:
    """While entered, hands the content of each file that one of our processes closes after writing to `sink`.

    A process is ours when `marker` is in its environment; one that is gone before it could be looked at counts as
    ours, so that a short-lived child cannot hide.
    """

    def __init__(self, places: Iterable[Path], marker: str, sink: Callable[[str, bytes], None]) -> None:
        self._marker = marker.encode()
        self._sink = sink
        self.files = 0
        self.overflowed = False
        self._ours: dict[int, bool] = {}
        self._fd = _libc.fanotify_init(
            _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_UNLIMITED_QUEUE, os.O_RDONLY | os.O_CLOEXEC | os.O_LARGEFILE
        )
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "fanotify_init")
        for place in {os.stat(path).st_dev: path for path in places}.values():
            flags = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM
            mask = ctypes.c_uint64(_FAN_CLOSE_WRITE)
            if _libc.fanotify_mark(self._fd, flags, mask, _AT_FDCWD, os.fsencode(place)):
                raise OSError(ctypes.get_errno(), f"fanotify_mark {place}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writes", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._fd)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while not self._stop.is_set() or poll.poll(0):
            if poll.poll(100):
                with suppress(BlockingIOError):
                    self._events(os.read(self._fd, 64 << 10))

    def _events(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            length, _, _, _, mask, fd, pid = _EVENT.unpack_from(data, at)
            at += length
            if mask & _FAN_Q_OVERFLOW:
                self.overflowed = True
            if fd >= 0:
                try:
                    if pid != os.getpid() and self._is_ours(pid):
                        self._take(fd)
                finally:
                    os.close(fd)

    def _is_ours(self, pid: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return self._ours.get(pid, True)
        return self._ours.setdefault(pid, self._marker in environment)

    def _take(self, fd: int) -> None:
        self.files += 1
        path = os.readlink(f"/proc/self/fd/{fd}")
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)
            self._sink(path, file.read(64 << 20))
