"""The gRPC server: the snapshot service and its refusing twin on inner sockets, the relay in front of both."""

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from snapshotter.api.snapshots_pb2_grpc import add_SnapshotsServicer_to_server
from snapshotter.service.interceptors import ErrorInterceptor
from snapshotter.service.relay import Relay
from snapshotter.service.snapshots import SnapshotsService
from snapshotter.snapshots.snapshotter import Snapshotter

MAX_MESSAGE = 16 << 20  # as containerd's
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.so_reuseport", 0),
)
REFUSAL = (
    "the snapshotter does not share the client's mount namespace (or cannot see its process), so the client would see "
    "empty directories: run both in the same one; no PrivateMounts= and no other sandboxing of mounts in the systemd "
    "unit, and from a container nsenter --target 1 --mount"
)


class Server:
    """Serves on `start`'s listener until `stop`; grpc.sock and refuse.sock in `root` are its own."""

    def __init__(self, snapshotter: Snapshotter, root: Path) -> None:
        self._root = root
        self.calls = ErrorInterceptor()
        self._service = grpc.aio.server(interceptors=(self.calls,), options=_OPTIONS)
        add_SnapshotsServicer_to_server(SnapshotsService(snapshotter), self._service)
        self._refusing = grpc.aio.server(handlers=(_Refusal(),), options=_OPTIONS)

    async def start(self, listener: socket.socket) -> None:
        """`listener` is a listening unix stream socket and stays the caller's."""
        paths = []
        for server, name in ((self._service, "grpc.sock"), (self._refusing, "refuse.sock")):
            path = self._root / name
            path.unlink(missing_ok=True)  # whoever bound it is gone: there is one process of this kind per root
            before = os.umask(0o177)
            try:
                server.add_insecure_port(f"unix:{quote(str(path))}")
            finally:
                os.umask(before)
            await server.start()
            paths.append(path)
        self._relay = Relay(listener, *paths)
        self._relay.start()

    async def stop(self, grace: float) -> None:
        """Let running calls end within `grace` seconds. New connections wait for the next process."""
        await self._relay.pause()
        await self._service.stop(grace)
        await self._refusing.stop(0)
        await self._relay.stop()


class _Refusal(grpc.GenericRpcHandler):
    """Answers every method, streaming or not, with the setting to change."""

    def service(self, _details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        async def refuse(_request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, REFUSAL, (("reason", "mount-namespace"),))

        return grpc.unary_unary_rpc_method_handler(refuse)
