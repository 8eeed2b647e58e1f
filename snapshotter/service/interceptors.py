"""Where a call begins and ends: it gets an id, is measured and logged, and its error becomes a gRPC status.

A status has a code, a message for people, and trailing metadata `reason` for machines.
"""

import errno
import itertools
import re
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from snapshotter.errors import Exhausted, FailedPrecondition, InvalidArgument, SnapshotterError
from snapshotter.log import bind_request
from snapshotter.monitor.tally import Counts, Histograms

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Decode: TypeAlias = Callable[[bytes], Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"  # generic only in the stubs

SLOW_SECONDS = 1.0  # a call that takes longer is logged at level info
# The ordinary answers of a snapshot service. Any other reason says why an image is refused, and since containerd passes
# on nothing but the message, it is in there too.
_ORDINARY = {"", "not-found", "already-exists", "invalid-argument", "failed-precondition"}
_NAMESPACE = "containerd-namespace"
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")  # W3C Trace Context
_GIVEN = re.compile(r"[0-9A-Za-z._-]{1,64}")
_NAME_CHARACTERS = 120  # of a key in the log


_ERRNOS = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_READONLY: errno.EROFS}  # by primary result code


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler; an error that is not a SnapshotterError is a bug: logged here, INTERNAL over there."""

    def __init__(self) -> None:
        self.seconds = Histograms()  # by method and code
        self.refusals = Counts()  # by reason, the ordinary answers left out
        self.running = 0
        self._ids = map(f"{secrets.token_hex(4)}-{{:x}}".format, itertools.count(1))

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        decode, encode = handler.request_deserializer or bytes, handler.response_serializer
        if handler.response_streaming:
            stream = self._guard_stream(details, decode, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(stream, response_serializer=encode)
        unary = self._guard_unary(details, decode, handler.unary_unary)
        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=encode)

    def _guard_unary(self, details: grpc.HandlerCallDetails, decode: Decode, call: Any) -> Any:
        async def guarded(raw: bytes, context: Context) -> Any:
            with _Call(self, details, next(self._ids)) as running:
                try:
                    return await call(running.decoded(decode, raw), context)
                except Exception as error:  # noqa: BLE001 - every error has to become a status
                    await running.abort(context, error)

        return guarded

    def _guard_stream(self, details: grpc.HandlerCallDetails, decode: Decode, call: Any) -> Any:
        async def guarded(raw: bytes, context: Context) -> AsyncIterator[Any]:
            with _Call(self, details, next(self._ids)) as running:
                try:
                    async for response in call(running.decoded(decode, raw), context):
                        yield response
                except Exception as error:  # noqa: BLE001 - every error has to become a status
                    await running.abort(context, error)

        return guarded


class _Call:
    """One RPC from its first to its last moment."""

    def __init__(self, owner: ErrorInterceptor, details: grpc.HandlerCallDetails, made_id: str) -> None:
        self._owner = owner
        self._method = str(details.method).rpartition("/")[2]
        self._request: Any = None
        metadata: Any = details.invocation_metadata or ()
        self._namespace = next((str(value) for key, value in metadata if key == _NAMESPACE), "")
        bind_request(given_id(metadata) or made_id)
        self._fields: dict[str, Any] = {}
        self._reason = ""
        self._code = "OK"

    def __enter__(self) -> "_Call":
        self._owner.running += 1
        self._begin = time.monotonic()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        seconds = time.monotonic() - self._begin
        self._owner.running -= 1
        if error is not None and not isinstance(error, Exception):  # the client has gone
            self._code = "CANCELLED"
        self._owner.seconds.observe(seconds, self._method, self._code)
        ordinary = self._reason in _ORDINARY
        if not ordinary:
            self._owner.refusals.add(self._reason)
        told = log.debug if ordinary and seconds < SLOW_SECONDS else log.info
        told(
            "rpc",
            method=self._method,
            key=_key(self._request),
            namespace=self._namespace[:_NAME_CHARACTERS],
            seconds=round(seconds, 4),
            code=self._code,
            **self._fields,
        )

    def decoded(self, decode: Decode, raw: bytes) -> Any:
        """Here and not in gRPC, which would log a traceback and answer UNKNOWN."""
        try:
            self._request = decode(raw)
        except DecodeError as error:
            raise InvalidArgument(f"request cannot be decoded: {error}") from None
        return self._request

    async def abort(self, context: Context, error: Exception) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):  # answered already
            raise error
        known = translate(error)
        self._reason = known.reason if known else "internal"
        self._code = known.status if known else "INTERNAL"
        if known is None:
            log.error("unexpected error", method=self._method, exc_info=error)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error", (("reason", "internal"),))
        text = str(known)
        self._fields = {"reason": known.reason, "error": text}
        if known.reason not in _ORDINARY:
            text = f"{text} reason={known.reason}"
        await context.abort(grpc.StatusCode[known.status], text, (("reason", known.reason),))


def given_id(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The id that the client sends along: the trace id of `traceparent`, or `x-request-id` if it is a plain word."""
    found = {key: value for key, value in metadata if key in ("traceparent", "x-request-id")}
    trace = _TRACE.fullmatch(str(found.get("traceparent", ""))[:100])
    if trace:
        return trace[1]
    given = _GIVEN.fullmatch(str(found.get("x-request-id", ""))[:100])
    return given[0] if given else ""


def _key(request: Any) -> str:
    """What a request is about."""
    name = getattr(request, "key", "") or getattr(request, "name", "")
    if not name and hasattr(request, "info"):
        name = request.info.name
    return str(name)[:_NAME_CHARACTERS]


def translate(error: Exception) -> SnapshotterError | None:
    """The error as one of ours; None for a bug."""
    if isinstance(error, SnapshotterError):
        return error
    if isinstance(error, OSError):
        return _unwritable(error.errno, f"state directory: {error.strerror}")
    if isinstance(error, sqlite3.OperationalError):
        return _unwritable(_ERRNOS.get(error.sqlite_errorcode & 0xFF), f"metadata database: {error}")
    return None


def _unwritable(number: int | None, text: str) -> SnapshotterError:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return Exhausted(text, hint="make room on the disk of root")
    if number in (errno.EMFILE, errno.ENFILE):
        return Exhausted(text, reason="no-descriptors", hint="raise LimitNOFILE=")
    if number == errno.EROFS:
        return FailedPrecondition(text, reason="read-only", hint="the disk of root must be writable")
    return SnapshotterError(text)
