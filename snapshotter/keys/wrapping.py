"""For whom and how the key of a layer is wrapped, as its annotations state it. Nothing is opened here.

ocicrypt names no JWE or PKCS#7 recipient, so of those only the algorithm is known; a packet of a key broker names its
KEK.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import encoding
from snapshotter.errors import MalformedImage
from snapshotter.keys import annotations as enc
from snapshotter.keys import packet

JWE: Final = "jwe"  # as a scheme
PKCS7: Final = "PKCS7"  # as a cipher
_PACKET_BYTES = 256 << 10
_KID_CHARACTERS = 512  # no kbs:/// resource has a longer name


class Wrapped(NamedTuple):
    """One packet. `ciphers`: how the layer key is got from it; `recipient`: "kbs:///…", or "" when it names none."""

    scheme: str  # "jwe", "pkcs7", "provider.attestation-agent", …
    packet: bytes
    ciphers: frozenset[str]
    recipient: str


def describe(annotations: Mapping[str, str], limits: Limits) -> list[Wrapped]:
    """All packets of a layer, in the order of their annotations. Raises MalformedImage, LimitExceeded."""
    enc.check_size(annotations, limits)
    return [
        Wrapped(scheme, raw, *_details(scheme, raw))
        for scheme in enc.schemes(annotations)
        for raw in enc.packets(annotations, labels.ENC_KEYS_PREFIX + scheme, limits)
    ]


def restrict(annotations: Mapping[str, str], keep: Callable[[Wrapped], bool], limits: Limits) -> dict[str, str]:
    """The annotations without the packets that `keep` refuses. Raises as `describe`."""
    kept: dict[str, list[bytes]] = {}
    for wrapped in describe(annotations, limits):
        if keep(wrapped):
            kept.setdefault(labels.ENC_KEYS_PREFIX + wrapped.scheme, []).append(wrapped.packet)
    rest = {name: text for name, text in annotations.items() if not name.startswith(labels.ENC_KEYS_PREFIX)}
    return rest | {name: enc.join(packets) for name, packets in kept.items()}


def recipient(scheme: str, raw: bytes) -> str:
    """Whose key opens a packet; "" if it does not say. Raises as `describe`."""
    return _details(scheme, raw)[1]


def _details(scheme: str, raw: bytes) -> tuple[frozenset[str], str]:
    if scheme == JWE:
        return frozenset(jwe_ciphers(raw)), ""
    if scheme == "pkcs7":
        return frozenset((PKCS7,)), ""
    if labels.ENC_KEYS_PREFIX + scheme == packet.ANNOTATION:
        value = encoding.json_object(raw, f"{scheme} packet", _PACKET_BYTES)
        named = value.get("provider", "kbs") == "kbs"  # others' key ids only look alike
        kid = str(value.get("kid", "")) if named else ""
        return frozenset((str(value.get("wrap_type", "")),)), kid if len(kid) <= _KID_CHARACTERS else ""
    return frozenset((scheme,)), ""


def jwe_ciphers(raw: bytes) -> list[str]:
    """The `alg` of every recipient, in order: of the protected header, or of its own. Raises as `describe`."""
    value = encoding.json_object(raw, "jwe packet", _PACKET_BYTES)
    protected = encoding.b64url_decode(
        encoding.string(value, "protected", "jwe packet"), "jwe packet: protected header"
    )
    shared = encoding.json_object(protected, "jwe packet: protected header", _PACKET_BYTES)
    entries: Any = value.get("recipients", [value])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise MalformedImage("jwe packet: recipients is not a list of objects")
    headers = [entry.get("header", {}) for entry in entries]
    if not all(isinstance(header, dict) for header in headers):
        raise MalformedImage("jwe packet: a header is not an object")
    return [str((shared | header).get("alg", "")) for header in headers]
