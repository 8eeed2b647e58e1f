"""The FUSE session: threads that take requests from /dev/fuse and answer each exactly once.

A thread answers what is on this machine itself and hands a read that must wait for a registry to the event loop, where
it is parked at no cost; so no thread ever waits for a network, and one frozen registry blocks only its own readers (the
measurement behind this is docs/adr/0002-threads-and-a-loop.md). The descriptor belongs to the keeper's session: it is
never closed here in a way that ends the connection.
"""

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from snapshotter import failpoints
from snapshotter.blobs.chunks import Counters
from snapshotter.blobs.reader import Buffer
from snapshotter.errors import SnapshotterError
from snapshotter.ondemand import wire
from snapshotter.ondemand.devices import Device, Devices
from snapshotter.ondemand.inflight import REQUEST_BYTES, SessionMemory
from snapshotter.ondemand.wire import Opcode, Request

log = structlog.get_logger(__name__)

_SPILL_BYTES = 64 << 10  # of a request behind what its slot holds; nothing there is of interest
_NO_REPLY = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
_OPERATIONS = frozenset(Opcode)
_EMPTY_OK = frozenset({Opcode.FLUSH, Opcode.ACCESS, Opcode.READDIR, Opcode.RELEASEDIR, Opcode.DESTROY})


class _Refused(Exception):
    """An errno for the kernel that is nobody's fault."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class Session:
    """Serves `devices` on the FUSE connection `fd`."""

    def __init__(
        self,
        fd: int,
        memory: SessionMemory,
        devices: Devices,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        *,
        threads: int,
        ended: Callable[[], None],
    ) -> None:
        """`ended` is called on the loop when the kernel has ended the connection."""
        self._fd = fd
        self._memory = memory
        self._devices = devices
        self._counters = counters
        self._loop = loop
        self._threads = threads
        self._ended = ended
        self._parked: dict[asyncio.Task[None], float] = {}  # since when, on the monotonic clock

    def start(self) -> None:
        """Take over from a worker that died, then serve. On the loop, and before any image is mounted anew."""
        self._take_over()
        for number in range(self._threads):
            threading.Thread(target=self._work, name=f"fuse-{number}", daemon=True).start()

    @property
    def parked(self) -> int:
        """Reads that wait for a registry."""
        return len(self._parked)

    def oldest_seconds(self) -> float:
        """How long the read that waits longest has waited; 0 if none waits."""
        return time.monotonic() - min(self._parked.values()) if self._parked else 0.0

    def _take_over(self) -> None:
        """See to the requests that the worker before us took and did not answer."""
        if self._memory.initialised and self._memory.flags & wire.HAS_RESEND:
            try:
                os.write(self._fd, wire.notify_resend())
            except OSError as error:
                log.info("kernel does not hand requests out again", error=error.strerror)
            else:
                self._memory.forget_left_over()
                return
        for slot, raw in list(self._memory.left_over()):
            log.info("answering a request of the worker before", slot=slot)
            self._serve(Request.parse(bytes(raw)), slot)

    def _work(self) -> None:
        spill = bytearray(_SPILL_BYTES)
        private = bytearray(REQUEST_BYTES)
        while True:
            # Straight into the shared table: a request is recorded as soon as it is taken.
            slot = self._memory.take()
            buffer = memoryview(private) if slot is None else self._memory.buffer(slot)
            try:
                taken = os.readv(self._fd, [buffer, spill])
            except OSError as error:
                if slot is not None:
                    self._memory.give_back(slot)
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                log.error("FUSE session ended", error=error.strerror)
                self._loop.call_soon_threadsafe(self._ended)
                return
            request = Request.parse(bytes(buffer[:taken]))
            if request.opcode == Opcode.READ:
                failpoints.hit("blobd.read.taken")
            self._serve(request, slot)

    def _serve(self, request: Request, slot: int | None) -> None:
        """Answer a request, or park it on the loop."""
        try:
            if request.opcode == Opcode.READ:
                self._read(request, slot)
                return
            body = self._control(request)
            if body is None:
                self._done(slot)
            else:
                self._reply(request, slot, [body])
        except _Refused as error:
            self._counters.failed(_operation(request), error.number)
            self._answer(slot, [wire.reply(request.unique, 0, error.number)])
        except SnapshotterError as error:
            self._refuse(request, slot, str(error), error.reason)
        except Exception:  # the kernel must get an answer, whatever happened
            log.exception("FUSE request failed", opcode=request.opcode)
            self._refuse(request, slot, "internal error", "internal")

    def _read(self, request: Request, slot: int | None) -> None:
        offset, length = wire.read_in(request.body)
        device = self._devices.find(request.node)
        if device is None:
            self._counters.add("reads")
            self._refuse(request, slot, "no such image is attached", "not-attached")
            return
        pieces = device.cached(offset, length)
        device.counters.read(hit=pieces is not None)
        if pieces is not None:
            self._reply(request, slot, pieces)
        else:
            self._loop.call_soon_threadsafe(self._park, request, slot, device)

    def _park(self, request: Request, slot: int | None, device: Device) -> None:
        task = self._loop.create_task(self._wait(request, slot, device))
        self._parked[task] = time.monotonic()
        task.add_done_callback(self._parked.pop)

    async def _wait(self, request: Request, slot: int | None, device: Device) -> None:
        failpoints.hit("blobd.read.parked")
        offset, length = wire.read_in(request.body)
        begin = time.monotonic()
        try:
            pieces = await device.read(offset, length)
        except SnapshotterError as error:
            device.counters.note("read-failed", device=device.node & 0xFF, offset=offset, reason=error.reason)
            self._refuse(request, slot, str(error), error.reason)
        except asyncio.CancelledError:
            self._refuse(request, slot, "the image was detached", "detached")
        except Exception:
            log.exception("FUSE read failed", node=request.node)
            self._refuse(request, slot, "internal error", "internal")
        else:
            self._reply(request, slot, pieces)
        finally:
            device.counters.waited(time.monotonic() - begin, device.node & 0xFF, offset, length)

    def _control(self, request: Request) -> bytes | None:
        """Body of the reply to anything but a READ; None if there is none. Raises SnapshotterError."""
        opcode, node = request.opcode, request.node
        if opcode == Opcode.LOOKUP:
            found = self._devices.lookup(wire.name_in(request.body)) if node == wire.ROOT_NODE else None
            if found is None:
                raise _Refused(errno.ENOENT)
            return wire.entry_out(found.node, found.size)
        if opcode == Opcode.GETATTR:
            device = self._devices.find(node)
            if device is None and node != wire.ROOT_NODE:
                raise _Refused(errno.ENOENT)
            return wire.attr_out(node, device.size if device else 0)
        if opcode == Opcode.OPEN:
            return self._open(request)
        if opcode == Opcode.RELEASE:
            self._memory.released(wire.handle_in(request.body))
            return b""
        if opcode == Opcode.STATFS:
            return wire.statfs_out()
        if opcode == Opcode.OPENDIR:
            return wire.open_out(0)
        if opcode == Opcode.INIT:
            return self._init(request)
        if opcode in _NO_REPLY:
            return None
        if opcode in _EMPTY_OK:
            return b""
        raise _Refused(errno.ENOSYS)

    def _open(self, request: Request) -> bytes:
        if self._devices.find(request.node) is None:
            raise _Refused(errno.ENOENT)
        handle = request.unique & ~wire.UNIQUE_RESEND
        if not self._memory.opened(handle, request.node):
            raise _Refused(errno.ENFILE)
        return wire.open_out(handle)

    def _init(self, request: Request) -> bytes:
        flags, body = wire.negotiate(
            wire.Init.parse(request.body),
            async_dio=wire.async_dio_is_safe(os.uname().release),
            resend=not failpoints.enabled("blobd.no-resend"),
        )
        self._memory.set_initialised(flags)
        log.info("FUSE session initialised", flags=f"{flags:#x}", resend=bool(flags & wire.HAS_RESEND))
        return body

    def _refuse(self, request: Request, slot: int | None, why: str, reason: str) -> None:
        """Answer EIO: whatever the cause, the reader's bytes are not there."""
        self._counters.failed(_operation(request), errno.EIO, reason)
        log.warning("read failed", node=request.node, opcode=request.opcode, error=why)
        self._answer(slot, [wire.reply(request.unique, 0, errno.EIO)])

    def _reply(self, request: Request, slot: int | None, body: Sequence[Buffer]) -> None:
        self._answer(slot, [wire.reply(request.unique, sum(map(len, body))), *body])

    def _answer(self, slot: int | None, parts: Sequence[Buffer]) -> None:
        failpoints.hit("blobd.reply")
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            # ENOENT: answered before, or the reader was killed. ENODEV: the connection is gone.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.error("FUSE reply refused", error=error.strerror)
        failpoints.hit("blobd.replied")
        self._done(slot)

    def _done(self, slot: int | None) -> None:
        if slot is not None:
            self._memory.clear(slot)
            self._memory.give_back(slot)


def _operation(request: Request) -> str:
    """Its name, in metrics."""
    return Opcode(request.opcode).name.lower() if request.opcode in _OPERATIONS else "other"
