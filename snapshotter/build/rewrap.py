"""Other recipients for an image that exists. Its layers and its config stay; only the manifest is written anew.

A node that has the image keeps running it, and one with an added key shares everything in its cache with the others.
"""

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import InvalidArgument
from snapshotter.image.claim import hint_tag
from snapshotter.image.manifest import INDEX_TYPES, Descriptor, document_type, parse_manifest
from snapshotter.keys import ocicrypt, recipients
from snapshotter.keys.ocicrypt import Recipient
from snapshotter.keys.provider import KeyProvider
from snapshotter.keys.resource import ResourceUri
from snapshotter.registry.reference import Reference
from snapshotter.registry.transport import ImageSource, ImageStore


@dataclass(frozen=True, slots=True)
class EncryptedManifest:
    """The manifest of an image with encrypted layers: `layers` by their place among all."""

    reference: Reference
    digest: Digest
    layers: Mapping[int, Descriptor]
    raw: bytes
    media_type: str

    @classmethod
    async def fetch(cls, source: ImageSource, reference: Reference, limits: Limits) -> "EncryptedManifest":
        """Raises InvalidArgument for an index and for an image without encrypted layers, and what `source` raises."""
        raw, content_type, digest = await source.manifest(reference)
        media_type = document_type(raw, content_type)
        if media_type in INDEX_TYPES:
            raise InvalidArgument(f"image {reference}: is an index of several images; name the tag of one of them")
        found = {
            place: layer
            for place, layer in enumerate(parse_manifest(raw, limits, content_type).layers)
            if layer.media_type.endswith(labels.ENCRYPTED_SUFFIX)
        }
        if not found:
            raise InvalidArgument(f"image {reference}: no layer is encrypted, so it has no recipients")
        return cls(reference, digest, found, raw, media_type)

    async def add(self, keys: KeyProvider, wanted: Sequence[Recipient], limits: Limits) -> bytes:
        """The manifest with more recipients of every encrypted layer.

        Raises what unwrapping raises, InvalidArgument for a recipient that cannot be, LimitExceeded.
        """
        changed: dict[int, Mapping[str, str]] = {}
        for place, layer in self.layers.items():
            private = await keys.unwrap(layer.annotations, limits)
            with private.symkey, private.pack() as options:
                packets = await asyncio.to_thread(ocicrypt.wrap, options, wanted)
            changed[place] = recipients.added(layer.annotations, packets, limits)
        return self._with(changed, limits)

    def remove(self, numbers: Collection[int], keks: Collection[ResourceUri], limits: Limits) -> bytes:
        """The manifest without the recipients of these numbers, and without those that are these KEKs.

        Raises InvalidArgument for one that is not there, when nobody would be left, and when the layers have different
        recipients, so that a number would mean another one in each.
        """
        lists = [recipients.listed(layer.annotations, limits) for layer in self.layers.values()]
        if any(other != lists[0] for other in lists[1:]):
            raise InvalidArgument(f"image {self.reference}: its layers have different recipients; encrypt it again")
        chosen = set(numbers)
        for kek in keks:
            found = {entry.number for entry in lists[0] if entry.is_for(kek)}
            if not found:
                raise InvalidArgument(f"image {self.reference}: {kek} is no recipient of it")
            chosen |= found
        changed = {place: recipients.without(layer.annotations, chosen, limits) for place, layer in self.layers.items()}
        return self._with(changed, limits)

    async def publish(self, store: ImageStore, content: bytes) -> Digest:
        """Store the changed manifest under the tag it came by; of a sealed image also for clients without labels."""
        target = replace(self.reference, digest=None)
        sealed = [layer for layer in self.layers.values() if labels.NYDUS_BOOTSTRAP in layer.annotations]
        if sealed and target.host:
            await store.put_manifest(replace(target, tag=hint_tag(sealed[-1].digest)), content, self.media_type)
        return await store.put_manifest(target, content, self.media_type)

    def _with(self, changed: Mapping[int, Mapping[str, str]], limits: Limits) -> bytes:
        """The same document, whatever else it has, with other annotations."""
        document: dict[str, Any] = json.loads(self.raw)
        for place, annotations in changed.items():
            document["layers"][place]["annotations"] = dict(annotations)
        content = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        parse_manifest(content, limits)  # also bounds what it has become
        return content


def check_target(reference: Reference) -> None:
    """Raises InvalidArgument when a changed manifest would have no tag to be found by."""
    if reference.digest is not None and reference.tag is None:
        raise InvalidArgument(f"image {reference}: name the tag that the changed manifest gets, as TAG@sha256:…")
