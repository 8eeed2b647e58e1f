"""The files of the FUSE session: per attached image the bootstrap (device 0) and one virtual device per data blob.

A device belongs to one bootstrap, never to a blob digest: two images may name one blob with different tables, and each
must read by its own. What they share are ciphertext cache entries.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from snapshotter.blobs.chunks import Counters, ImageCounters
from snapshotter.blobs.fetcher import Fetcher
from snapshotter.blobs.reader import Buffer, ChunkReader
from snapshotter.errors import IntegrityError, RegistryUnavailable
from snapshotter.ondemand.attachment import Attachment, BlobTable

_NAME = re.compile(rb"([1-9][0-9]{0,12})-(0|[1-9][0-9]{0,2})")


class BootstrapDevice:
    """The EROFS metadata image, from memory."""

    def __init__(self, node: int, content: memoryview, counters: ImageCounters) -> None:
        self.node = node
        self.counters = counters
        self.size = len(content)
        self._content = content

    def cached(self, offset: int, length: int) -> Sequence[Buffer]:
        return [self._content[offset : offset + length]]

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        return self.cached(offset, length)


class BlobDevice:
    """The decoded content of one data blob at the offsets its bootstrap gives it."""

    def __init__(
        self,
        table: BlobTable,
        reader: ChunkReader,
        fetcher: Fetcher,
        counters: ImageCounters,
        loop: asyncio.AbstractEventLoop,
        patience: float,
    ) -> None:
        self.node = table.node
        self.counters = counters
        self.size = table.device_bytes
        self._table = table
        self._reader = reader
        self._fetcher = fetcher
        self._loop = loop
        self._patience = patience

    def cached(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """The bytes, cut at the end of the device, if they are on this machine. From any thread."""
        table = self._table
        trigger = table.trigger
        if trigger >= 0 and table.find(offset) <= trigger <= table.find(offset + length - 1):
            self._loop.call_soon_threadsafe(self._fetcher.advance, table, trigger)
        return self._reader.cached(table, offset, length)

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """The same, fetching what is missing. Raises IntegrityError, RegistryUnavailable and others; on the loop."""
        try:
            async with asyncio.timeout(self._patience):
                return await self._reader.read(self._table, self._fetcher, offset, length)
        except TimeoutError:
            raise RegistryUnavailable(
                f"blob {self._table.digest}: not fetched within {self._patience:g} s", reason="timeout"
            ) from None


Device = BootstrapDevice | BlobDevice


class Image(NamedTuple):
    """One attached image."""

    attachment: Attachment
    fetcher: Fetcher
    devices: tuple[Device, ...]


class Devices:
    """All attached images. Changed on the loop, looked into from any thread."""

    def __init__(
        self,
        reader: ChunkReader,
        make_fetcher: Callable[[str, ImageCounters], Fetcher],
        forget: Callable[[int], None],
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        patience: float,
    ) -> None:
        """`forget(node)` drops what is decoded of a blob; `patience` seconds per read."""
        self._reader = reader
        self._make_fetcher = make_fetcher
        self._forget = forget
        self._counters = counters
        self._loop = loop
        self._patience = patience
        self._images: dict[int, Image] = {}
        self._nodes: dict[int, Device] = {}

    def attach(self, attachment: Attachment) -> None:
        """Serve an image. Raises IntegrityError if its id is taken by another one."""
        known = self._images.get(attachment.image_id)
        if known is not None:
            if known.attachment.bootstrap_digest != attachment.bootstrap_digest:
                raise IntegrityError(f"image id {attachment.image_id} is taken by another image", reason="internal")
            attachment.close()
            return
        counters = self._counters.of_image(attachment.image_id, str(attachment.manifest))
        fetcher = self._make_fetcher(attachment.repository, counters)
        devices: list[Device] = [BootstrapDevice(attachment.node(0), attachment.bootstrap, counters)]
        devices += [
            BlobDevice(blob, self._reader, fetcher, counters, self._loop, self._patience) for blob in attachment.blobs
        ]
        counters.note("attached", id=attachment.image_id, devices=len(devices))
        self._nodes.update((device.node, device) for device in devices)
        self._images[attachment.image_id] = Image(attachment, fetcher, tuple(devices))

    def warm_up(self, image_id: int) -> None:
        """Make contact with the registry of an image that is about to be read."""
        image = self._images[image_id]
        for table in image.attachment.blobs[:1]:
            image.fetcher.warm_up(table)

    async def detach(self, image_id: int) -> None:
        """Forget an image and what was decoded of it."""
        image = self._images.pop(image_id, None)
        if image is not None:
            for device in image.devices:
                self._nodes.pop(device.node, None)
            await image.fetcher.close()
            for device in image.devices:
                self._forget(device.node)
            counters = self._counters.forget_image(image_id)
            counters.note("detached", id=image_id, **counters.snapshot())
            image.attachment.close()

    def find(self, node: int) -> Device | None:
        return self._nodes.get(node)

    def lookup(self, name: bytes) -> Device | None:
        """The device behind a file name `<id>-<device>`."""
        match = _NAME.fullmatch(name)
        return self._nodes.get(int(match[1]) << 8 | int(match[2])) if match and int(match[2]) < 256 else None

    def images(self) -> list[Image]:
        return list(self._images.values())
