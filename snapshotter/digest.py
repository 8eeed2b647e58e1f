"""`Digest`: a checked `sha256:<64 hex>` string, the only algorithm accepted here (OCI image-spec descriptor.md)."""

import hashlib
import re
from typing import Self

from snapshotter.errors import InvalidArgument

_GRAMMAR = re.compile(r"sha256:[0-9a-f]{64}")


class Digest(str):
    """A digest in OCI notation. Being a `str` it serialises and compares as one."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises InvalidArgument for anything but `sha256:` and 64 lower-case hex digits."""
        if not _GRAMMAR.fullmatch(text):
            raise InvalidArgument(f"not a sha256 digest: {text[:100]!r}", reason="digest")
        return cls(text)

    @classmethod
    def of(cls, content: bytes | bytearray | memoryview) -> Self:
        return cls("sha256:" + hashlib.sha256(content).hexdigest())

    @property
    def hex(self) -> str:
        return self[7:]
