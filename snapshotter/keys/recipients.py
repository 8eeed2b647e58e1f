"""Who can open an encrypted layer, listed and changed: its annotations alone, never a byte of it.

Recipients are numbered from 1 over all packets, in the order of `wrapping.describe`. One of several in a JWE packet has
a number of its own and can be taken out: each holds the content key for itself, and nothing authenticates their list.
A PKCS#7 packet is one recipient here, for however many certificates it is.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import encoding
from snapshotter.errors import InvalidArgument, MalformedImage
from snapshotter.keys import annotations as enc
from snapshotter.keys import wrapping
from snapshotter.keys.resource import ResourceUri
from snapshotter.keys.wrapping import Wrapped


class Listed(NamedTuple):
    """One recipient. `cipher`: how it gets the layer key; `recipient`: "kbs:///…", or "" when it is not named."""

    number: int
    scheme: str
    cipher: str
    recipient: str

    def is_for(self, kek: ResourceUri) -> bool:
        """Whether the packet names this KEK; a host that it may state is ignored."""
        try:
            return ResourceUri.parse(self.recipient) == kek
        except MalformedImage:
            return False


def listed(annotations: Mapping[str, str], limits: Limits) -> list[Listed]:
    """Raises MalformedImage, LimitExceeded."""
    found: list[Listed] = []
    for wrapped in wrapping.describe(annotations, limits):
        for cipher in _ciphers(wrapped):
            found.append(Listed(len(found) + 1, wrapped.scheme, cipher, wrapped.recipient))
    return found


def added(annotations: Mapping[str, str], packets: Mapping[str, Sequence[bytes]], limits: Limits) -> dict[str, str]:
    """With more packets, by annotation, behind those that are there. Raises LimitExceeded, MalformedImage."""
    changed = dict(annotations)
    for name, more in packets.items():
        changed[name] = ",".join(filter(None, (changed.get(name), enc.join(more))))
    wrapping.describe(changed, limits)
    return changed


def without(annotations: Mapping[str, str], numbers: Collection[int], limits: Limits) -> dict[str, str]:
    """Without these recipients. Raises InvalidArgument for numbers that are not there, and for all of them."""
    there = {entry.number for entry in listed(annotations, limits)}
    if unknown := set(numbers) - there:
        raise InvalidArgument(f"recipient {min(unknown)}: there are {len(there)}, numbered from 1")
    if there <= set(numbers):
        raise InvalidArgument("the last recipient cannot be removed: nobody could open the layer")
    kept: dict[str, list[bytes]] = {}
    first = 1
    for wrapped in wrapping.describe(annotations, limits):
        count = len(_ciphers(wrapped))
        stays = [place for place in range(count) if first + place not in numbers]
        first += count
        if stays:
            packet = wrapped.packet if len(stays) == count else _cut(wrapped.packet, stays)
            kept.setdefault(labels.ENC_KEYS_PREFIX + wrapped.scheme, []).append(packet)
    return {
        name: enc.join(kept[name]) if name in kept else text
        for name, text in annotations.items()
        if name in kept or not name.startswith(labels.ENC_KEYS_PREFIX)
    }


def _ciphers(wrapped: Wrapped) -> list[str]:
    """One for each recipient of the packet."""
    if wrapped.scheme == wrapping.JWE:
        return wrapping.jwe_ciphers(wrapped.packet)
    return sorted(wrapped.ciphers)


def _cut(packet: bytes, stays: Sequence[int]) -> bytes:
    """A JWE for several, for fewer. The outer encrypted_key repeats the first one, see jwe.wrap."""
    value: dict[str, Any] = json.loads(packet)
    value["recipients"] = [value["recipients"][place] for place in stays]
    if "encrypted_key" in value:
        value["encrypted_key"] = value["recipients"][0]["encrypted_key"]
    return encoding.json_bytes(value)
