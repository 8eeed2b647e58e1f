"""Whole encrypted layers (ocicrypt), as skopeo and ctr-enc make them: fetched, authenticated, decrypted, unpacked.

One MAC covers a layer, so all of it is fetched into a nameless file below the trusted root before a byte is decrypted.
Such an image is neither lazy nor small; the way is there for images that nobody has converted yet.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import structlog

from snapshotter import failpoints
from snapshotter.build.feed import consume
from snapshotter.build.unpack import LayerUnpacker
from snapshotter.config import Limits
from snapshotter.crypto import layer as cipher
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.errors import LimitExceeded
from snapshotter.image.resolver import EncryptedLayer
from snapshotter.keys import annotations as enc
from snapshotter.keys.provider import KeyProvider
from snapshotter.registry.transport import ImageSource

log = structlog.get_logger(__name__)

_STEP = 1 << 20


class WholeLayers:
    """Opens layers of admitted images; nothing is kept."""

    def __init__(self, source: ImageSource, provider: KeyProvider, limits: Limits) -> None:
        self._source = source
        self._provider = provider
        self._limits = limits

    async def unpack(
        self, layer: EncryptedLayer, target: Path, staging: Path, lower: Sequence[Path], going: Callable[[], bool]
    ) -> None:
        """Fill `target` with the layer's files. Raises as `opened`, and BadLayer, DigestMismatch, InterruptedError.

        `staging`: an empty directory beside it. `lower` and `going`: as for LayerUnpacker.
        """
        async with self.opened(layer, staging) as plain:
            unpacker = LayerUnpacker(target, staging, lower, self._limits)
            await asyncio.to_thread(unpacker.unpack, plain, layer.diff_id, going)
        log.info("encrypted layer unpacked", layer=layer.descriptor.digest, bytes=layer.descriptor.size)

    @asynccontextmanager
    async def opened(self, layer: EncryptedLayer, directory: Path) -> AsyncIterator[Iterator[bytes]]:
        """The layer as it was before it was encrypted, in pieces; all of it has been authenticated.

        `directory`: where its ciphertext waits, out of anybody else's reach. Raises KeyDenied, DecryptError
        (layer-hmac), DigestMismatch, MalformedImage, LimitExceeded and the registry's errors.
        """
        described = layer.descriptor
        if described.size > self._limits.encrypted_layer_bytes:
            raise LimitExceeded(f"layer {described.digest}: larger than limits.encrypted_layer_bytes")
        public = enc.public_options(described.annotations)
        usable = layer.admission.usable(described.annotations, self._limits)
        private = await self._provider.unwrap(usable, self._limits)
        with private.symkey, tempfile.TemporaryFile(dir=directory) as spool:
            mac = cipher.Mac(private)

            def keep(pieces: Iterator[bytes]) -> None:
                for piece in pieces:
                    mac.update(piece)
                    spool.write(piece)

            await consume(self._source.blob_stream(layer.source, described.digest, described.size), keep)
            mac.check(public)
            failpoints.hit("unpack.fetched")
            yield _decrypted(spool, private)


def _decrypted(spool: BinaryIO, private: LayerPrivate) -> Iterator[bytes]:
    spool.seek(0)
    decryptor = cipher.decryptor(private)
    while piece := spool.read(_STEP):
        yield decryptor.update(piece)
