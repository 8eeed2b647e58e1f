"""What a sealed image carries beside its bootstrap: keys file, identity, canonical JSON (docs/formats.md).

Digests of plaintext chunks and chunk secrets pass through here; they never get into an error text.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from typing import Any, Self

import msgspec

from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import InvalidArgument, LimitExceeded, MalformedImage

KEYS_MAGIC = b"SRKEYS\0\0"
KEYS_HEADER = struct.Struct("<8sII32s16x")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")


def canonical(value: object) -> bytes:
    """RFC 8785 for objects, arrays, strings, booleans, null and integers up to 2^53. Raises InvalidArgument."""
    _check_canonical(value)
    ordered = _order(value)
    try:
        return json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidArgument("canonical JSON: a string holds a lone surrogate") from None


def _check_canonical(value: object) -> None:
    if isinstance(value, dict):
        for key, member in value.items():
            if not isinstance(key, str):
                raise InvalidArgument("canonical JSON: a member name is no string")
            _check_canonical(member)
    elif isinstance(value, list | tuple):
        for member in value:
            _check_canonical(member)
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 1 << 53:
            raise InvalidArgument("canonical JSON: an integer is not exact in every reader")
    elif not isinstance(value, str | bool | None):
        raise InvalidArgument(f"canonical JSON: no rule for {type(value).__name__}")


def _order(value: object) -> object:
    """Members in the order of their UTF-16 code units, as the RFC demands."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be", "surrogatepass"))
        return {name: _order(value[name]) for name in names}
    return [_order(member) for member in value] if isinstance(value, list | tuple) else value


def config_sha256(config: dict[str, Any]) -> str:
    """Hash of the parts of the public config that decide how a container starts; absent members are left out.

    Raises MalformedImage if the config holds values that have no canonical form.
    """
    members = {name: config[name] for name in ("architecture", "os", "variant", "config") if name in config}
    try:
        return hashlib.sha256(canonical(members)).hexdigest()
    except InvalidArgument as error:
        raise MalformedImage(f"config: {error}", reason="config-mismatch") from error


class KeysFile:
    """`image/<hex>.keys`: digest and secret of every chunk of one blob, in chunk index order."""

    @staticmethod
    def pack(blob_hex: str, records: Iterable[tuple[bytes, bytes]]) -> bytes:
        body = bytearray()
        for digest, secret in records:
            body += digest + secret
        return KEYS_HEADER.pack(KEYS_MAGIC, 1, len(body) // 64, bytes.fromhex(blob_hex)) + bytes(body)

    @staticmethod
    def parse(data: bytes, blob_hex: str, count: int, limits: Limits) -> tuple[bytes, bytes]:
        """(digests, secrets), 32 bytes per chunk each. Raises MalformedImage."""
        if count > limits.chunks:
            raise LimitExceeded(f"keys file of {blob_hex}: more chunks than limits.chunks")
        if len(data) != KEYS_HEADER.size + 64 * count:
            raise MalformedImage(f"keys file of {blob_hex}: {len(data)} bytes for {count} chunks")
        if data[: KEYS_HEADER.size] != KEYS_HEADER.pack(KEYS_MAGIC, 1, count, bytes.fromhex(blob_hex)):
            raise MalformedImage(f"keys file of {blob_hex}: bad header")
        digests, secrets = bytearray(32 * count), bytearray(32 * count)
        for index in range(count):
            at = KEYS_HEADER.size + 64 * index
            digests[32 * index : 32 * index + 32] = data[at : at + 32]
            secrets[32 * index : 32 * index + 32] = data[at + 32 : at + 64]
        return bytes(digests), bytes(secrets)


class IdentityBlob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One data blob of the image, in manifest order."""

    digest: str
    size: int


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """`image/identity.json`: what binds a bootstrap to its image."""

    version: int = msgspec.field()
    blobs: tuple[IdentityBlob, ...] = msgspec.field()
    source: str = msgspec.field()
    config_sha256: str = msgspec.field()
    domain: str = msgspec.field()
    epoch: str = msgspec.field()
    created: str = msgspec.field()
    repository: str | None = None

    def pack(self) -> bytes:
        return canonical(msgspec.to_builtins(self))

    @classmethod
    def parse(cls, data: bytes, limits: Limits) -> Self:
        """Raises MalformedImage unless `data` is exactly the canonical form of a version 1 identity."""
        if len(data) > limits.identity_bytes:
            raise LimitExceeded("identity.json: more than limits.identity_bytes")
        try:
            identity = msgspec.json.decode(data, type=cls)
            again = identity.pack()
            for digest in (identity.source, *(blob.digest for blob in identity.blobs)):
                Digest.parse(digest)
        except (msgspec.MsgspecError, InvalidArgument, UnicodeDecodeError, RecursionError) as error:
            raise MalformedImage(f"identity.json: {str(error)[:200]}") from error
        if again != data:
            raise MalformedImage("identity.json: is not canonical JSON")
        if identity.version != 1 or identity.domain not in ("image", "tenant", "public"):
            raise MalformedImage(f"identity.json: version {identity.version}, domain {identity.domain[:40]!r}")
        if not re.fullmatch("[0-9a-f]{64}", identity.config_sha256) or not _TIME.fullmatch(identity.created):
            raise MalformedImage("identity.json: bad config_sha256 or created")
        if any(blob.size < 0 for blob in identity.blobs) or len(identity.blobs) > limits.layers:
            raise MalformedImage("identity.json: bad blob list")
        return identity
