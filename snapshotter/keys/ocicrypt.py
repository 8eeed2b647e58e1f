"""Whole encrypted layers: ciphertext and annotations in, plaintext out, and back. Interoperates with ocicrypt tools."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import layer
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import LimitExceeded
from snapshotter.keys import annotations as enc
from snapshotter.keys import jwe
from snapshotter.keys.provider import KeyProvider


class Wrapper(Protocol):
    """A recipient with packets of its own."""

    @property
    def annotation(self) -> str:
        """Name of the annotation that its packets go to."""

    def wrap(self, options: SecretBytes) -> bytes:
        """A packet of the private layer options."""


Recipient: TypeAlias = bytes | Wrapper  # a public key (SPKI PEM) for JWE, where all recipients share a packet


def encrypt_layer(
    plain: bytes | bytearray | memoryview, recipients: Sequence[Recipient]
) -> tuple[bytes, dict[str, str]]:
    """Encrypt under a fresh key, wrapped for every recipient: the layer's bytes and its annotations.

    Raises InvalidArgument for no recipient, and for one that is no supported public key.
    """
    cipher, public, private = layer.encrypt(plain)
    with private.symkey, private.pack() as options:
        return cipher, enc.build(public, wrap(options, recipients))


def wrap(options: SecretBytes, recipients: Sequence[Recipient]) -> dict[str, list[bytes]]:
    """Packets by annotation. Raises InvalidArgument for no recipient, and for a PEM that is no supported public key."""
    public_keys = [recipient for recipient in recipients if isinstance(recipient, bytes)]
    wrapped: dict[str, list[bytes]] = {}
    if public_keys or not recipients:
        wrapped[labels.ENC_KEYS_JWE] = [jwe.wrap(options, public_keys)]
    for recipient in recipients:
        if not isinstance(recipient, bytes):
            wrapped.setdefault(recipient.annotation, []).append(recipient.wrap(options))
    return wrapped


async def decrypt_layer(
    cipher: bytes | bytearray | memoryview, annotations: Mapping[str, str], provider: KeyProvider, limits: Limits
) -> bytearray:
    """The plaintext of a layer whose MAC was checked over all of it first.

    Raises KeyDenied (no-key), DecryptError (layer-hmac), MalformedImage for options that ocicrypt does not write,
    LimitExceeded.
    """
    if len(cipher) > limits.bootstrap_bytes:
        raise LimitExceeded("encrypted layer: larger than limits.bootstrap_bytes")
    enc.check_size(annotations, limits)
    public = enc.public_options(annotations)
    private = await provider.unwrap(annotations, limits)
    with private.symkey:
        return await asyncio.to_thread(layer.decrypt_verified, cipher, private, public)
