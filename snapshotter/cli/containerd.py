"""containerd's images and content store over its gRPC API, as far as `materialize` needs them."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self, TypeAlias

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from snapshotter.api import content_pb2, content_pb2_grpc, images_pb2, images_pb2_grpc
from snapshotter.digest import Digest
from snapshotter.errors import (
    DigestMismatch,
    Exhausted,
    FailedPrecondition,
    LimitExceeded,
    NotFound,
    SnapshotterError,
    Unauthorized,
    Unavailable,
)

_SECONDS = 30.0
_PIECE = 1 << 20  # bytes of one message; containerd takes up to 16 MiB
_ERRORS: Mapping[grpc.StatusCode, type[SnapshotterError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.PERMISSION_DENIED: Unauthorized,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
}


Rest: TypeAlias = Callable[[int], AsyncGenerator[bytes, None]]  # the bytes of a blob from an offset to its end


class Target(NamedTuple):
    """What an image's name stands for: a manifest or an index."""

    media_type: str
    digest: Digest
    size: int


class Containerd:
    """One namespace of the containerd that listens on `socket`. Use as an async context manager."""

    def __init__(self, socket: Path, namespace: str) -> None:
        self._socket = socket
        self._metadata = (("containerd-namespace", namespace),)

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(f"unix:{self._socket}")
        self._content: Any = content_pb2_grpc.ContentStub(self._channel)
        self._images: Any = images_pb2_grpc.ImagesStub(self._channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def image(self, name: str) -> Target:
        """Raises NotFound, Unavailable."""
        with self._errors(f"image {name}"):
            request = images_pb2.GetImageRequest(name=name)
            answer = await self._images.Get(request, metadata=self._metadata, timeout=_SECONDS)
        target = answer.image.target
        return Target(target.media_type, Digest.parse(target.digest), target.size)

    async def labels(self, digest: Digest) -> dict[str, str] | None:
        """The labels of a blob in the content store; None if it is not there."""
        try:
            with self._errors(f"content {digest}"):
                request = content_pb2.InfoRequest(digest=digest)
                answer = await self._content.Info(request, metadata=self._metadata, timeout=_SECONDS)
        except NotFound:
            return None
        return dict(answer.info.labels)

    async def add_labels(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Set these labels and leave the others."""
        with self._errors(f"content {digest}"):
            request = content_pb2.UpdateRequest(
                info=content_pb2.Info(digest=digest, labels=labels),
                update_mask=FieldMask(paths=[f"labels.{name}" for name in labels]),
            )
            await self._content.Update(request, metadata=self._metadata, timeout=_SECONDS)

    async def read(self, digest: Digest, limit: int) -> bytes:
        """A small blob. Raises NotFound, LimitExceeded, DigestMismatch."""
        raw = bytearray()
        with self._errors(f"content {digest}"):
            request = content_pb2.ReadContentRequest(digest=digest)
            async for piece in self._content.Read(request, metadata=self._metadata, timeout=_SECONDS):
                raw += piece.data
                if len(raw) > limit:
                    raise LimitExceeded(f"content {digest}: larger than {limit} bytes")
        if hashlib.sha256(raw).hexdigest() != digest.hex:
            raise DigestMismatch(f"content {digest}: containerd has something else under this digest")
        return bytes(raw)

    async def write(
        self, digest: Digest, size: int, labels: Mapping[str, str], rest: Rest, advance: Callable[[int], None]
    ) -> None:
        """Store a blob, going on where an earlier attempt ended. containerd hashes all of it before it believes it.

        `advance` is told of bytes that are there. Raises DigestMismatch, and what was written is then gone.
        """
        reference = f"layer-{digest}"  # as containerd's own pulls call it: two never write the same
        call = self._content.Write(metadata=self._metadata)
        try:
            with self._errors(f"blob {digest}"):
                begin = _request(content_pb2.STAT, ref=reference, total=size, expected=digest)
                place = (await _exchange(call, begin)).offset
                advance(place)
                async with aclosing(rest(place)) as pieces:
                    async for piece in pieces:
                        for start in range(0, len(piece), _PIECE):
                            part = piece[start : start + _PIECE]
                            await _exchange(call, _request(content_pb2.WRITE, offset=place, data=part))
                            place += len(part)
                            advance(len(part))
                await _exchange(
                    call, _request(content_pb2.COMMIT, offset=place, total=size, expected=digest, labels=labels)
                )
        except _Exists:
            return  # somebody else has stored it meanwhile
        except (DigestMismatch, FailedPrecondition) as error:
            call.cancel()
            await self._abort(reference)
            raise DigestMismatch(str(error)) from error
        finally:
            call.cancel()

    async def _abort(self, reference: str) -> None:
        with self._errors(f"ingest {reference}"):
            request = content_pb2.AbortRequest(ref=reference)
            await self._content.Abort(request, metadata=self._metadata, timeout=_SECONDS)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            self._raise(what, error)

    def _raise(self, what: str, error: grpc.aio.AioRpcError) -> NoReturn:
        if error.code() is grpc.StatusCode.ALREADY_EXISTS:
            raise _Exists from None
        kind = _ERRORS.get(error.code(), SnapshotterError)
        hint = f"is containerd at {self._socket}?" if error.code() is grpc.StatusCode.UNAVAILABLE else None
        raise kind(f"{what}: containerd: {error.details()}", hint=hint) from None


class _Exists(Exception):
    """ALREADY_EXISTS."""


def _request(action: content_pb2.WriteAction.ValueType, **fields: Any) -> content_pb2.WriteContentRequest:
    return content_pb2.WriteContentRequest(action=action, **fields)


async def _exchange(call: Any, request: content_pb2.WriteContentRequest) -> content_pb2.WriteContentResponse:
    with suppress(asyncio.InvalidStateError):  # ended already: reading says why
        await call.write(request)
    answer = await call.read()
    if not isinstance(answer, content_pb2.WriteContentResponse):
        raise Unavailable("containerd has closed the stream")
    return answer
