"""A client of the snapshot service that speaks in plain values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from snapshotter.api import snapshots_pb2 as pb
from snapshotter.api.snapshots_pb2_grpc import SnapshotsStub
from snapshotter.snapshots.model import Info, Kind, Mount

ROOT_LABEL = {"containerd.io/gc.root": "2024-01-01T00:00:00Z"}
_OPTIONS = (("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20))


class Client:
    """One plugin name on one connection. Every call has a deadline, which containerd's do not have."""

    def __init__(self, address: Path, plugin: str = "test", *, namespace: str = "testsuite") -> None:
        self.plugin = plugin
        self._channel = grpc.insecure_channel(f"unix:{address}", options=_OPTIONS)
        self.stub = SnapshotsStub(self._channel)
        self.call: Any = {"timeout": 60, "wait_for_ready": True}
        if namespace:
            self.call["metadata"] = (("containerd-namespace", namespace),)

    def close(self) -> None:
        self._channel.close()

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] = ROOT_LABEL) -> list[Mount]:
        request = pb.PrepareSnapshotRequest(snapshotter=self.plugin, key=key, parent=parent, labels=labels)
        return _mounts(self.stub.Prepare(request, **self.call))

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] = ROOT_LABEL) -> list[Mount]:
        request = pb.ViewSnapshotRequest(snapshotter=self.plugin, key=key, parent=parent, labels=labels)
        return _mounts(self.stub.View(request, **self.call))

    def mounts(self, key: str) -> list[Mount]:
        return _mounts(self.stub.Mounts(pb.MountsRequest(snapshotter=self.plugin, key=key), **self.call))

    def commit(self, name: str, key: str, labels: Mapping[str, str] = ROOT_LABEL, parent: str = "") -> None:
        request = pb.CommitSnapshotRequest(snapshotter=self.plugin, name=name, key=key, labels=labels, parent=parent)
        self.stub.Commit(request, **self.call)

    def remove(self, key: str) -> None:
        self.stub.Remove(pb.RemoveSnapshotRequest(snapshotter=self.plugin, key=key), **self.call)

    def stat(self, key: str) -> Info:
        return info(self.stub.Stat(pb.StatSnapshotRequest(snapshotter=self.plugin, key=key), **self.call).info)

    def update(self, name: str, labels: Mapping[str, str], *paths: str, parent: str = "") -> Info:
        never = Timestamp(seconds=-62135596800)  # what containerd sends: the year 1
        new = pb.Info(name=name, parent=parent, labels=labels, created_at=never, updated_at=never)
        mask = FieldMask(paths=paths) if paths else None
        request = pb.UpdateSnapshotRequest(snapshotter=self.plugin, info=new, update_mask=mask)
        return info(self.stub.Update(request, **self.call).info)

    def walk(self, *filters: str) -> list[Info]:
        return [found for batch in self.batches(*filters) for found in batch]

    def batches(self, *filters: str) -> Sequence[list[Info]]:
        request = pb.ListSnapshotsRequest(snapshotter=self.plugin, filters=filters)
        return [[info(found) for found in answer.info] for answer in self.stub.List(request, **self.call)]

    def names(self, *filters: str) -> set[str]:
        return {found.name for found in self.walk(*filters)}

    def usage(self, key: str) -> tuple[int, int]:
        found = self.stub.Usage(pb.UsageRequest(snapshotter=self.plugin, key=key), **self.call)
        return found.size, found.inodes

    def cleanup(self) -> None:
        self.stub.Cleanup(pb.CleanupRequest(snapshotter=self.plugin), **self.call)


def info(found: pb.Info) -> Info:
    created, updated = found.created_at.ToNanoseconds(), found.updated_at.ToNanoseconds()
    return Info(found.name, found.parent, Kind(found.kind), created, updated, dict(found.labels))


def _mounts(answer: Any) -> list[Mount]:
    return [Mount(mount.type, mount.source, tuple(mount.options)) for mount in answer.mounts]
