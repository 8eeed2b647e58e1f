"""Secrets of a key broker by name: `kbs:///repository/type/tag`, and the seam to whoever has them."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import KeyDenied, LimitExceeded, MalformedImage

_SEGMENT = r"([A-Za-z0-9_-]+[A-Za-z0-9_.-]*)"
_URI = re.compile(rf"kbs://([A-Za-z0-9.-]{{1,253}}(?::\d{{1,5}})?)?/{_SEGMENT}/{_SEGMENT}/{_SEGMENT}")
_URI_LENGTH: Final = 512
RESOURCE_BYTES: Final = 2 << 20  # what a KBS accepts


@dataclass(frozen=True, slots=True)
class ResourceUri:
    """A resource of the `resource` plug-in. The three names are [A-Za-z0-9_.-], none starts with a dot."""

    repository: str
    type: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> "ResourceUri":
        """From `kbs://[host]/repository/type/tag`; the host is ignored, the reader's configuration says who is asked.

        Raises MalformedImage, also for other plug-ins (`kbs+name://`) and queries.
        """
        match = _URI.fullmatch(text) if len(text) <= _URI_LENGTH else None
        if not match:
            raise MalformedImage("resource: not kbs:///repository/type/tag")
        return cls(match[2], match[3], match[4])

    @property
    def path(self) -> str:
        return f"{self.repository}/{self.type}/{self.tag}"

    def __str__(self) -> str:
        return f"kbs:///{self.path}"


class Resources(Protocol):
    """Somebody who hands out resources."""

    async def get(self, uri: ResourceUri) -> SecretBytes:
        """The resource, never empty; the caller wipes it. Raises KeyDenied (no-key) and Unavailable."""
        ...


@contextlib.contextmanager
def denying(who: str) -> Iterator[None]:
    """What a key service answers is no part of an image: turn what its parsers raise into KeyDenied that names it."""
    try:
        yield
    except (MalformedImage, LimitExceeded) as error:
        raise KeyDenied(f"{who}: {error}") from None
