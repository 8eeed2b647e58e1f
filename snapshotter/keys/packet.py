"""Annotation packets of key provider `attestation-agent`: the layer key wrapped under a KEK that a key broker holds.

    {"kid":"kbs:///repository/type/tag","wrapped_data":B64,"iv":B64,"wrap_type":"A256GCM"}                  version 1
    … + {"version":"0.1.0","provider":"kbs","provider_settings":{},"annotations":{}}                        version 2

A256GCM has an iv of 12 bytes, no associated data, and the tag behind the ciphertext. A256CTR (iv: the first counter
block, 16 bytes) is not authenticated: whoever learned one layer key can turn its packet, even an A256GCM one, into an
A256CTR packet of a layer key of his choice. It is opened only on request.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import encoding
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, KeyDenied, MalformedImage, SnapshotterError, Unavailable
from snapshotter.keys import annotations as enc
from snapshotter.keys.resource import Resources, ResourceUri

log = structlog.get_logger(__name__)

ANNOTATION: Final = labels.ENC_KEYS_PREFIX + "provider.attestation-agent"
KEK_BYTES: Final = 32
_IV_BYTES: Final = {"A256GCM": 12, "A256CTR": 16}
_WHAT = "attestation-agent packet"
_PACKET_BYTES = 64 << 10
_VERSION = "0.1.0"


@dataclass(frozen=True, slots=True)
class Kek:
    """A key encryption key, 32 bytes, and the name under which readers find it."""

    uri: ResourceUri
    key: SecretBytes = field(repr=False)

    annotation: ClassVar[str] = ANNOTATION

    @classmethod
    def load(cls, uri: ResourceUri, path: Path) -> "Kek":
        """Of a file of exactly 32 bytes. Raises InvalidArgument naming file and resource."""
        try:
            if not path.is_file():
                raise InvalidArgument(f"key {uri}: {path}: no such file")
            with path.open("rb") as file:
                key = file.read(KEK_BYTES + 1)
        except OSError as error:
            raise InvalidArgument(f"key {uri}: {path}: {error.strerror}") from error
        except ValueError:
            raise InvalidArgument(f"key {uri}: {str(path)!r}: not a file name") from None
        if len(key) != KEK_BYTES:
            raise InvalidArgument(f"key {uri}: {path} must be {KEK_BYTES} bytes, exactly as the key broker has them")
        return cls(uri, SecretBytes(key))

    def wrap(self, options: SecretBytes) -> bytes:
        """A version 1 packet, which every reader knows, A256GCM under a fresh iv."""
        iv = secrets.token_bytes(_IV_BYTES["A256GCM"])
        sealed = AESGCM(self.key.expose()).encrypt(iv, options.expose(), None)
        value = {
            "kid": str(self.uri),
            "wrapped_data": encoding.b64_encode(sealed),
            "iv": encoding.b64_encode(iv),
            "wrap_type": "A256GCM",
        }
        return encoding.json_bytes(value)


@dataclass(frozen=True, slots=True)
class Packet:
    """One wrapped layer key."""

    kid: ResourceUri
    wrapped: bytes
    iv: bytes
    wrap_type: str

    @classmethod
    def parse(cls, raw: bytes) -> "Packet":
        """Raises MalformedImage, LimitExceeded, and KeyDenied for a packet of another key service."""
        value = encoding.json_object(raw, _WHAT, _PACKET_BYTES)
        version_2 = ("version", "provider", "provider_settings", "annotations")
        encoding.members(value, _WHAT, required=("kid", "wrapped_data"), optional=("iv", "wrap_type", *version_2))
        for name in ("provider_settings", "annotations"):
            if not isinstance(value.get(name, {}), dict):
                raise MalformedImage(f"{_WHAT}: {name} is not an object")
        provider = encoding.string({"provider": "kbs"} | value, "provider", _WHAT)
        if provider != "kbs":
            raise KeyDenied(f"{_WHAT}: its key is held by provider {provider[:40]!r}, only kbs is supported")
        if encoding.string({"version": _VERSION} | value, "version", _WHAT) != _VERSION:
            raise MalformedImage(f"{_WHAT}: version is not {_VERSION}")
        wrap_type = encoding.string(value, "wrap_type", _WHAT)
        if wrap_type not in _IV_BYTES:
            raise MalformedImage(f"{_WHAT}: wrap_type is not one of {', '.join(_IV_BYTES)}")
        return cls(
            ResourceUri.parse(encoding.string(value, "kid", _WHAT)),
            encoding.b64_decode(encoding.string(value, "wrapped_data", _WHAT), f"{_WHAT}: wrapped_data"),
            encoding.b64_decode(encoding.string(value, "iv", _WHAT), f"{_WHAT}: iv", _IV_BYTES[wrap_type]),
            wrap_type,
        )

    def open(self, kek: SecretBytes) -> SecretBytes:
        """The private layer options. Raises KeyDenied when the KEK does not fit; under A256CTR any KEK "fits"."""
        if len(kek) != KEK_BYTES:
            raise KeyDenied(f"key {self.kid}: {len(kek)} bytes instead of {KEK_BYTES}")
        if self.wrap_type == "A256CTR":
            cipher = Cipher(algorithms.AES(kek.expose()), modes.CTR(self.iv)).decryptor()
            return SecretBytes(cipher.update(self.wrapped))
        try:
            return SecretBytes(AESGCM(kek.expose()).decrypt(self.iv, self.wrapped, None))
        except InvalidTag:
            raise KeyDenied(f"key {self.kid}: does not open the layer key") from None


def check_authenticated(raw: bytes) -> None:
    """For packets that somebody else opens. Raises KeyDenied for A256CTR, MalformedImage, LimitExceeded."""
    value = encoding.json_object(raw, _WHAT, _PACKET_BYTES)
    if value.get("provider", "kbs") == "kbs" and value.get("wrap_type") != "A256GCM":
        raise _not_authenticated()


def _not_authenticated() -> KeyDenied:
    return KeyDenied(f"{_WHAT}: wrap_type A256CTR is not authenticated", hint="see keys.accept_a256ctr")


class PacketKeys:
    """Layer keys from `attestation-agent` packets, with KEKs from a key broker."""

    def __init__(self, resources: Resources, *, accept_a256ctr: bool = False) -> None:
        self._resources = resources
        self._wrap_types = frozenset(_IV_BYTES) if accept_a256ctr else frozenset(("A256GCM",))

    async def unwrap(self, annotations: Mapping[str, str], limits: Limits) -> LayerPrivate:
        """See KeyProvider. Tries every packet; one broken packet does not hide a good one, a silent broker does."""
        enc.check_size(annotations, limits)
        refusals: list[SnapshotterError] = []
        for raw in enc.packets(annotations, ANNOTATION, limits):
            try:
                return await self._open(Packet.parse(raw))
            except Unavailable:  # each further packet would wait as long
                raise
            except SnapshotterError as error:
                log.info("layer key not released", error=str(error), reason=error.reason)
                refusals.append(error)
        if not refusals:
            present = ", ".join(scheme[:60] for scheme in enc.schemes(annotations)[:8]) or "nothing"
            raise KeyDenied(f"layer key: wrapped for {present}; the key broker opens only provider.attestation-agent")
        raise refusals[0]

    async def _open(self, packet: Packet) -> LayerPrivate:
        if packet.wrap_type not in self._wrap_types:
            raise _not_authenticated()
        with await self._resources.get(packet.kid) as kek, packet.open(kek) as options:
            private = LayerPrivate.parse(options, str(packet.kid))
        log.info("layer key released", kid=str(packet.kid))
        return private
