"""Carries connections from the keeper's listening socket to gRPC, and tells who may have what answered.

gRPC cannot take over a listening socket and knows nothing about a unix peer. So connections are accepted here, and
their bytes go to a unix socket that gRPC has bound: to that of the service, or, for a client in another mount
namespace (which would see empty directories where we mount images), to that of a server that refuses every call.
"""

import asyncio
import os
import socket
from pathlib import Path

import structlog

from snapshotter import control

log = structlog.get_logger(__name__)

_CONNECT_SECONDS = 10.0


class Relay:
    """`listener`, a bound socket that may or may not listen yet, stays the caller's. Only root is served."""

    def __init__(self, listener: socket.socket, service: Path, refusal: Path) -> None:
        self._listener = listener
        self._service, self._refusal = str(service), str(refusal)
        self._accepting: asyncio.Task[None]
        self._open: set[_End] = set()

    def start(self) -> None:
        self._listener.setblocking(False)
        self._listener.listen(control.BACKLOG)
        self._accepting = asyncio.create_task(self._accept())

    async def pause(self) -> None:
        """Accept no more: new connections wait in the socket's backlog for the next process."""
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)

    async def stop(self) -> None:
        """Accept no more and drop every connection."""
        await self.pause()
        for end in list(self._open):
            end.transport.abort()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # EMFILE, ECONNABORTED
                log.error("cannot accept a connection", error=str(error))
                await asyncio.sleep(0.1)
                continue
            try:
                await self._connect(client)
            except OSError as error:
                log.error("cannot relay a connection", error=str(error))
                client.close()

    async def _connect(self, client: socket.socket) -> None:
        if not control.peer_is_root(client):
            client.close()
            return
        shared = in_our_mount_namespace(client)
        if not shared:
            log.error("client is in another mount namespace and is refused", pid=control.peer_pid(client))
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, server = await loop.create_unix_connection(_End, self._service if shared else self._refusal)
        try:
            _, outer = await loop.connect_accepted_socket(_End, client)
        except BaseException:
            server.transport.abort()
            raise
        for end, other in ((server, outer), (outer, server)):
            end.join(other, self._open)


class _End(asyncio.Protocol):
    """One of the two sockets of a connection: what it receives, the other one sends, no faster than that is read."""

    transport: asyncio.Transport
    _other: "_End"

    def __init__(self) -> None:
        self._early: list[bytes] = []
        self._ended = False  # it sends no more

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.pause_reading()  # until there is somebody to pass it on to

    def join(self, other: "_End", registry: "set[_End]") -> None:
        self._other, self._registry = other, registry
        registry.add(self)
        # Before Python 3.11.4 a transport reads once although it was paused in connection_made.
        other.transport.writelines(self._early)
        self._early.clear()
        if self.transport.is_closing():
            other.transport.abort()
        else:
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if hasattr(self, "_other"):
            self._other.transport.write(data)
        else:
            self._early.append(data)

    def pause_writing(self) -> None:
        self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        self._other.transport.resume_reading()

    def eof_received(self) -> bool:
        if not hasattr(self, "_other"):
            return False
        self._ended = True
        self._other.transport.write_eof()
        return not self._other._ended  # the other direction stays open until it ends, too

    def connection_lost(self, _error: Exception | None) -> None:
        if hasattr(self, "_other"):
            self._registry.discard(self)
            self._other.transport.close()


def in_our_mount_namespace(client: socket.socket) -> bool:
    """False also for a process that is gone or not visible here: nobody can say where its mounts are."""
    pid = control.peer_pid(client)
    try:
        return pid > 0 and os.path.samefile(f"/proc/{pid}/ns/mnt", "/proc/self/ns/mnt")
    except OSError:
        return False
