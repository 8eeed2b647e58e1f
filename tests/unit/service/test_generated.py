"""The committed protobuf code is what the .proto files say."""

import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parents[3]


def test_generated_code_is_up_to_date() -> None:
    pytest.importorskip("grpc_tools")
    result = subprocess.run([TOP / "proto/generate.sh", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_numbers_on_the_wire() -> None:
    """Those of containerd's API; changing one is not noticed by any test that uses our own client."""
    from snapshotter.api import mount_pb2, snapshots_pb2

    def numbers(message: object) -> str:
        return " ".join(f"{field.name}={field.number}" for field in message.DESCRIPTOR.fields)  # type: ignore[attr-defined]

    assert snapshots_pb2.DESCRIPTOR.package == "containerd.services.snapshots.v1"
    assert mount_pb2.DESCRIPTOR.package == "containerd.types"
    service = snapshots_pb2.DESCRIPTOR.services_by_name["Snapshots"]
    methods = " ".join(method.name for method in service.methods)
    assert methods == "Prepare View Mounts Commit Remove Stat Update List Usage Cleanup"
    assert numbers(snapshots_pb2.PrepareSnapshotRequest) == "snapshotter=1 key=2 parent=3 labels=4"
    assert numbers(snapshots_pb2.ViewSnapshotRequest) == "snapshotter=1 key=2 parent=3 labels=4"
    assert numbers(snapshots_pb2.CommitSnapshotRequest) == "snapshotter=1 name=2 key=3 labels=4 parent=5"
    assert numbers(snapshots_pb2.UpdateSnapshotRequest) == "snapshotter=1 info=2 update_mask=3"
    assert numbers(snapshots_pb2.Info) == "name=1 parent=2 kind=3 created_at=4 updated_at=5 labels=6"
    assert numbers(snapshots_pb2.UsageResponse) == "size=1 inodes=2"
    assert numbers(mount_pb2.Mount) == "type=1 source=2 target=3 options=4"
    assert dict(snapshots_pb2.Kind.items()) == {"UNKNOWN": 0, "VIEW": 1, "ACTIVE": 2, "COMMITTED": 3}


def test_numbers_of_what_we_call() -> None:
    from snapshotter.api import content_pb2, images_pb2

    def numbers(message: object) -> str:
        return " ".join(f"{field.name}={field.number}" for field in message.DESCRIPTOR.fields)  # type: ignore[attr-defined]

    assert content_pb2.DESCRIPTOR.package == "containerd.services.content.v1"
    assert images_pb2.DESCRIPTOR.package == "containerd.services.images.v1"
    wanted = "action=1 ref=2 total=3 expected=4 offset=5 data=6 labels=7"
    assert numbers(content_pb2.WriteContentRequest) == wanted
    assert numbers(content_pb2.WriteContentResponse) == "action=1 offset=4 total=5 digest=6"
    assert numbers(content_pb2.Info) == "digest=1 size=2 labels=5"
    assert numbers(content_pb2.UpdateRequest) == "info=1 update_mask=2"
    assert numbers(content_pb2.ReadContentRequest) == "digest=1 offset=2 size=3"
    assert dict(content_pb2.WriteAction.items()) == {"STAT": 0, "WRITE": 1, "COMMIT": 2}
    assert numbers(images_pb2.Image) == "name=1 labels=2 target=3"
    assert numbers(images_pb2.Descriptor) == "media_type=1 digest=2 size=3"
