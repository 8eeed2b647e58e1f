"""Messages and file descriptors between the processes of one node, over AF_UNIX SOCK_SEQPACKET.

A message is one JSON object, at most 4 MiB, sent as packets that begin with `+` (more follows) or `.` (last one); file
descriptors ride on the first packet. Every peer is root on this machine, which `AsyncServer` checks; what it sends is
still bounded and checked. Standard library only, and asyncio only where a server is run: the keeper imports this.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    import logging
    from pathlib import Path

Message = dict[str, Any]
Reply = tuple[Message, Sequence[int]]
Handler = Callable[[Message, list[int]], "Awaitable[Reply | AsyncIterator[Reply]]"]

MAX_MESSAGE = 4 << 20
MAX_FDS = 8  # of one message
_PACKET = 48 << 10  # well below the default socket buffer, so that one packet always fits
BACKLOG = 1024  # a connection above it fails at once


class ControlError(OSError):
    """The peer answered with an error; `reason` is its one-word cause."""

    def __init__(self, text: str, reason: str = "internal") -> None:
        super().__init__(text)
        self.reason = reason


def send(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one message. The caller keeps `fds`. Raises OSError, EMSGSIZE for more than `MAX_MESSAGE` or `MAX_FDS`."""
    for packet, ancillary in _packets(message, fds):
        sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[Message, list[int]]:
    """Receive one message; its fds are CLOEXEC and belong to the caller.

    Raises EOFError when the peer has closed, ConnectionResetError if it did so without reading what we sent.
    """
    with _Assembly() as assembly:
        while (message := assembly.take(sock)) is None:
            pass
        return message, assembly.release()


def connect(path: str | Path, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout)
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def request(
    path: str | Path, message: Message, fds: Sequence[int] = (), timeout: float = 10.0
) -> tuple[Message, list[int]]:
    """Connect, send, receive one answer, close. Raises ControlError if that answer is an error, OSError or EOFError."""
    with connect(path, timeout) as sock:
        send(sock, message, fds)
        answer, received = receive(sock)
    if "error" in answer:
        close_all(received)
        raise ControlError(str(answer["error"]), str(answer.get("reason", "internal")))
    return answer, received


async def request_async(path: str | Path, message: Message) -> Message:
    """Like `request`, without descriptors, on the running loop and for as long as the caller waits."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        sock.connect(str(path))  # done at once, or refused: EAGAIN if too many wait already
        await _send_async(sock, message, ())
        with _Assembly() as assembly:
            while (answer := await _nonblocking(sock, "add_reader", partial(assembly.take, sock))) is None:
                pass
    if "error" in answer:
        raise ControlError(str(answer["error"]), str(answer.get("reason", "internal")))
    found: Message = answer
    return found


def fetch_all(path: str | Path, message: Message, timeout: float = 10.0) -> tuple[dict[str, int], Message]:
    """Ask for a stream of `{"name": N}` + one fd, ended by `{"end": true, …}`; returns {N: fd} and the last message."""
    found: dict[str, int] = {}
    try:
        with connect(path, timeout) as sock:
            send(sock, message)
            while True:
                answer, fds = receive(sock)
                if "error" in answer or answer.get("end") or len(fds) != 1 or not isinstance(answer.get("name"), str):
                    close_all(fds)
                    if answer.get("end"):
                        return found, answer
                    raise ControlError(str(answer.get("error", "malformed stream")), str(answer.get("reason", "")))
                close_all([found.pop(answer["name"])] if answer["name"] in found else [])
                found[answer["name"]] = fds[0]
    except BaseException:
        close_all(found.values())
        raise


def stream(path: str | Path, message: Message, timeout: float = 10.0) -> Iterator[Message]:
    """The messages of an answer that ends with `{"end": true, …}`, that last one included; descriptors are dropped.

    `timeout` seconds may pass before each. Raises ControlError, OSError or EOFError.
    """
    with connect(path, timeout) as sock:
        send(sock, message)
        while True:
            answer, received = receive(sock)
            close_all(received)
            if "error" in answer:
                raise ControlError(str(answer["error"]), str(answer.get("reason", "internal")))
            yield answer
            if answer.get("end"):
                return


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def listen(path: str | Path) -> socket.socket:
    """Bind and listen for control connections at `path`. Raises as `bind`."""
    sock = bind(path, socket.SOCK_SEQPACKET)
    sock.listen(BACKLOG)
    return sock


def bind(path: str | Path, kind: int) -> socket.socket:
    """A socket at `path`, mode 0600, that refuses connections until somebody listens on it.

    A file left there goes only after proving that nobody answers. Raises OSError(EADDRINUSE) if somebody does, or if
    `path` is no socket.
    """
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        remove_stale(str(path), kind)
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        except OSError as error:
            raise OSError(error.errno or errno.ENAMETOOLONG, error.strerror or str(error), str(path)) from None
        finally:
            os.umask(before)
    except BaseException:
        sock.close()
        raise
    return sock


def remove_stale(path: str, kind: int) -> None:
    """Unlink a socket on which nobody listens. Raises OSError(EADDRINUSE) if somebody does, or if it is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EADDRINUSE, "exists and is no socket", path)
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except (TimeoutError, BlockingIOError):
        pass  # a full backlog: somebody owns it
    except OSError as error:
        if error.errno != errno.EPROTOTYPE:  # somebody's socket of another kind
            raise
    raise OSError(errno.EADDRINUSE, "another process listens here", path)


def take_lock(path: str | Path, timeout: float = 0.0) -> int:
    """Take the exclusive lock on `path` and write our pid into it; returns the fd that holds it (CLOEXEC).

    Tries for `timeout` seconds, then raises BlockingIOError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(fd)
                raise
            time.sleep(0.05)
        else:
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
            return fd


def lock_holder(path: str | Path) -> int | None:
    """Pid of the process that holds the lock on `path`, None if it is free."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        for _ in range(100):  # between taking the lock and writing the pid there is a moment
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                text = os.pread(fd, 32, 0)
            if text.endswith(b"\n") and os.path.exists(f"/proc/{int(text)}"):
                return int(text)
            time.sleep(0.01)
        raise OSError(errno.EBUSY, "locked by a process that does not say who it is", str(path))
    finally:
        os.close(fd)


class AsyncServer:
    """Answers control messages on a listening SEQPACKET socket. One task per connection, requests of one in order.

    `handler(message, fds)` returns one reply (message, fds to send along; the handler's caller never closes those) or
    an async iterator of replies for a stream, the last of which is `{"end": true, …}`. Received fds that the handler
    wants to keep it takes out of the list (`fds.pop()`); what it leaves there is closed. An exception becomes
    `{"error": text, "reason": word}`; one without a `reason` attribute is a bug and is logged with its traceback.
    """

    def __init__(self, listener: socket.socket, handler: Handler) -> None:
        self._listener = listener
        self._handler = handler
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to accept on the running loop. The listening socket stays the caller's."""
        import asyncio

        self._listener.setblocking(False)
        self._spawn(asyncio.get_running_loop(), self._accept())

    async def stop(self) -> None:
        """Stop accepting and drop every connection."""
        import asyncio

        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, loop: asyncio.AbstractEventLoop, work: Any) -> None:
        task = loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # EMFILE, ECONNABORTED: this connection is lost, the next may do
                _log().error("control socket cannot accept: %s", error)
                await asyncio.sleep(0.1)
                continue
            if peer_is_root(sock):
                sock.setblocking(False)
                self._spawn(loop, self._connection(sock))
            else:
                sock.close()

    async def _connection(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(EOFError, OSError):
            while True:
                with _Assembly() as assembly:
                    while (message := await _nonblocking(sock, "add_reader", partial(assembly.take, sock))) is None:
                        pass
                    fds = assembly.release()
                try:
                    await self._answer(sock, message, fds)
                finally:
                    close_all(fds)

    async def _answer(self, sock: socket.socket, message: Message, fds: list[int]) -> None:
        try:
            answer = await self._handler(message, fds)
            if isinstance(answer, tuple):
                await _send_async(sock, *answer)
            else:
                async for part in answer:
                    await _send_async(sock, *part)
        except Exception as error:  # noqa: BLE001 - the peer gets the text, the log the traceback
            if not hasattr(error, "reason"):
                _log().exception("control request %r failed", message.get("op"))
            await _send_async(sock, {"error": str(error), "reason": getattr(error, "reason", "internal")}, ())


def _log() -> logging.Logger:
    import logging

    return logging.getLogger(__name__)


def peer_is_root(sock: socket.socket) -> bool:
    """Whether the process that connected `sock` is root (or ourselves, where tests run without root)."""
    return _credentials(sock)[1] in (0, os.geteuid())


def peer_pid(sock: socket.socket) -> int:
    """The process that connected `sock`; 0 if it is in a process namespace that we do not see into."""
    return _credentials(sock)[0]


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Process, user and group of the peer at connect(2)."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


async def _send_async(sock: socket.socket, message: Message, fds: Sequence[int]) -> None:
    for packet, ancillary in _packets(message, fds):
        await _nonblocking(sock, "add_writer", partial(sock.sendmsg, [packet], ancillary, socket.MSG_NOSIGNAL))


async def _nonblocking(sock: socket.socket, register: str, call: Callable[[], Any]) -> Any:
    """Run `call` on a non-blocking socket, waiting on the loop for as long as it would block."""
    import asyncio

    loop = asyncio.get_running_loop()
    while True:
        try:
            return call()
        except BlockingIOError:
            ready: asyncio.Future[None] = loop.create_future()
            getattr(loop, register)(sock, lambda f=ready: f.done() or f.set_result(None))
            try:
                await ready
            finally:
                getattr(loop, register.replace("add", "remove"))(sock)


def _packets(message: Mapping[str, Any], fds: Sequence[int]) -> Iterator[tuple[bytes, list[tuple[int, int, Any]]]]:
    raw = json.dumps(message, separators=(",", ":")).encode()
    if len(raw) > MAX_MESSAGE or len(fds) > MAX_FDS:
        raise OSError(errno.EMSGSIZE, f"control message of {len(raw)} bytes and {len(fds)} descriptors")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    for offset in range(0, len(raw), _PACKET):
        last = offset + _PACKET >= len(raw)
        yield (b"." if last else b"+") + raw[offset : offset + _PACKET], ancillary
        ancillary = []


class _Assembly:
    """Collects the packets and descriptors of one message; closes the descriptors unless `release` handed them out."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self._fds: list[int] = []

    def __enter__(self) -> _Assembly:
        return self

    def __exit__(self, *_: object) -> None:
        close_all(self._fds)

    def release(self) -> list[int]:
        fds, self._fds = self._fds, []
        return fds

    def take(self, sock: socket.socket) -> Message | None:
        """Receive one packet; the message once it is complete."""
        space = socket.CMSG_SPACE(4 * MAX_FDS)
        packet, ancillary, flags, _ = sock.recvmsg(_PACKET + 1, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += array.array("i", data[: len(data) - len(data) % 4])
        if not packet:
            raise EOFError("control connection closed")
        self._raw += packet[1:]
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(self._raw) > MAX_MESSAGE or len(self._fds) > MAX_FDS:
            raise ControlError("control message exceeds its bounds", "limit")
        if packet[:1] == b"+":
            return None
        try:
            message = json.loads(self._raw)
        except (ValueError, RecursionError) as error:
            raise ControlError(f"control message is no JSON: {error}", "malformed") from None
        if not isinstance(message, dict):
            raise ControlError("control message is no object", "malformed")
        return message
