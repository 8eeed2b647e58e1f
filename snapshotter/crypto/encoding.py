"""Strict JSON and base64 of key material and its options.

Everything here comes from annotations that anybody may edit: one spelling per value, no duplicate members, no numbers
that are not numbers, bounded size; MalformedImage names what was wrong and never repeats the value.
"""

import base64
import binascii
import json
from collections.abc import Iterable
from typing import Any, NoReturn

from snapshotter.errors import LimitExceeded, MalformedImage


def json_object(raw: bytes, what: str, limit: int) -> dict[str, Any]:
    """The JSON object in `raw` (UTF-8, at most `limit` bytes). Raises LimitExceeded, MalformedImage naming `what`."""
    if len(raw) > limit:
        raise LimitExceeded(f"{what}: larger than {limit} bytes")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):  # covers UnicodeDecodeError and JSONDecodeError, whose text quotes the input
        raise MalformedImage(f"{what}: not a JSON object without duplicate members") from None
    if not isinstance(value, dict):
        raise MalformedImage(f"{what}: not a JSON object")
    return value


def json_bytes(value: object) -> bytes:
    """Compact and ASCII, in the order of its members."""
    return json.dumps(value, separators=(",", ":")).encode()


def members(value: dict[str, Any], what: str, *, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Refuse an object that lacks a required member or has one nobody knows."""
    required = set(required)
    for name in sorted(required - value.keys()):
        raise MalformedImage(f"{what}: {name} is missing")
    for name in sorted(value.keys() - required - set(optional)):
        raise MalformedImage(f"{what}: unknown member {name[:40]!r}")


def string(value: dict[str, Any], name: str, what: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise MalformedImage(f"{what}: {name} is not a string")
    return text


def b64_decode(text: str, what: str, size: int | None = None) -> bytes:
    """Standard padded base64 (RFC 4648 §4) in its one canonical spelling, of exactly `size` bytes if given."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise MalformedImage(f"{what}: not base64") from None
    if b64_encode(raw) != text:
        raise MalformedImage(f"{what}: not canonical base64")
    if size is not None and len(raw) != size:
        raise MalformedImage(f"{what}: {len(raw)} bytes instead of {size}")
    return raw


def b64_encode(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def b64url_decode(text: str, what: str) -> bytes:
    """Base64url without padding (RFC 7515 §2)."""
    if "+" in text or "/" in text or "=" in text:
        raise MalformedImage(f"{what}: not base64url")
    return b64_decode(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), what)


def b64url_encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate member")
    return value


def _refuse(_: str) -> NoReturn:
    raise ValueError("not a JSON number")
