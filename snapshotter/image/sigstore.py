"""Where signatures come from: cosign's manifests in the registry, a lookaside store, and copies of both in the cache.

All of it is untrusted: a signature that verifies is good wherever it was found, anything else is nothing.
"""

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import aiohttp
import msgspec
import structlog
from yarl import URL

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import encoding
from snapshotter.digest import Digest
from snapshotter.errors import (
    ConfigError,
    IntegrityError,
    InvalidArgument,
    LimitExceeded,
    MalformedImage,
    NotFound,
    Unavailable,
)
from snapshotter.files import read_regular, write_atomic
from snapshotter.image.signature import CLAIM_BYTES
from snapshotter.keys.http import is_loopback
from snapshotter.registry import ranges
from snapshotter.registry.reference import Reference
from snapshotter.registry.transport import ImageSource

log = structlog.get_logger(__name__)

PAYLOAD_TYPE: Final = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE_ANNOTATION: Final = "dev.cosignproject.cosign/signature"
SIGNATURES: Final = 64  # of one image; more are not looked at
MESSAGE_BYTES: Final = 64 << 10  # an OpenPGP message
_KEPT_BYTES: Final = SIGNATURES * (MESSAGE_BYTES + CLAIM_BYTES) * 2
_SECONDS: Final = 30.0


class Found(NamedTuple):
    """A signature as stored: cosign's, detached, or (`payload` empty) an OpenPGP message that holds its payload."""

    payload: bytes
    signature: bytes


class _Layer(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = {}


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    layers: list[_Layer] = []


class _Kept(msgspec.Struct, frozen=True):
    payload: bytes
    signature: bytes


def tag_of(digest: Digest) -> str:
    """The tag under which cosign stores the signatures of an image."""
    return f"sha256-{digest.hex}.sig"


class SignatureSource(Protocol):
    async def find(self, reference: Reference, digest: Digest) -> Sequence[Found]:
        """Signatures of the manifest `digest` in the repository of `reference`; none is no error, nor is a bad one."""


class CosignSignatures:
    """Those next to the image in its registry."""

    def __init__(self, source: ImageSource, limits: Limits) -> None:
        self._source = source
        self._limits = limits

    async def find(self, reference: Reference, digest: Digest) -> Sequence[Found]:
        where = Reference(reference.host, reference.repository, tag_of(digest))
        try:
            raw, _, _ = await self._source.manifest(where)
        except NotFound:
            return []
        try:
            layers = msgspec.json.decode(raw, type=_Manifest).layers
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            raise MalformedImage(f"signatures {where}: not a manifest") from None
        found = []
        for layer in layers[:SIGNATURES]:
            signature = _decoded(layer.annotations.get(SIGNATURE_ANNOTATION, ""))
            if layer.media_type == PAYLOAD_TYPE and signature and layer.size <= CLAIM_BYTES:
                try:
                    payload = await self._source.blob(where, Digest.parse(layer.digest), layer.size, CLAIM_BYTES)
                except (InvalidArgument, NotFound, IntegrityError) as error:
                    log.info("signature not looked at", tag=str(where), error=str(error))
                    continue
                found.append(Found(payload, signature))
        return found


class Lookaside:
    """Simple signatures at BASE/<repository>@sha256=<hex>/signature-1, -2, … (containers-registries.d(5))."""

    def __init__(self, base: str) -> None:
        """`base`: file:///…, https://… or, of this machine, http://…. Raises ConfigError."""
        if not _is_base(base):
            raise ConfigError("config: policy.lookaside: write file:///DIRECTORY or https://…")
        self._base = base.rstrip("/")

    async def find(self, reference: Reference, digest: Digest) -> Sequence[Found]:
        place = f"{self._base}/{reference.repository}@sha256={digest.hex}"
        found: list[Found] = []
        if place.startswith("file://"):
            while len(found) < SIGNATURES:
                path = Path(place.removeprefix("file://")) / f"signature-{len(found) + 1}"
                message = await asyncio.to_thread(read_regular, path, MESSAGE_BYTES)
                if message is None:
                    break
                found.append(Found(b"", message))
            return found
        try:
            timeout, wanted = aiohttp.ClientTimeout(total=_SECONDS), {"Accept-Encoding": "identity"}
            async with aiohttp.ClientSession(timeout=timeout, headers=wanted, auto_decompress=False) as client:
                while len(found) < SIGNATURES:
                    message = await _download(client, f"{place}/signature-{len(found) + 1}")
                    if message is None:
                        break
                    found.append(Found(b"", message))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"lookaside signatures of {digest}: {type(error).__name__}") from None
        return found


def _is_base(text: str) -> bool:
    if text.startswith("file:///"):
        return True
    try:
        url = URL(text)
    except ValueError:
        return False
    return bool(url.host) and (url.scheme == "https" or (url.scheme == "http" and is_loopback(url.host or "")))


async def _download(client: aiohttp.ClientSession, url: str) -> bytes | None:
    async with client.get(url, allow_redirects=False) as answer:
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise Unavailable(f"lookaside signature: answered {answer.status}")
        ranges.check_unencoded("lookaside signature", answer.headers)
        message = await answer.content.read(MESSAGE_BYTES + 1)
        while len(message) <= MESSAGE_BYTES and (more := await answer.content.read(MESSAGE_BYTES)):
            message += more
        if len(message) > MESSAGE_BYTES:
            raise LimitExceeded(f"lookaside signature: longer than {MESSAGE_BYTES} bytes")
        return message


class KeptSignatures:
    """Copies in `cache_dir`/documents, so that a node restarts without registry and lookaside store."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def find(self, _reference: Reference | None, digest: Digest) -> Sequence[Found]:
        raw = await asyncio.to_thread(read_regular, self._path(digest), _KEPT_BYTES)
        try:
            kept = msgspec.json.decode(raw or b"[]", type=list[_Kept])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return []
        return [Found(item.payload, item.signature) for item in kept[:SIGNATURES]]

    async def keep(self, digest: Digest, found: Found) -> None:
        """Beside those of other repositories and requirements. A full or read-only cache is not an error."""
        kept = [found, *(item for item in await self.find(None, digest) if item != found)]
        try:
            raw = msgspec.json.encode([_Kept(*item) for item in kept[:SIGNATURES]])
            await asyncio.to_thread(write_atomic, self._path(digest), raw)
        except OSError as error:
            log.info("signatures not cached", digest=digest, error=error.strerror)

    def _path(self, digest: Digest) -> Path:
        return self._directory / f"{digest.hex}.signatures"


def manifest(
    found: Sequence[Found], others: Mapping[str, Any] = {}, config: Mapping[str, Any] = {}
) -> tuple[bytes, list[bytes]]:
    """cosign's manifest of these signatures, and the blobs to upload for it: the config, then the payloads.

    Layers and config of a manifest that is there already, `others`, stay. Raises MalformedImage if it is none.
    """
    diff_ids = [Digest.of(item.payload) for item in found]
    layers = [
        {
            "mediaType": PAYLOAD_TYPE,
            "size": len(item.payload),
            "digest": Digest.of(item.payload),
            "annotations": {SIGNATURE_ANNOTATION: base64.b64encode(item.signature).decode()},
        }
        for item in found
    ]
    history = [{"created": "0001-01-01T00:00:00Z"} for _ in found]
    try:
        layers = [*others.get("layers", ()), *layers]
        history = [*config.get("history", ()), *history]
        diff_ids = [*config.get("rootfs", {}).get("diff_ids", ()), *diff_ids]
    except (AttributeError, TypeError):
        raise MalformedImage("signatures: what is under their tag is none of cosign's manifests") from None
    empty = {"architecture": "", "created": "0001-01-01T00:00:00Z", "os": "", "config": {}}
    raw = encoding.json_bytes(
        {**empty, **config, "history": history, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    )
    described = {"mediaType": labels.MEDIA_OCI_CONFIG, "size": len(raw), "digest": Digest.of(raw)}
    kind: dict[str, Any] = {"schemaVersion": 2, "mediaType": labels.MEDIA_OCI_MANIFEST}
    return encoding.json_bytes({**kind, **others, "config": described, "layers": layers}), [
        raw,
        *(item.payload for item in found),
    ]


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True) if len(text) <= MESSAGE_BYTES else b""
    except (binascii.Error, ValueError):
        return b""
