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

_KEYS_MAGIC = b"SRKEYS\0\0"
_KEYS_HEADER = struct.Struct("<8sII32s16x")
_KEYS_RECORD = struct.Struct("<32s32s")
_MAX_DEPTH = 64  # of canonical JSON: deeper than anything an image config holds
_MAX_INTEGER = (1 << 53) - 1  # RFC 8785 §3.2.2.3: what every reader holds exactly
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")


def canonical(value: object) -> bytes:
    """RFC 8785 for objects, arrays, strings, booleans, null and integers below 2^53. Raises InvalidArgument."""
    ordered = _ordered(value, _MAX_DEPTH)
    try:
        return json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidArgument("canonical JSON: a string holds a lone surrogate") from None


def _ordered(value: object, depth: int) -> object:
    """The same value with members in the order of their UTF-16 code units, as the RFC demands."""
    if depth < 0:
        raise InvalidArgument("canonical JSON: nested too deep")
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise InvalidArgument("canonical JSON: a member name is no string")
        names = sorted(value, key=lambda name: name.encode("utf-16-be", "surrogatepass"))
        return {name: _ordered(value[name], depth - 1) for name in names}
    if isinstance(value, list | tuple):
        return [_ordered(member, depth - 1) for member in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _MAX_INTEGER:
        raise InvalidArgument("canonical JSON: an integer that not every reader holds exactly")
    if not isinstance(value, str | int | None):
        raise InvalidArgument(f"canonical JSON: no rule for {type(value).__name__}")
    return value


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
        """`records`: digest and secret, 32 bytes each."""
        body = b"".join(map(_keys_record, records))
        return _keys_header(blob_hex, len(body) // _KEYS_RECORD.size) + body

    @staticmethod
    def parse(data: bytes, blob_hex: str, count: int, limits: Limits) -> tuple[bytes, bytes]:
        """(digests, secrets), 32 bytes per chunk each. Raises MalformedImage."""
        if count > limits.chunks:
            raise LimitExceeded(f"keys file of {blob_hex}: more chunks than limits.chunks")
        if len(data) != _KEYS_HEADER.size + _KEYS_RECORD.size * count:
            raise MalformedImage(f"keys file of {blob_hex}: {len(data)} bytes for {count} chunks")
        if data[: _KEYS_HEADER.size] != _keys_header(blob_hex, count):
            raise MalformedImage(f"keys file of {blob_hex}: bad header")
        body = memoryview(data)[_KEYS_HEADER.size :]
        digests = b"".join(digest for digest, _ in _KEYS_RECORD.iter_unpack(body))
        secrets = b"".join(secret for _, secret in _KEYS_RECORD.iter_unpack(body))
        return digests, secrets


def _keys_record(record: tuple[bytes, bytes]) -> bytes:
    if [len(part) for part in record] != [32, 32]:
        raise InvalidArgument("keys file: a digest or secret is not 32 bytes long")
    return b"".join(record)


def _keys_header(blob_hex: str, count: int) -> bytes:
    return _KEYS_HEADER.pack(_KEYS_MAGIC, 1, count, bytes.fromhex(blob_hex))


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
        return canonical(msgspec.to_builtins(self, enc_hook=str))  # Digest is a str that msgspec does not know

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
