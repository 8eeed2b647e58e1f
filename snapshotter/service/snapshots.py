"""containerd's snapshot service: messages to calls of the snapshotter, and back. No decisions are made here."""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from snapshotter.api import mount_pb2, snapshots_pb2
from snapshotter.api.snapshots_pb2_grpc import SnapshotsServicer
from snapshotter.snapshots.model import Info, Mount
from snapshotter.snapshots.snapshotter import Snapshotter

Context = grpc.aio.ServicerContext[Any, Any]

_NAMESPACE = "containerd-namespace"  # absent on calls of containerd's garbage collector
_SECOND = 10**9
_ANSWER_BYTES = 8 << 20  # of one message of a List, unless a single snapshot has more


class SnapshotsService(SnapshotsServicer):
    """The interceptor turns what these methods raise into statuses."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    async def Prepare(
        self, request: snapshots_pb2.PrepareSnapshotRequest, context: Context
    ) -> snapshots_pb2.PrepareSnapshotResponse:
        found = await self._snapshotter.prepare(
            request.snapshotter, request.key, request.parent, dict(request.labels), _namespace(context)
        )
        return snapshots_pb2.PrepareSnapshotResponse(mounts=_mounts(found))

    async def View(
        self, request: snapshots_pb2.ViewSnapshotRequest, _context: Context
    ) -> snapshots_pb2.ViewSnapshotResponse:
        found = await self._snapshotter.view(request.snapshotter, request.key, request.parent, dict(request.labels))
        return snapshots_pb2.ViewSnapshotResponse(mounts=_mounts(found))

    async def Mounts(self, request: snapshots_pb2.MountsRequest, _context: Context) -> snapshots_pb2.MountsResponse:
        found = await self._snapshotter.mounts(request.snapshotter, request.key)
        return snapshots_pb2.MountsResponse(mounts=_mounts(found))

    async def Commit(self, request: snapshots_pb2.CommitSnapshotRequest, _context: Context) -> Empty:
        await self._snapshotter.commit(
            request.snapshotter, request.name, request.key, request.parent, dict(request.labels)
        )
        return Empty()

    async def Remove(self, request: snapshots_pb2.RemoveSnapshotRequest, _context: Context) -> Empty:
        self._snapshotter.remove(request.snapshotter, request.key)
        return Empty()

    async def Stat(
        self, request: snapshots_pb2.StatSnapshotRequest, _context: Context
    ) -> snapshots_pb2.StatSnapshotResponse:
        return snapshots_pb2.StatSnapshotResponse(info=_info(self._snapshotter.stat(request.snapshotter, request.key)))

    async def Update(
        self, request: snapshots_pb2.UpdateSnapshotRequest, _context: Context
    ) -> snapshots_pb2.UpdateSnapshotResponse:
        # Of `info` only name and labels mean something; clients send times that no calendar has.
        changed = self._snapshotter.update(
            request.snapshotter, request.info.name, dict(request.info.labels), request.update_mask.paths
        )
        return snapshots_pb2.UpdateSnapshotResponse(info=_info(changed))

    async def List(
        self, request: snapshots_pb2.ListSnapshotsRequest, _context: Context
    ) -> AsyncIterator[snapshots_pb2.ListSnapshotsResponse]:
        async for batch in self._snapshotter.walk(request.snapshotter, request.filters):
            for answer in _answers(batch):
                yield answer

    async def Usage(self, request: snapshots_pb2.UsageRequest, _context: Context) -> snapshots_pb2.UsageResponse:
        size, inodes = await self._snapshotter.usage(request.snapshotter, request.key)
        return snapshots_pb2.UsageResponse(size=size, inodes=inodes)

    async def Cleanup(self, _request: snapshots_pb2.CleanupRequest, _context: Context) -> Empty:
        await self._snapshotter.cleanup()
        return Empty()


def _namespace(context: Context) -> str:
    return next((str(value) for key, value in context.invocation_metadata() or () if key == _NAMESPACE), "")


def _mounts(found: Iterable[Mount]) -> list[mount_pb2.Mount]:
    return [mount_pb2.Mount(type=kind, source=source, options=options) for kind, source, options in found]


def _answers(batch: Iterable[Info]) -> Iterator[snapshots_pb2.ListSnapshotsResponse]:
    """Labels may be large, and messages are bounded on both sides."""
    answer, size = snapshots_pb2.ListSnapshotsResponse(), 0
    for info in map(_info, batch):
        size += info.ByteSize()
        if answer.info and size > _ANSWER_BYTES:
            yield answer
            answer, size = snapshots_pb2.ListSnapshotsResponse(), info.ByteSize()
        answer.info.append(info)
    yield answer


def _info(info: Info) -> snapshots_pb2.Info:
    return snapshots_pb2.Info(
        name=info.name,
        parent=info.parent,
        kind=snapshots_pb2.Kind.ValueType(info.kind),
        created_at=Timestamp(seconds=info.created_ns // _SECOND, nanos=info.created_ns % _SECOND),
        updated_at=Timestamp(seconds=info.updated_ns // _SECOND, nanos=info.updated_ns % _SECOND),
        labels=info.labels,
    )
