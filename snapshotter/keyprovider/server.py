"""The key provider as a gRPC service: on loopback, or on a Unix socket of its owner alone."""

import os
import socket
from pathlib import Path
from urllib.parse import quote

import grpc.aio
from google.protobuf.wrappers_pb2 import BytesValue

from snapshotter import control
from snapshotter.errors import InvalidArgument, Unavailable
from snapshotter.keyprovider.answers import REQUEST_BYTES, Answers, Operation
from snapshotter.keys.http import is_loopback
from snapshotter.keys.protocol import UNWRAP_METHOD, WRAP_METHOD
from snapshotter.service.interceptors import Context, ErrorInterceptor

_OPTIONS = (
    ("grpc.max_receive_message_length", REQUEST_BYTES),
    ("grpc.so_reuseport", 0),
)
_CALLS = 16  # at a time


class KeyProviderServer:
    """Serves `answers` to whoever may connect: every process of this machine (loopback), or of this user (socket)."""

    def __init__(self, answers: Answers) -> None:
        self._server = grpc.aio.server(
            interceptors=(ErrorInterceptor(),), options=_OPTIONS, maximum_concurrent_rpcs=_CALLS
        )
        self._path: Path | None = None

        def method(operation: Operation) -> "grpc.RpcMethodHandler[BytesValue, BytesValue]":
            async def handle(request: BytesValue, _context: Context) -> BytesValue:
                return BytesValue(value=await answers.answer(request.value, operation))

            return grpc.unary_unary_rpc_method_handler(handle, BytesValue.FromString, BytesValue.SerializeToString)

        service = WRAP_METHOD.split("/")[1]
        names: dict[str, Operation] = {WRAP_METHOD: "keywrap", UNWRAP_METHOD: "keyunwrap"}
        methods = {name.rpartition("/")[2]: method(operation) for name, operation in names.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))

    async def start(self, address: tuple[str, int] | str) -> str:
        """Listen at host and port, or at a path. The address for clients. Raises InvalidArgument, Unavailable."""
        bound = self._bind_path(Path(address)) if isinstance(address, str) else self._bind_port(*address)
        await self._server.start()
        return bound

    async def stop(self) -> None:
        await self._server.stop(1)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _bind_path(self, path: Path) -> str:
        try:
            control.remove_stale(str(path), socket.SOCK_STREAM)
            before = os.umask(0o177)
            try:
                self._server.add_insecure_port(f"unix:{quote(str(path))}")
            finally:
                os.umask(before)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "cannot listen"
            raise Unavailable(f"--listen unix:{path}: {reason}") from None
        self._path = path
        return f"unix://{path}"

    def _bind_port(self, host: str, port: int) -> str:
        if not is_loopback(host):
            raise InvalidArgument(f"--listen {host}: loopback only: whoever connects gets layer keys")
        shown = f"[{host}]" if ":" in host else host
        try:
            return f"{shown}:{self._server.add_insecure_port(f'{shown}:{port}')}"
        except RuntimeError:
            raise Unavailable(f"--listen {shown}:{port}: cannot listen") from None
