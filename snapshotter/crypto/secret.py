"""`SecretBytes`: key material that does not print, pickle or compare by accident, and is overwritten after use.

CPython may have copied the bytes it was made from; callers build it straight from a primitive's output and keep no
other reference. It never guards against somebody who can read this process's memory.
"""

import hmac
from typing import NoReturn, Self


class SecretBytes:
    """Owns a mutable copy of a secret. Use as a context manager, or call `wipe()`."""

    __slots__ = ("_buffer",)

    def __init__(self, value: bytes | bytearray | memoryview) -> None:
        self._buffer = bytearray(value)

    def expose(self) -> bytes:
        """The secret itself; only for the call that needs it. Raises ValueError after `wipe`."""
        if not self._buffer:
            raise ValueError("secret was wiped")
        return bytes(self._buffer)

    def wipe(self) -> None:
        for index in range(len(self._buffer)):
            self._buffer[index] = 0
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretBytes) and hmac.compare_digest(self._buffer, other._buffer)

    __hash__ = None  # type: ignore[assignment]  # a hash would leak equality

    def __repr__(self) -> str:
        return f"<SecretBytes of {len(self._buffer)} bytes>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("SecretBytes cannot be pickled")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()
