"""What a dying worker leaves to its successor: the memory shared through the keeper's `session` memfd.

    0      header: magic, version, 1 once INIT was answered, negotiated flags
    4096   SLOTS × 128 bytes: the first 80 bytes of a request as the kernel wrote them; `unique` 0 = free
    …      OPENS × 16 bytes: le64 handle, le64 node of each open file; handle 0 = free

A worker reads /dev/fuse straight into a slot, so there is no instant at which a request is taken and not recorded. The
handle of an open file is the `unique` of its OPEN, so doing an OPEN or a RELEASE twice changes nothing.
"""

import mmap
import os
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterator

from snapshotter.errors import MalformedImage

SLOTS = 8192
OPENS = 16384
REQUEST_BYTES = 80  # fuse_in_header and fuse_read_in; of longer requests these bytes are enough

_MAGIC = b"COCOSES\0"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ")
_HEADER_BYTES = 4096
_SLOT_BYTES = 128
_UNIQUE = struct.Struct("<Q")
_UNIQUE_OFFSET = 8  # of fuse_in_header.unique
_OPEN = struct.Struct("<QQ")
_OPENS_OFFSET = _HEADER_BYTES + SLOTS * _SLOT_BYTES
SIZE = _OPENS_OFFSET + OPENS * _OPEN.size


class SessionMemory:
    """The shared memory of one FUSE session. Only the living worker touches it."""

    def __init__(self, fd: int) -> None:
        """Map the memfd; a new one is laid out first. Raises MalformedImage if it is something else."""
        if not any(os.pread(fd, len(_MAGIC), 0)):  # new, or whoever laid it out was killed before the end
            # Written, not truncated: each page must exist before the kernel copies a request into it.
            os.pwrite(fd, bytes(SIZE - _HEADER_BYTES), _HEADER_BYTES)
            os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, 0, 0), 0)
        if os.fstat(fd).st_size != SIZE:
            raise MalformedImage("session memory has the wrong size", reason="internal")
        self._map = mmap.mmap(fd, SIZE, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._view = memoryview(self._map)
        magic, version, initialised, flags = _HEADER.unpack_from(self._map)
        if (magic, version) != (_MAGIC, _VERSION):
            raise MalformedImage("session memory has another layout", reason="internal")
        self.initialised = bool(initialised)
        self.flags: int = flags
        self._free = deque(slot for slot in range(SLOTS) if not self._unique(slot))
        self._lock = threading.Lock()
        self._opens: dict[int, int] = {}  # handle → row
        self._free_rows = []
        for row in reversed(range(OPENS)):
            handle, _ = _OPEN.unpack_from(self._map, _OPENS_OFFSET + row * _OPEN.size)
            if handle:
                self._opens[handle] = row
            else:
                self._free_rows.append(row)

    def set_initialised(self, flags: int) -> None:
        self.initialised, self.flags = True, flags
        _HEADER.pack_into(self._map, 0, _MAGIC, _VERSION, 1, flags)

    # In-flight requests

    def take(self) -> int | None:
        """A free slot, which belongs to the caller until `clear`; None if every slot is taken."""
        try:
            return self._free.popleft()
        except IndexError:
            return None

    def buffer(self, slot: int) -> memoryview:
        """Where to read a request into."""
        start = _HEADER_BYTES + slot * _SLOT_BYTES
        return self._view[start : start + REQUEST_BYTES]

    def clear(self, slot: int) -> None:
        """The request was answered, or needs no answer. The slot stays the caller's."""
        _UNIQUE.pack_into(self._map, _HEADER_BYTES + slot * _SLOT_BYTES + _UNIQUE_OFFSET, 0)

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def left_over(self) -> Iterator[tuple[int, memoryview]]:
        """Slots of requests that the worker before us took and perhaps did not answer."""
        for slot in range(SLOTS):
            if self._unique(slot):
                yield slot, self.buffer(slot)

    def in_flight(self) -> int:
        """Requests that were taken and are not answered."""
        words = self._view[_HEADER_BYTES:_OPENS_OFFSET].cast("Q")
        return sum(map(bool, words[_UNIQUE_OFFSET // 8 :: _SLOT_BYTES // 8].tolist()))

    def forget_left_over(self) -> None:
        """The kernel hands all of them out again."""
        for slot, _ in self.left_over():
            self.clear(slot)
            self.give_back(slot)

    def _unique(self, slot: int) -> int:
        value: int = _UNIQUE.unpack_from(self._map, _HEADER_BYTES + slot * _SLOT_BYTES + _UNIQUE_OFFSET)[0]
        return value

    # Open files

    def opened(self, handle: int, node: int) -> bool:
        """Record an open file; False if there is no room for one more."""
        with self._lock:
            if handle in self._opens:
                return True
            if not self._free_rows:
                return False
            row = self._free_rows.pop()
            _OPEN.pack_into(self._map, _OPENS_OFFSET + row * _OPEN.size, handle, node)
            self._opens[handle] = row
            return True

    def released(self, handle: int) -> None:
        with self._lock:
            row = self._opens.pop(handle, None)
            if row is not None:
                _OPEN.pack_into(self._map, _OPENS_OFFSET + row * _OPEN.size, 0, 0)
                self._free_rows.append(row)

    def open_files(self) -> Counter[int]:
        """Node → how often it is open."""
        with self._lock:
            rows = list(self._opens.values())
            return Counter(_OPEN.unpack_from(self._map, _OPENS_OFFSET + row * _OPEN.size)[1] for row in rows)
