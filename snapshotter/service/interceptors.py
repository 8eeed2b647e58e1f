"""Where errors become gRPC statuses: code, message for people, trailing metadata `reason` for machines."""

import errno
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog

from snapshotter.errors import Exhausted, SnapshotterError

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"  # generic only in the stubs

# The ordinary answers of a snapshot service. Any other reason says why an image is refused, and since containerd passes
# on nothing but the message, it is in there too.
_ORDINARY = {"not-found", "already-exists", "invalid-argument", "failed-precondition"}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler; an error that is not a SnapshotterError is a bug: logged here, INTERNAL over there."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        method = str(details.method).rpartition("/")[2]
        coding: Any = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_guard_stream(method, handler.unary_stream), **coding)
        return grpc.unary_unary_rpc_method_handler(_guard_unary(method, handler.unary_unary), **coding)


def _guard_unary(method: str, call: Any) -> Any:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await call(request, context)
        except Exception as error:  # noqa: BLE001 - every error has to become a status
            await _abort(method, context, error)

    return guarded


def _guard_stream(method: str, call: Any) -> Any:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for response in call(request, context):
                yield response
        except Exception as error:  # noqa: BLE001 - every error has to become a status
            await _abort(method, context, error)

    return guarded


async def _abort(method: str, context: Context, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):  # answered already
        raise error
    known = translate(error)
    if known is None:
        log.error("unexpected error", rpc=method, exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error", (("reason", "internal"),))
    text = str(known)
    if known.reason not in _ORDINARY:
        log.info("refused", rpc=method, reason=known.reason, error=text)
        text = f"{text} reason={known.reason}"
    await context.abort(grpc.StatusCode[known.status], text, (("reason", known.reason),))


def translate(error: Exception) -> SnapshotterError | None:
    """The error as one of ours; None for a bug."""
    if isinstance(error, SnapshotterError):
        return error
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return (Exhausted if full else SnapshotterError)(f"state directory: {error.strerror}")
    if isinstance(error, sqlite3.OperationalError):
        full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
        return (Exhausted if full else SnapshotterError)(f"metadata database: {error}")
    return None
