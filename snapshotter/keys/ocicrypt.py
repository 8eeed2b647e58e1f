"""Whole encrypted layers: ciphertext and annotations in, plaintext out, and back. Interoperates with ocicrypt tools."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import layer
from snapshotter.errors import LimitExceeded
from snapshotter.keys import annotations as enc
from snapshotter.keys import jwe, packet
from snapshotter.keys.provider import KeyProvider

Recipient: TypeAlias = bytes | packet.Kek  # a public key (SPKI PEM), or a key that a key broker hands out


def encrypt_layer(
    plain: bytes | bytearray | memoryview, recipients: Sequence[Recipient]
) -> tuple[bytes, dict[str, str]]:
    """Encrypt under a fresh key, wrapped for every recipient: the layer's bytes and its annotations.

    Raises InvalidArgument for no recipient, and for one that is no supported public key.
    """
    public_keys = [recipient for recipient in recipients if isinstance(recipient, bytes)]
    keks = [recipient for recipient in recipients if not isinstance(recipient, bytes)]
    cipher, public, private = layer.encrypt(plain)
    wrapped: dict[str, list[bytes]] = {}
    with private.symkey, private.pack() as options:
        if public_keys or not keks:
            wrapped[labels.ENC_KEYS_JWE] = [jwe.wrap(options, public_keys)]
        if keks:
            wrapped[packet.ANNOTATION] = [packet.wrap(options, kek) for kek in keks]
    return cipher, enc.build(public, wrapped)


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
