"""User namespaces: the labels by which a client says how a container's ids map to the host's.

A client with capability `remap-ids` (containerd 2.0 and later) expects an unmapped snapshot, the mapping in the options
of its mounts (it makes id-mapped clones of the lower directories itself), and a root directory that the container's
root owns. Without the capability (containerd 1.7 knows no such options) the same labels come with a parent that the
client has made by changing every owner; nothing is mapped a second time then.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from snapshotter.errors import InvalidArgument
from snapshotter.labels import GID_MAPPING, SNAPSHOT_REF, UID_MAPPING
from snapshotter.snapshots.directories import RootAttributes
from snapshotter.snapshots.model import Labels

_IDS = 1 << 32  # the last one, -1, is none
_RANGE = re.compile(r"([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})", re.ASCII)


class _Range(NamedTuple):
    """`size` ids from `inside` on, in the container, are those from `outside` on."""

    inside: int
    outside: int
    size: int


@dataclass(frozen=True, slots=True)
class IdMap:
    uids: str
    gids: str
    _uids: Sequence[_Range]
    _gids: Sequence[_Range]

    @classmethod
    def of(cls, labels: Labels) -> Self | None:
        """None without labels. Raises InvalidArgument unless both are mappings that have a root user and group.

        A layer that is unpacked belongs to no container: such labels on it are annotations from whoever made the image.
        """
        if labels.get(SNAPSHOT_REF):
            return None
        uids, gids = labels.get(UID_MAPPING, ""), labels.get(GID_MAPPING, "")
        if not uids and not gids:
            return None
        return cls(uids, gids, _parse(UID_MAPPING, uids), _parse(GID_MAPPING, gids))

    @property
    def options(self) -> tuple[str, ...]:
        """Of a mount."""
        return (f"uidmap={self.uids}", f"gidmap={self.gids}")

    def is_root(self, attributes: RootAttributes) -> bool:
        """Whether a directory belongs to the container's root already."""
        return (attributes.uid, attributes.gid) == (_host(self._uids, 0), _host(self._gids, 0))

    def owned(self, attributes: RootAttributes) -> RootAttributes:
        """The attributes with the owner mapped; an owner that the container does not know gives way to its root."""
        uid, gid = _host(self._uids, attributes.uid), _host(self._gids, attributes.gid)
        if uid is None or gid is None:
            return self.owned(attributes._replace(uid=0, gid=0))
        return attributes._replace(uid=uid, gid=gid)


def _parse(label: str, text: str) -> Sequence[_Range]:
    """`inside:outside:size`, or several of them with commas."""
    ranges = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part)
        inside, outside, size = map(int, found.groups()) if found else (0, 0, 0)
        if not size or max(inside, outside) + size >= _IDS:
            raise InvalidArgument(f"label {label}: {part[:100]!r} is not INSIDE:OUTSIDE:SIZE")
        ranges.append(_Range(inside, outside, size))
    if _host(ranges, 0) is None:
        raise InvalidArgument(f"label {label}: {text[:100]!r} maps no root")
    return ranges


def _host(ranges: Sequence[_Range], number: int) -> int | None:
    return next((number - r.inside + r.outside for r in ranges if r.inside <= number < r.inside + r.size), None)
