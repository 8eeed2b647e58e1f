"""What an answer to a range request must look like (RFC 9110 §14, §15.3.7). Pure: headers in, verdict out.

A server may ignore Range, answer another range, or wrap the parts; taking such a body for the bytes asked for would
hand out wrong data under a right name. So a 206 must name exactly the range and the size of the blob.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from snapshotter.digest import Digest
from snapshotter.errors import DigestMismatch, IntegrityError, InvalidArgument, RegistryUnavailable

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_CONTENT_LENGTH = re.compile(r"[0-9]{1,19}")

# A registry that ignores Range answers with the whole blob. This many bytes in front of the wanted ones are thrown away
# rather than refusing; beyond that every small read would cost a large download.
MAX_DISCARD_BYTES = 16 << 20


class Span(NamedTuple):
    """Bytes start ≤ i < stop of a blob of `size` bytes."""

    start: int
    stop: int
    size: int

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop == self.size

    def header(self) -> str:
        """Value of a Range header; the span is not empty."""
        return f"bytes={self.start}-{self.stop - 1}"


def parse_content_range(value: str) -> Span:
    """Raises IntegrityError unless `value` is `bytes first-last/size` with first ≤ last < size."""
    match = _CONTENT_RANGE.fullmatch(value)
    if not match:
        raise IntegrityError(f"Content-Range {value[:80]!r} is not one range of a known size")
    first, last, size = (int(text) for text in match.groups())
    if not first <= last < size:
        raise IntegrityError(f"Content-Range {value[:80]!r} contradicts itself")
    return Span(first, last + 1, size)


def parse_content_length(headers: Mapping[str, str]) -> int | None:
    """None if absent; raises IntegrityError unless it is a number."""
    value = headers.get("Content-Length")
    if value is None:
        return None
    if not _CONTENT_LENGTH.fullmatch(value):
        raise IntegrityError(f"Content-Length {value[:40]!r} is not a number")
    return int(value)


def check_answer(what: str, status: int, headers: Mapping[str, str], wanted: Span, max_discard_bytes: int) -> int:
    """How many bytes at the start of the body to throw away to get `wanted`.

    `what` names the object in errors. Raises DigestMismatch if the answer shows another blob size, RegistryUnavailable
    (reason no-ranges) if the server ignored Range and too much would have to be thrown away, IntegrityError for
    anything that is not the range.
    """
    check_unencoded(what, headers)
    length = parse_content_length(headers)
    if status == 416:
        raise DigestMismatch(
            f"{what}: registry has no bytes {wanted.start}-{wanted.stop - 1}, size must be {wanted.size}"
        )
    if status == 206:
        value = headers.get("Content-Range")
        if value is None:
            raise IntegrityError(f"{what}: partial answer without Content-Range")
        served = parse_content_range(value)
        if served.size != wanted.size:
            raise DigestMismatch(f"{what}: expected size {wanted.size}, registry has {served.size}")
        if served != wanted:
            raise IntegrityError(f"{what}: asked for {wanted.header()}, got Content-Range {value!r}")
        if length not in (None, wanted.stop - wanted.start):
            raise IntegrityError(f"{what}: Content-Length {length} contradicts Content-Range {value!r}")
        return 0
    if status != 200:
        raise IntegrityError(f"{what}: answer {status} to a range request")
    if length not in (None, wanted.size):
        raise DigestMismatch(f"{what}: expected size {wanted.size}, registry has {length}")
    if wanted.start > max_discard_bytes:
        raise no_ranges(what)
    return wanted.start


def check_unencoded(what: str, headers: Mapping[str, str]) -> None:
    """Refuse compressed or multipart bodies: neither was asked for, and neither holds the bytes of the object."""
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise IntegrityError(f"{what}: answer has Content-Encoding {encoding[:40]!r}")
    if headers.get("Content-Type", "").strip().lower().startswith("multipart/"):
        raise IntegrityError(f"{what}: multipart answer to a request for one range")


def stated_digest(what: str, headers: Mapping[str, str]) -> Digest | None:
    """The Docker-Content-Digest header; None if absent or of another algorithm. Raises IntegrityError for nonsense."""
    value = headers.get("Docker-Content-Digest", "")
    if not value.startswith("sha256:"):
        return None
    try:
        return Digest.parse(value)
    except InvalidArgument:
        raise IntegrityError(f"{what}: registry states digest {value[:80]!r}") from None


def no_ranges(what: str) -> RegistryUnavailable:
    return RegistryUnavailable(
        f"{what}: registry ignores Range requests",
        reason="no-ranges",
        hint="lazy reading needs a registry or mirror that serves ranges",
    )
