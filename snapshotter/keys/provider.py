"""Who gives us layer keys: the `KeyProvider` seam, and private key files as its first implementation."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import structlog
from cryptography.hazmat.primitives.asymmetric import rsa

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import (
    ConfigError,
    InvalidArgument,
    KeyDenied,
    LimitExceeded,
    MalformedImage,
    SnapshotterError,
    Unavailable,
)
from snapshotter.keys import annotations as enc
from snapshotter.keys import jwe, pkcs7

log = structlog.get_logger(__name__)

_KEY_FILE_BYTES = 64 << 10  # jwe refuses more


class _Unwrap(Protocol):
    def __call__(self, packet: bytes, keys: Sequence[jwe.PrivateKey], *, max_recipients: int) -> SecretBytes: ...


class KeyProvider(Protocol):
    """Turns the key annotations of a layer into its private options."""

    async def unwrap(self, annotations: Mapping[str, str], limits: Limits) -> LayerPrivate:
        """Raises KeyDenied (no-key), MalformedImage, LimitExceeded, Unavailable. The caller wipes the result."""
        ...


class FileKeys:
    """Private keys in PEM files, for layers wrapped by JWE or (RSA keys) PKCS#7."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        """Reads every file once. Raises ConfigError naming the file and never its content."""
        self._keys = tuple(_load(Path(path)) for path in paths)

    @property
    def kids(self) -> tuple[str, ...]:
        """RFC 7638 thumbprints, in the order of the files."""
        return tuple(key.kid for key in self._keys)

    async def unwrap(self, annotations: Mapping[str, str], limits: Limits) -> LayerPrivate:
        """See KeyProvider. Tries every packet with every key; one broken packet does not hide a good one."""
        enc.check_size(annotations, limits)
        packets: list[tuple[_Unwrap, bytes]] = [
            (jwe.unwrap, packet) for packet in enc.packets(annotations, labels.ENC_KEYS_JWE, limits)
        ]
        packets += [(_pkcs7, packet) for packet in enc.packets(annotations, labels.ENC_KEYS_PKCS7, limits)]
        if not packets:
            present = ", ".join(scheme[:60] for scheme in enc.schemes(annotations)[:8]) or "nothing"
            raise KeyDenied(f"layer key: wrapped for {present}; private key files open only jwe and pkcs7")
        return await asyncio.to_thread(self._first, packets, limits)  # an RSA operation takes milliseconds

    def _first(self, packets: Sequence[tuple[_Unwrap, bytes]], limits: Limits) -> LayerPrivate:
        broken: MalformedImage | LimitExceeded | None = None
        for unwrap, packet in packets:
            for key in self._keys:
                try:
                    with unwrap(packet, [key], max_recipients=limits.recipients) as options:
                        return LayerPrivate.parse(options, f"jwk:{key.kid}")
                except KeyDenied:
                    continue
                except (MalformedImage, LimitExceeded) as error:
                    broken = broken or error
        raise broken or KeyDenied(jwe.no_key(self._keys))


class AnyOf:
    """Several providers, asked in order until one opens the layer."""

    def __init__(self, providers: Sequence[KeyProvider]) -> None:
        self._providers = tuple(providers)

    async def unwrap(self, annotations: Mapping[str, str], limits: Limits) -> LayerPrivate:
        """See KeyProvider. Of several refusals one that a retry can change counts, then a broken layer, then no-key."""
        refusals: list[SnapshotterError] = []
        for provider in self._providers:
            try:
                return await provider.unwrap(annotations, limits)
            except SnapshotterError as error:
                refusals.append(error)
        for kind in (Unavailable, LimitExceeded, MalformedImage):
            for refusal in refusals:
                if isinstance(refusal, kind):
                    raise refusal
        raise KeyDenied("; ".join(map(str, refusals)) or "layer key: no key provider is configured")


def _pkcs7(packet: bytes, keys: Sequence[jwe.PrivateKey], *, max_recipients: int) -> SecretBytes:
    rsa_keys = [key.key for key in keys if isinstance(key.key, rsa.RSAPrivateKey)]
    options = pkcs7.unwrap(packet, rsa_keys, max_recipients=max_recipients)
    if options is None:
        raise KeyDenied(jwe.no_key(keys))
    return options


def _load(path: Path) -> jwe.PrivateKey:
    try:
        with path.open("rb") as file:
            pem = file.read(_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"key file {path}: {error.strerror}") from error
    try:
        key = jwe.PrivateKey.load(pem)
    except InvalidArgument as error:
        raise ConfigError(f"key file {path}: {error}") from None
    log.info("private key loaded", file=str(path), kid=key.kid)
    return key
