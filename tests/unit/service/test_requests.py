"""Every call has an id that all its log lines carry, and is measured."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import structlog

from snapshotter.api import snapshots_pb2 as pb
from snapshotter.api.snapshots_pb2_grpc import SnapshotsServicer, SnapshotsStub, add_SnapshotsServicer_to_server
from snapshotter.errors import KeyDenied, NotFound
from snapshotter.log import bind_request, bound_request
from snapshotter.service import interceptors
from snapshotter.service.interceptors import ErrorInterceptor, given_id

log = structlog.get_logger("test.inner")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Service(SnapshotsServicer):
    """Logs, and fails for the keys that name an error."""

    entered = asyncio.Event()

    async def Stat(self, request: pb.StatSnapshotRequest, context: object) -> pb.StatSnapshotResponse:
        log.info("inside", key=request.key)
        if request.key == "hang":
            self.entered.set()
            await asyncio.Event().wait()
        if request.key == "refused":
            raise KeyDenied("no key")
        if request.key == "missing":
            raise NotFound("none")
        return pb.StatSnapshotResponse()

    async def List(self, request: object, context: object) -> AsyncIterator[pb.ListSnapshotsResponse]:
        log.info("inside")
        yield pb.ListSnapshotsResponse()


@pytest.fixture
def interceptor() -> ErrorInterceptor:
    return ErrorInterceptor()


@pytest.fixture
async def stub(tmp_path: Path, interceptor: ErrorInterceptor) -> AsyncIterator[SnapshotsStub]:
    server = grpc.aio.server(interceptors=(interceptor,))
    add_SnapshotsServicer_to_server(Service(), server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        yield SnapshotsStub(channel)
    await server.stop(0)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


def told(lines: pytest.LogCaptureFixture, event: str) -> list[dict[str, object]]:
    return [vars(record) for record in lines.records if record.getMessage() == event]


async def test_a_call_is_one_line_and_shares_its_id_with_what_it_logs(
    stub: SnapshotsStub, lines: pytest.LogCaptureFixture
) -> None:
    metadata = (("containerd-namespace", "k8s.io"), ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"))
    await stub.Stat(pb.StatSnapshotRequest(key="k8s.io/1/" + "a" * 5000), metadata=metadata)
    (line,), (inside,) = told(lines, "rpc"), told(lines, "inside")
    assert line["request"] == inside["request"] == TRACE
    assert (line["method"], line["namespace"], line["code"], line["levelname"]) == ("Stat", "k8s.io", "OK", "DEBUG")
    assert str(line["key"]).startswith("k8s.io/1/aaa")
    assert len(str(line["key"])) == 120
    assert isinstance(line["seconds"], float)


async def test_calls_without_an_id_get_different_ones(stub: SnapshotsStub, lines: pytest.LogCaptureFixture) -> None:
    await asyncio.gather(*(stub.Stat(pb.StatSnapshotRequest(key=str(number))) for number in range(20)))
    _ = [answer async for answer in stub.List(pb.ListSnapshotsRequest())]
    ids = [line["request"] for line in told(lines, "rpc")]
    assert len(set(ids)) == 21
    assert sorted(map(str, ids)) == sorted(str(line["request"]) for line in told(lines, "inside"))
    assert bound_request() is None


async def test_refused_and_slow_calls_are_told_at_info(
    stub: SnapshotsStub,
    interceptor: ErrorInterceptor,
    lines: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key in ("refused", "missing"):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Stat(pb.StatSnapshotRequest(key=key))
    monkeypatch.setattr(interceptors, "SLOW_SECONDS", 0.0)
    await stub.Stat(pb.StatSnapshotRequest(key="slow"))
    seen = [(line["key"], line["code"], line["levelname"], line.get("reason")) for line in told(lines, "rpc")]
    assert seen == [
        ("refused", "PERMISSION_DENIED", "INFO", "no-key"),
        ("missing", "NOT_FOUND", "DEBUG", "not-found"),
        ("slow", "OK", "INFO", None),
    ]
    assert interceptor.refusals.snapshot() == [(("no-key",), 1)]
    assert {labels: sum(buckets) for labels, buckets, _ in interceptor.seconds.snapshot()} == {
        ("Stat", "PERMISSION_DENIED"): 1,
        ("Stat", "NOT_FOUND"): 1,
        ("Stat", "OK"): 1,
    }


async def test_a_client_that_leaves_is_counted(stub: SnapshotsStub, interceptor: ErrorInterceptor) -> None:
    call = stub.Stat(pb.StatSnapshotRequest(key="hang"))
    task = asyncio.ensure_future(call)
    await asyncio.wait_for(Service.entered.wait(), 10)
    assert interceptor.running == 1
    call.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(10):
        while interceptor.running:  # noqa: ASYNC110 - ends with the server's task
            await asyncio.sleep(0.01)
    assert [labels for labels, _, _ in interceptor.seconds.snapshot()] == [("Stat", "CANCELLED")]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        ("traceparent", f"00-{TRACE}-00f067aa0ba902b7", ""),
        ("traceparent", TRACE, ""),
        ("x-request-id", "6f1c-A_b.9", "6f1c-A_b.9"),
        ("x-request-id", 'a"b', ""),
        ("x-request-id", "a\nb", ""),
        ("x-request-id", "a" * 65, ""),
        ("x-request-id", b"bytes", ""),
        ("x-other", "6f1c", ""),
    ],
)
def test_only_plain_words_are_taken_over(name: str, value: str | bytes, expected: str) -> None:
    assert given_id([(name, value)]) == expected


def test_what_is_no_id_takes_the_last_one_away() -> None:
    bind_request("abc")
    assert bound_request() == "abc"
    for bad in (None, 7, "a b", "a" * 65):
        bind_request("abc")
        bind_request(bad)
        assert bound_request() is None
