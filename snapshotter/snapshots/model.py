"""What snapshots are: names, kinds, labels, mounts. Plain values, independent of wire and database."""

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

Labels = Mapping[str, str]


class Kind(IntEnum):
    """Numbers as on the wire and in the database."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class Info(NamedTuple):
    """A snapshot as containerd sees it. Times are nanoseconds since the epoch; `parent` is a name, "" for none."""

    name: str
    parent: str
    kind: Kind
    created_ns: int
    updated_ns: int
    labels: dict[str, str]


class Usage(NamedTuple):
    """What one snapshot occupies, without its parents: bytes on disk and inodes."""

    size: int
    inodes: int


class Mount(NamedTuple):
    """One mount(2) that a client performs; shapes of containerd's own overlay snapshotter."""

    kind: str
    source: str
    options: tuple[str, ...]
