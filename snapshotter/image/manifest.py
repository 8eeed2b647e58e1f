"""Image manifests, indexes and configs as bounded structs (OCI image-spec v1.1, Docker image manifest v2 schema 2).

Every document here comes from whoever owns the registry. A parser only sees bytes whose digest was checked where one
is known, refuses unknown media types by name, and refuses JSON that another parser could read differently: members
that appear twice, or whose names differ from known ones only in case (Go's decoder takes either).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import DigestMismatch, InvalidArgument, LimitExceeded, MalformedImage, NotFound
from snapshotter.registry.reference import Reference
from snapshotter.registry.transport import ImageSource

MANIFEST_TYPES = frozenset({labels.MEDIA_OCI_MANIFEST, labels.MEDIA_DOCKER_MANIFEST})
INDEX_TYPES = frozenset({labels.MEDIA_OCI_INDEX, labels.MEDIA_DOCKER_INDEX})
CONFIG_TYPES = frozenset({labels.MEDIA_OCI_CONFIG, labels.MEDIA_DOCKER_CONFIG})
_GENERIC_TYPES = frozenset({"", "application/json", "application/octet-stream", "text/plain"})  # say nothing

_OCI_LAYER = "application/vnd.oci.image.layer."
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff."
LAYER_TYPES = frozenset(
    {f"{_OCI_LAYER}{kind}v1.tar{packing}" for kind in ("", "nondistributable.") for packing in ("", "+gzip", "+zstd")}
    | {f"{_DOCKER_LAYER}tar{packing}" for packing in ("", ".gzip", ".zstd")}
    | {labels.MEDIA_NYDUS_BLOB}
)

_S = TypeVar("_S")


class _Struct(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Members we do not know are allowed, as the specification demands."""


class Platform(_Struct, frozen=True):
    """Where an index entry runs."""

    architecture: str
    os: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(_Struct, frozen=True, kw_only=True):
    """What is where: type, digest, size in bytes."""

    media_type: str
    digest: Digest
    size: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    annotations: dict[str, str] = {}
    platform: Platform | None = None


class Manifest(_Struct, frozen=True, kw_only=True):
    """One image: its config and its layers, bottom first."""

    schema_version: Literal[2]
    media_type: str = ""
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}


class Index(_Struct, frozen=True, kw_only=True):
    """Several images, one per platform."""

    schema_version: Literal[2]
    media_type: str = ""
    manifests: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[Digest, ...]


class _ConfigFields(msgspec.Struct, frozen=True):
    architecture: str
    os: str
    rootfs: _RootFs
    variant: str = ""


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """An image config: the members this program reads, and all of it as it was."""

    platform: Platform
    diff_ids: tuple[Digest, ...]
    raw: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """An image whose manifest and config were fetched and agree with each other's digests and sizes."""

    manifest: Manifest
    manifest_digest: Digest
    image_config: ImageConfig
    raw_config: bytes

    @property
    def config(self) -> dict[str, Any]:
        return self.image_config.raw


def document_type(raw: bytes, content_type: str = "") -> str:
    """Media type of a manifest or index from its transport's Content-Type and its own `mediaType`.

    The two must not contradict each other (CVE-2021-41190). Raises MalformedImage, also for unknown types.
    """
    return _kind(_load(raw, "manifest"), content_type)


def _kind(document: Mapping[str, Any], content_type: str) -> str:
    declared = content_type.partition(";")[0].strip()
    stated = document.get("mediaType", "")
    if not isinstance(stated, str):
        raise MalformedImage("manifest: mediaType is not a string")
    if stated and declared not in _GENERIC_TYPES and stated != declared:
        raise MalformedImage(f"manifest: served as {_shown(declared)}, calls itself {_shown(stated)}")
    kind = stated or ("" if declared in _GENERIC_TYPES else declared)
    if not kind:
        kind = labels.MEDIA_OCI_INDEX if "manifests" in document else labels.MEDIA_OCI_MANIFEST
    if kind not in MANIFEST_TYPES | INDEX_TYPES:
        raise MalformedImage(f"manifest: unsupported media type {_shown(kind)}")
    return kind


def parse_manifest(raw: bytes, limits: Limits, content_type: str = "") -> Manifest:
    """Raises MalformedImage and LimitExceeded."""
    _bound("manifest", "manifest_bytes", len(raw), limits.manifest_bytes)
    document = _load(raw, "manifest")
    kind = _kind(document, content_type)
    if kind not in MANIFEST_TYPES:
        raise MalformedImage(f"manifest: is an index ({kind}), not the manifest of one image")
    if "manifests" in document:
        raise MalformedImage("manifest: has `manifests` like an index")
    _no_lookalikes(Manifest, document, "manifest")
    manifest = _decode(raw, Manifest, "manifest")
    _bound("manifest", "layers", len(manifest.layers), limits.layers)
    _check_annotations("manifest", manifest.annotations, limits)
    for descriptor, shown in zip(
        (manifest.config, *manifest.layers), [document["config"], *document["layers"]], strict=True
    ):
        _no_lookalikes(Descriptor, shown, "manifest: descriptor")
        _check_descriptor("manifest", descriptor, limits)
    if manifest.config.media_type not in CONFIG_TYPES:
        raise MalformedImage(f"manifest: unsupported config media type {_shown(manifest.config.media_type)}")
    _bound("config", "config_bytes", manifest.config.size, limits.config_bytes)
    for layer in manifest.layers:
        if layer.media_type.removesuffix(labels.ENCRYPTED_SUFFIX) not in LAYER_TYPES:
            raise MalformedImage(f"manifest: unsupported layer media type {_shown(layer.media_type)}")
    return manifest


def parse_index(raw: bytes, limits: Limits, content_type: str = "") -> Index:
    """Raises MalformedImage and LimitExceeded. Entries of foreign media types (attestations, …) are kept."""
    _bound("index", "manifest_bytes", len(raw), limits.manifest_bytes)
    document = _load(raw, "index")
    kind = _kind(document, content_type)
    if kind not in INDEX_TYPES:
        raise MalformedImage(f"index: is {kind}, not an index")
    if "layers" in document or "config" in document:
        raise MalformedImage("index: has `layers` or `config` like a manifest")
    _no_lookalikes(Index, document, "index")
    index = _decode(raw, Index, "index")
    _bound("index", "index_entries", len(index.manifests), limits.index_entries)
    _check_annotations("index", index.annotations, limits)
    for entry, shown in zip(index.manifests, document["manifests"], strict=True):
        _no_lookalikes(Descriptor, shown, "index: descriptor")
        _no_lookalikes(Platform, shown.get("platform") or {}, "index: platform")
        _check_descriptor("index", entry, limits)
        if entry.media_type in MANIFEST_TYPES | INDEX_TYPES:
            _bound("index entry", "manifest_bytes", entry.size, limits.manifest_bytes)
    return index


def parse_config(raw: bytes, limits: Limits) -> ImageConfig:
    """Raises MalformedImage and LimitExceeded."""
    _bound("config", "config_bytes", len(raw), limits.config_bytes)
    document = _load(raw, "config")
    _no_lookalikes(_ConfigFields, document, "config", also=("config",))
    fields = _decode(raw, _ConfigFields, "config")
    _no_lookalikes(_RootFs, document["rootfs"], "config: rootfs", also=("type",))
    if not isinstance(document.get("config"), dict | None):
        raise MalformedImage("config: `config` is not an object")
    platform = Platform(architecture=fields.architecture, os=fields.os, variant=fields.variant)
    return ImageConfig(platform, fields.rootfs.diff_ids, document)


def choose_platform(index: Index, platform: str) -> Descriptor:
    """The entry for `os/architecture[/variant]`. Raises NotFound naming what there is, InvalidArgument.

    Without a variant in `platform` an entry without one, or arm64's default `v8`, is preferred; then the first.
    """
    os_name, _, rest = platform.partition("/")
    architecture, _, variant = rest.partition("/")
    if not os_name or not architecture:
        raise InvalidArgument(f"platform {platform[:80]!r}: write os/architecture[/variant]")
    default = "v8" if architecture == "arm64" else ""  # what an entry without a variant means
    there = [(entry, entry.platform) for entry in index.manifests if entry.media_type in MANIFEST_TYPES]
    fitting = [
        (entry, found.variant or default)
        for entry, found in there
        if found and (found.os, found.architecture) == (os_name, architecture)
    ]
    if variant:
        fitting = [(entry, found) for entry, found in fitting if found == variant]
    if not fitting:
        known = ", ".join(sorted({str(found) for _, found in there if found})[:16])
        raise NotFound(f"index has no image for platform {platform[:80]}, only for {_shown(known, 400)}")
    return min(fitting, key=lambda pair: pair[1] != default)[0]


def chain_ids(diff_ids: Iterable[str]) -> list[str]:
    """Chain ids of layers, bottom first (OCI image-spec config.md, Layer ChainID)."""
    chain: list[str] = []
    for diff_id in diff_ids:
        below = chain[-1] if chain else None
        chain.append(diff_id if below is None else str(Digest.of(f"{below} {diff_id}".encode())))
    return chain


async def image_digests(source: ImageSource, reference: Reference, limits: Limits) -> list[Digest]:
    """Digests of the image manifests that the index at `reference` lists; empty if it is not an index."""
    raw, content_type, _ = await source.manifest(reference)
    if document_type(raw, content_type) not in INDEX_TYPES:
        return []
    index = parse_index(raw, limits, content_type)
    return [entry.digest for entry in index.manifests if entry.media_type in MANIFEST_TYPES]


async def fetch_image(source: ImageSource, reference: Reference, platform: str | None, limits: Limits) -> ResolvedImage:
    """Manifest and config of the image at `reference`; an index leads to the entry for `platform`.

    With `platform` None an index is refused: the caller holds the digest of one image. Raises DigestMismatch,
    MalformedImage, LimitExceeded, NotFound, and the registry's errors.
    """
    raw, content_type, digest = await source.manifest(reference)
    if platform is not None and document_type(raw, content_type) in INDEX_TYPES:
        entry = choose_platform(parse_index(raw, limits, content_type), platform)
        raw, content_type, digest = await source.manifest(reference.pinned(entry.digest))
        if len(raw) != entry.size:
            raise DigestMismatch(f"manifest {digest}: expected size {entry.size}, got {len(raw)}")
    manifest = parse_manifest(raw, limits, content_type)
    described = manifest.config
    raw_config = await source.blob(reference, described.digest, described.size, limits.config_bytes)
    config = parse_config(raw_config, limits)
    if len(config.diff_ids) != len(manifest.layers):
        raise MalformedImage(
            f"image {reference}: config has {len(config.diff_ids)} diff_ids, manifest has {len(manifest.layers)} layers"
        )
    return ResolvedImage(manifest, digest, config, raw_config)


def encode(document: Manifest | Index | Descriptor) -> bytes:
    """JSON as the specification names its members; equal values give equal bytes."""
    plain = msgspec.to_builtins(document, builtin_types=(), enc_hook=str)
    return json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()


def _check_descriptor(where: str, descriptor: Descriptor, limits: Limits) -> None:
    _bound(f"{where}: {descriptor.digest}", "blob_bytes", descriptor.size, limits.blob_bytes)
    _check_annotations(f"{where}: {descriptor.digest}", descriptor.annotations, limits)


def _check_annotations(where: str, annotations: Mapping[str, str], limits: Limits) -> None:
    size = sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items())
    _bound(f"{where}: annotations", "annotation_bytes", size, limits.annotation_bytes)


def _bound(what: str, row: str, value: int, limit: int) -> None:
    if value > limit:
        raise LimitExceeded(f"{what}: {value} is more than limits.{row} = {limit}")


def _decode(raw: bytes, kind: type[_S], what: str) -> _S:
    try:
        return msgspec.json.decode(raw, type=kind, dec_hook=_digest_hook)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedImage(f"{what}: {str(error)[:200]}") from error


def _digest_hook(kind: type, value: Any) -> Any:
    if kind is not Digest or not isinstance(value, str):
        raise ValueError("not a digest")
    try:
        return Digest.parse(value)
    except InvalidArgument as error:
        raise ValueError(str(error)) from error


def _load(raw: bytes, what: str) -> dict[str, Any]:
    """The document as plain values. Raises MalformedImage unless every reader sees the same ones."""
    try:
        msgspec.json.decode(raw)  # stricter than json about surrogates and number ranges
        document = json.loads(raw.decode(), object_pairs_hook=_once, parse_constant=_refuse_constant)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedImage(f"{what}: {str(error)[:200]}") from error
    if not isinstance(document, dict):
        raise MalformedImage(f"{what}: not a JSON object")
    return document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("an object has a member twice")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_lookalikes(kind: type, document: Mapping[str, Any], what: str, also: Sequence[str] = ()) -> None:
    known = {field.encode_name for field in msgspec.structs.fields(kind)} | set(also)
    folded = {name.casefold() for name in known}
    for name in document:
        if name not in known and name.casefold() in folded:
            raise MalformedImage(f"{what}: member {_shown(name)} differs from a known one only in case")


def _shown(text: str, longest: int = 120) -> str:
    return repr(text[:longest])
