"""The `org.opencontainers.image.enc.*` annotations of an encrypted layer (ocicrypt, spec of its annotations).

enc.pubopts          std-base64(public options JSON)
enc.keys.SCHEME      std-base64(packet)[,std-base64(packet)…]     each packet wraps the same private options
"""

from collections.abc import Mapping, Sequence

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import encoding
from snapshotter.crypto.layer import LayerPublic
from snapshotter.errors import LimitExceeded, MalformedImage


def check_size(annotations: Mapping[str, str], limits: Limits) -> None:
    """Raises LimitExceeded when all of them together are longer than limits.annotation_bytes."""
    size = sum(
        len(name.encode(errors="replace")) + len(text.encode(errors="replace")) for name, text in annotations.items()
    )
    if size > limits.annotation_bytes:
        raise LimitExceeded("layer annotations: larger than limits.annotation_bytes")


def public_options(annotations: Mapping[str, str]) -> LayerPublic:
    """Raises MalformedImage when they are missing, not as ocicrypt writes them, or name another cipher."""
    text = annotations.get(labels.ENC_PUBOPTS)
    if not text:
        raise MalformedImage(f"encrypted layer: annotation {labels.ENC_PUBOPTS} is missing")
    return LayerPublic.parse(encoding.b64_decode(text, labels.ENC_PUBOPTS))


def packets(annotations: Mapping[str, str], name: str, limits: Limits) -> list[bytes]:
    """The packets of one `keys.*` annotation, [] if absent. Raises MalformedImage, LimitExceeded."""
    text = annotations.get(name)
    if not text:
        return []
    parts = text.split(",", limits.recipients)
    if len(parts) > limits.recipients:
        raise LimitExceeded(f"{name}: more packets than limits.recipients")
    return [encoding.b64_decode(part, name) for part in parts]


def schemes(annotations: Mapping[str, str]) -> list[str]:
    """The wrapping schemes present, such as `jwe` or `provider.attestation-agent`, sorted."""
    prefix = labels.ENC_KEYS_PREFIX
    return sorted(name.removeprefix(prefix) for name in annotations if name.startswith(prefix))


def build(public: LayerPublic, wrapped: Mapping[str, Sequence[bytes]]) -> dict[str, str]:
    """Annotations from public options and, by annotation name, the packets."""
    keys = {name: join(parts) for name, parts in wrapped.items()}
    return keys | {labels.ENC_PUBOPTS: encoding.b64_encode(public.pack())}


def join(parts: Sequence[bytes]) -> str:
    """Value of a `keys.*` annotation."""
    return ",".join(encoding.b64_encode(packet) for packet in parts)
