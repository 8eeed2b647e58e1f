"""Errors become statuses at one place."""

import errno
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from snapshotter.api import snapshots_pb2 as pb
from snapshotter.api.snapshots_pb2_grpc import SnapshotsServicer, SnapshotsStub, add_SnapshotsServicer_to_server
from snapshotter.errors import KeyDenied, NotFound
from snapshotter.service.interceptors import ErrorInterceptor, translate
from snapshotter.service.server import REFUSAL, _Refusal

Code = grpc.StatusCode


class Failing(SnapshotsServicer):
    """Raises whatever it is told, after one message where it streams."""

    error: Exception

    async def Stat(self, request: object, context: object) -> pb.StatSnapshotResponse:
        raise self.error

    async def List(self, request: object, context: object) -> AsyncIterator[pb.ListSnapshotsResponse]:
        yield pb.ListSnapshotsResponse()
        raise self.error


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[SnapshotsStub]:
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    add_SnapshotsServicer_to_server(Failing(), server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        yield SnapshotsStub(channel)
    await server.stop(0)


@pytest.mark.allow_warnings
@pytest.mark.parametrize(
    ("error", "code", "message", "reason"),
    [
        (NotFound("snapshot x does not exist"), Code.NOT_FOUND, "snapshot x does not exist", "not-found"),
        (KeyDenied("no key"), Code.PERMISSION_DENIED, "no key reason=no-key", "no-key"),
        (RuntimeError("secret text"), Code.INTERNAL, "internal error", "internal"),
        (OSError(errno.ENOSPC, "x"), Code.RESOURCE_EXHAUSTED,
         "state directory: x (make room on the disk of root) reason=no-space", "no-space"),
        (OSError(errno.EROFS, "x"), Code.FAILED_PRECONDITION,
         "state directory: x (the disk of root must be writable) reason=read-only", "read-only"),
        (OSError(errno.EMFILE, "x"), Code.RESOURCE_EXHAUSTED,
         "state directory: x (raise LimitNOFILE=) reason=no-descriptors", "no-descriptors"),
    ],
)  # fmt: skip
async def test_statuses(
    stub: SnapshotsStub, error: Exception, code: grpc.StatusCode, message: str, reason: str
) -> None:
    Failing.error = error
    for call in (stub.Stat(pb.StatSnapshotRequest()), stub.List(pb.ListSnapshotsRequest())):
        with pytest.raises(grpc.aio.AioRpcError) as found:  # noqa: PT012 - one call or the other
            if hasattr(call, "__aiter__"):
                _ = [answer async for answer in call]
            else:
                await call
        assert (found.value.code(), found.value.details()) == (code, message)
        assert dict(found.value.trailing_metadata() or ())["reason"] == reason


def test_a_full_database_is_a_full_disk(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "db")
    database.execute("PRAGMA max_page_count = 2")
    with pytest.raises(sqlite3.OperationalError) as found:
        database.executescript("CREATE TABLE a (x); CREATE TABLE b (x); CREATE TABLE c (x)")
    known = translate(found.value)
    assert known is not None
    assert (known.status, known.reason) == ("RESOURCE_EXHAUSTED", "no-space")
    database.close()


async def test_the_refusing_server_refuses_everything(tmp_path: Path) -> None:
    server = grpc.aio.server(handlers=(_Refusal(),))
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        stub = SnapshotsStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await stub.Prepare(pb.PrepareSnapshotRequest(key="a"))
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            _ = [answer async for answer in stub.List(pb.ListSnapshotsRequest())]
        for found in (unary.value, stream.value):
            assert (found.code(), found.details()) == (grpc.StatusCode.FAILED_PRECONDITION, REFUSAL)
    await server.stop(0)
