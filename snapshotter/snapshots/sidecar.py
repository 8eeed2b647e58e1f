"""`snapshot.json` in every snapshot's directory: a copy of its database row, from which a lost database is made again.

containerd keeps its own records and never sends a snapshot's labels a second time, so losing the database would mean
pulling every image again. The database is what counts: a start makes the sidecars agree with it, unless there is none.
"""

from pathlib import Path
from typing import Any

import msgspec

from snapshotter import files
from snapshotter.snapshots.model import Kind, Usage
from snapshotter.snapshots.remote import ImageRecord
from snapshotter.snapshots.store import Entry, Row

NAME = "snapshot.json"
MAX_BYTES = 64 << 20  # labels are at most 8 MiB, and JSON writes a control character in six


class _Sidecar(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 1
    id: int
    plugin: str
    name: str
    parent_id: int | None
    parent: str
    kind: Kind
    created_ns: int
    updated_ns: int
    size: int = 0
    inodes: int = 0
    ref: str | None = None
    labels: dict[str, str] = {}
    image: ImageRecord | None = None


def write(directory: Path, entry: Entry, *, durable: bool) -> None:
    """Replace the sidecar; `durable` also puts it on the disk before returning, which an fsync or two take."""
    row = entry.row
    raw = msgspec.json.encode(
        _Sidecar(
            id=row.id, plugin=entry.plugin, name=row.name, parent_id=row.parent_id, parent=row.parent, kind=row.kind,
            created_ns=row.created_ns, updated_ns=row.updated_ns, size=row.usage.size, inodes=row.usage.inodes,
            ref=row.ref, labels=dict(entry.labels), image=entry.image,
        )
    )  # fmt: skip
    if durable:
        files.write_atomic(directory / NAME, raw)
    else:
        temporary = directory / f".{NAME}"
        temporary.write_bytes(raw)
        temporary.replace(directory / NAME)


def read(directory: Path) -> Entry | None:
    """None if there is none, or it is damaged, or it belongs to another directory."""
    raw = files.read_regular(directory / NAME, MAX_BYTES)
    try:
        found: Any = msgspec.json.decode(raw or b"", type=_Sidecar)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None
    if found.version != 1 or str(found.id) != directory.name:
        return None
    row = Row(
        found.id, found.name, found.parent_id, found.kind, found.created_ns, found.updated_ns,
        Usage(found.size, found.inodes), found.ref, found.parent,
    )  # fmt: skip
    return Entry(found.plugin, row, found.labels, found.image)
