"""Whole encrypted layers: ciphertext and annotations in, plaintext out, and back. Interoperates with ocicrypt tools."""

import asyncio
from collections.abc import Mapping, Sequence

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import layer
from snapshotter.errors import LimitExceeded
from snapshotter.keys import annotations as enc
from snapshotter.keys import jwe
from snapshotter.keys.provider import KeyProvider


def encrypt_layer(plain: bytes | bytearray | memoryview, recipients: Sequence[bytes]) -> tuple[bytes, dict[str, str]]:
    """Encrypt under a fresh key, wrapped for every recipient (SPKI PEM): the layer's bytes and its annotations.

    Raises InvalidArgument for a recipient that is no supported public key.
    """
    cipher, public, private = layer.encrypt(plain)
    with private.symkey, private.pack() as options:
        packet = jwe.wrap(options, recipients)
    return cipher, enc.build(public, {labels.ENC_KEYS_JWE: [packet]})


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
