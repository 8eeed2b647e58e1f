"""Logins that came with pulls: kept in memory only, for the repository they were sent for.

Several may be kept for one repository, since a kubelet tries one pull secret after the other. `pack` puts all of them
into a sealed memfd, with which another process, or a successor of this one, knows the same.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence

import msgspec
import structlog

from snapshotter.credentials.login import Login
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import MalformedImage
from snapshotter.files import seal_memfd

log = structlog.get_logger(__name__)

_MOST_REPOSITORIES = 1024
_MOST_LOGINS = 4  # of one repository
_MAX_PACKED = 64 << 20


class _Entry(msgspec.Struct, array_like=True):
    host: str
    repository: str
    username: str
    secret: bytes


class RememberedLogins:
    """A `Logins` that is told."""

    def __init__(self) -> None:
        self._logins: OrderedDict[tuple[str, str], list[Login]] = OrderedDict()

    async def find(self, host: str, repository: str, *, fresh: bool) -> Sequence[Login]:  # noqa: ARG002 - see Logins
        """See Logins: the last one that was sent first."""
        return tuple(self._logins.get((host, repository), ()))

    def add(self, host: str, repository: str, login: Login) -> bool:
        """Put `login` first; whether it is a new one."""
        known = self._logins.setdefault((host, repository), [])
        self._logins.move_to_end((host, repository))
        is_new = login not in known
        known[:] = [login, *(other for other in known if other != login)][:_MOST_LOGINS]
        while len(self._logins) > _MOST_REPOSITORIES:
            self._logins.popitem(last=False)
        return is_new

    def discard(self, host: str, repository: str, login: Login) -> None:
        known = self._logins.get((host, repository), [])
        known[:] = [other for other in known if other != login]

    def pack(self) -> int:
        """A sealed memfd with all of it, which the caller owns."""
        entries = [
            _Entry(host, repository, login.username, login.secret.expose())
            for (host, repository), logins in self._logins.items()
            for login in reversed(logins)
        ]
        return seal_memfd("logins", [(0, msgspec.msgpack.encode(entries))])

    def load(self, fd: int) -> None:
        """Know what `pack` packed, and nothing else. Raises MalformedImage; `fd` stays the caller's."""
        try:
            if os.fstat(fd).st_size > _MAX_PACKED:
                raise ValueError
            entries = msgspec.msgpack.decode(os.pread(fd, _MAX_PACKED, 0), type=list[_Entry])
        except (ValueError, OSError, RecursionError):
            raise MalformedImage("logins: not what was packed", reason="internal") from None
        self._logins.clear()
        for entry in [entry for entry in entries if entry.secret]:
            self.add(entry.host, entry.repository, Login(entry.username, SecretBytes(entry.secret)))

    def take(self, fd: int) -> None:
        """`load` and close `fd`. What another version has packed may be unreadable, which costs the next pull only."""
        try:
            self.load(fd)
        except MalformedImage as error:
            log.warning("logins of pulls are forgotten", error=str(error))
        finally:
            os.close(fd)
