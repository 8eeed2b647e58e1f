"""Manifests, indexes and configs: what is taken, what is refused, and that no other parser reads them differently."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import DigestMismatch, InvalidArgument, LimitExceeded, MalformedImage, NotFound
from snapshotter.image import manifest as m
from snapshotter.registry.layout import OciLayout
from snapshotter.registry.reference import Reference

LIMITS = Limits()
LAYER = Digest.of(b"layer")
Document = dict[str, Any]


def descriptor(digest: str = LAYER, size: int = 5, kind: str = labels.MEDIA_LAYER_GZIP, **more: Any) -> Document:
    return {"mediaType": kind, "digest": digest, "size": size, **more}


def manifest(**changes: Any) -> Document:
    return {
        "schemaVersion": 2,
        "mediaType": labels.MEDIA_OCI_MANIFEST,
        "config": descriptor(Digest.of(b"config"), 6, labels.MEDIA_OCI_CONFIG),
        "layers": [descriptor()],
    } | changes


def entry(platform: str, name: str = "", kind: str = labels.MEDIA_OCI_MANIFEST) -> Document:
    os_name, architecture, *variant = platform.split("/")
    shown = {"os": os_name, "architecture": architecture} | ({"variant": variant[0]} if variant else {})
    return descriptor(Digest.of((name or platform).encode()), 100, kind, platform=shown)


def index(*entries: Document, **changes: Any) -> Document:
    return {"schemaVersion": 2, "mediaType": labels.MEDIA_OCI_INDEX, "manifests": list(entries)} | changes


def config(**changes: Any) -> Document:
    return {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [LAYER]}} | changes


def raw(document: Document) -> bytes:
    return json.dumps(document).encode()


# what is taken


def test_a_manifest_is_read_as_it_says() -> None:
    layers = [
        descriptor(kind=labels.MEDIA_NYDUS_BLOB, annotations={labels.NYDUS_BLOB: "true"}),
        descriptor(kind=labels.MEDIA_LAYER_GZIP_ENCRYPTED),
    ]
    parsed = m.parse_manifest(raw(manifest(layers=layers, annotations={"a": "b"}, unknown=[1])), LIMITS)
    assert [layer.media_type for layer in parsed.layers] == [kind["mediaType"] for kind in layers]
    assert parsed.layers[0].annotations == {labels.NYDUS_BLOB: "true"}
    assert (parsed.config.size, parsed.annotations) == (6, {"a": "b"})
    assert m.parse_manifest(m.encode(parsed), LIMITS) == parsed


def test_a_docker_manifest_is_read_too() -> None:
    document = manifest(
        mediaType=labels.MEDIA_DOCKER_MANIFEST,
        config=descriptor(kind=labels.MEDIA_DOCKER_CONFIG),
        layers=[descriptor(kind=labels.MEDIA_DOCKER_LAYER_GZIP)],
    )
    assert m.parse_manifest(raw(document), LIMITS, labels.MEDIA_DOCKER_MANIFEST).layers[0].size == 5


@pytest.mark.parametrize(
    ("content_type", "stated", "kind"),
    [
        (labels.MEDIA_OCI_MANIFEST, None, labels.MEDIA_OCI_MANIFEST),
        (f"{labels.MEDIA_OCI_MANIFEST}; charset=utf-8", labels.MEDIA_OCI_MANIFEST, labels.MEDIA_OCI_MANIFEST),
        ("", labels.MEDIA_OCI_MANIFEST, labels.MEDIA_OCI_MANIFEST),
        ("text/plain", labels.MEDIA_DOCKER_MANIFEST, labels.MEDIA_DOCKER_MANIFEST),
        ("application/json", None, labels.MEDIA_OCI_MANIFEST),
        ("", None, labels.MEDIA_OCI_MANIFEST),
    ],
)
def test_the_media_type_comes_from_either_place(content_type: str, stated: str | None, kind: str) -> None:
    document = manifest()
    del document["mediaType"]
    assert m.document_type(raw(document | ({"mediaType": stated} if stated else {})), content_type) == kind


def test_an_index_without_any_type_is_known_by_its_members() -> None:
    document = index()
    del document["mediaType"]
    assert m.document_type(raw(document)) == labels.MEDIA_OCI_INDEX


# what is refused


@pytest.mark.parametrize(
    ("content_type", "document"),
    [
        (labels.MEDIA_OCI_INDEX, manifest()),  # CVE-2021-41190
        (labels.MEDIA_DOCKER_MANIFEST, manifest()),
        ("", manifest(mediaType=7)),
        ("", manifest(mediaType="application/vnd.docker.distribution.manifest.v1+prettyjws")),
        ("image/png", manifest(mediaType="")),
        ("", index()),
        ("", manifest(manifests=[])),
        ("", manifest(schemaVersion=1)),
        ("", manifest(schemaVersion="2")),
        ("", manifest(config=None)),
        ("", manifest(layers=None)),
        ("", manifest(layers={})),
        ("", manifest(layers=[7])),
        ("", manifest(layers=[descriptor(size=-1)])),
        ("", manifest(layers=[descriptor(size=1.5)])),  # type: ignore[arg-type]
        ("", manifest(layers=[descriptor(size=1 << 63)])),
        ("", manifest(layers=[descriptor("sha256:short")])),
        ("", manifest(layers=[descriptor("sha512:" + "0" * 128)])),
        ("", manifest(layers=[descriptor("../../etc/passwd")])),
        ("", manifest(layers=[descriptor(annotations={"a": 1})])),
        ("", manifest(layers=[descriptor(kind="application/vnd.oci.image.layer.v1.tar+brotli")])),
        ("", manifest(layers=[descriptor(kind=labels.MEDIA_LAYER_GZIP + "+encrypted+encrypted")])),
        ("", manifest(config=descriptor(kind="application/vnd.oci.empty.v1+json"))),
        ("", manifest(Layers=[])),
        ("", manifest() | {"con\ufb01g": {}}),  # ligature fi
        ("", manifest(layers=[descriptor(Digest="sha256:" + "0" * 64)])),
        ("", manifest(layers=[descriptor() | {"\u017fize": 7}])),  # long s: Go folds it to s
        ("", manifest(config=descriptor(kind=labels.MEDIA_OCI_CONFIG) | {"SIZE": 1})),
    ],
    ids=range(28),
)
def test_an_ambiguous_or_broken_manifest_is_refused(content_type: str, document: Document) -> None:
    with pytest.raises(MalformedImage):
        m.parse_manifest(raw(document), LIMITS, content_type)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xef\xbb\xbf" + raw(manifest()),
        raw(manifest())[:-1],
        raw(manifest()) + b"{}",
        raw(manifest()).decode().encode("utf-16"),
        raw(manifest()).replace(b'"layers"', b'"layers": [], "layers"'),
        raw(manifest()).replace(b'"size": 5', b'"size": 5, "size": 6'),
        raw(manifest()).replace(b'"size": 5', b'"size": NaN'),
        raw(manifest(x="?")).replace(b"?", b"\\ud800"),
        raw(manifest(x="?")).replace(b"?", b"\xff"),
        b"[" * 200_000,
        raw(manifest(x=0)).replace(b": 0}", b": " + b"9" * 10_000 + b"}"),
    ],
    ids=range(12),
)
def test_what_is_not_one_clear_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(MalformedImage):
        m.parse_manifest(text, LIMITS)


@pytest.mark.parametrize(
    "document",
    [
        manifest(),
        index(layers=[]),
        index(config={}),
        index(Manifests=[]),
        index(manifests=7),
        index(entry("linux/amd64") | {"platform": 7}),
        index(entry("linux/amd64") | {"Digest": "x"}),
        index(entry("linux/amd64") | {"size": -1}),
        index(descriptor(platform={"os": "linux", "architecture": "amd64", "OS": "evil"})),
    ],
    ids=range(9),
)
def test_a_broken_index_is_refused(document: Document) -> None:
    with pytest.raises(MalformedImage):
        m.parse_index(raw(document), LIMITS)


@pytest.mark.parametrize(
    "document",
    [
        {},
        config(os=7),
        config(rootfs=None),
        config(rootfs={"diff_ids": ["sha256:1"]}),
        config(config=[]),
        config(Config={"Entrypoint": ["/evil"]}),
        config(ROOTFS={}),
        config(rootfs={"type": "layers", "diff_ids": [LAYER], "Diff_IDs": []}),
    ],
    ids=range(8),
)
def test_a_broken_config_is_refused(document: Document) -> None:
    with pytest.raises(MalformedImage):
        m.parse_config(raw(document), LIMITS)


def test_a_config_keeps_everything() -> None:
    document = config(variant="v8", config={"Labels": {"a": "1", "A": "2"}, "Env": ["X=\u00e9"]}, history=[{"x": None}])
    parsed = m.parse_config(raw(document), LIMITS)
    assert parsed.raw == document
    assert (str(parsed.platform), parsed.diff_ids) == ("linux/amd64/v8", (LAYER,))
    assert m.parse_config(raw(config(config=None)), LIMITS).raw["config"] is None


# limits


@pytest.mark.parametrize(
    ("row", "value", "parse", "text"),
    [
        ("manifest_bytes", len(raw(manifest())), m.parse_manifest, raw(manifest())),
        ("manifest_bytes", len(raw(index())), m.parse_index, raw(index())),
        ("manifest_bytes", 1000, m.parse_index, raw(index(entry("linux/amd64") | {"size": 1000}))),
        ("config_bytes", len(raw(config())), m.parse_config, raw(config())),
        ("config_bytes", 6, m.parse_manifest, raw(manifest())),
        ("index_entries", 3, m.parse_index, raw(index(*[entry("linux/amd64")] * 3))),
        ("layers", 2, m.parse_manifest, raw(manifest(layers=[descriptor()] * 2))),
        ("blob_bytes", 777, m.parse_manifest, raw(manifest(layers=[descriptor(size=777)]))),
        ("annotation_bytes", 5, m.parse_manifest, raw(manifest(annotations={"ab": "\u00e9c"}))),
        ("annotation_bytes", 5, m.parse_manifest, raw(manifest(layers=[descriptor(annotations={"ab": "cde"})]))),
        ("annotation_bytes", 5, m.parse_index, raw(index(annotations={"ab": "cde"}))),
        ("annotation_bytes", 5, m.parse_index, raw(index(entry("linux/amd64") | {"annotations": {"ab": "cde"}}))),
    ],
    ids=range(12),
)
def test_limits_hold_at_their_value_and_not_one_above(
    row: str, value: int, parse: Callable[[bytes, Limits], object], text: bytes
) -> None:
    parse(text, Limits(**{row: value}))  # type: ignore[arg-type]
    with pytest.raises(LimitExceeded, match=row) as caught:
        parse(text, Limits(**{row: value - 1}))  # type: ignore[arg-type]
    assert caught.value.reason == "limit"


# platforms and chains


@pytest.mark.parametrize(
    ("platform", "there", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64", "windows/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/amd64/v3"], "linux/amd64/v3"),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v3"], "linux/amd64/v3"),
        ("linux/arm64", ["linux/arm64/v9", "linux/arm64/v8"], "linux/arm64/v8"),
        ("linux/arm64/v8", ["linux/arm64"], "linux/arm64"),
        ("linux/arm/v7", ["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
    ],
)
def test_a_platform_is_chosen(platform: str, there: list[str], chosen: str) -> None:
    parsed = m.parse_index(raw(index(*(entry(one) for one in there))), LIMITS)
    assert m.choose_platform(parsed, platform).digest == Digest.of(chosen.encode())


def test_a_missing_platform_is_told_with_what_there_is() -> None:
    attestation = entry("unknown/unknown")
    foreign = entry("linux/amd64", "foreign", "application/vnd.example+json")
    parsed = m.parse_index(raw(index(entry("linux/arm64"), attestation, foreign, descriptor())), LIMITS)
    with pytest.raises(NotFound, match="linux/arm64"):
        m.choose_platform(parsed, "linux/amd64")
    with pytest.raises(NotFound):
        m.choose_platform(parsed, "linux/arm64/v7")
    for bad in ("", "linux", "linux/"):
        with pytest.raises(InvalidArgument):
            m.choose_platform(parsed, bad)


def test_chain_ids_are_those_of_the_specification() -> None:
    """image-spec config.md: ChainID(L₀|…|Lₙ) = Digest(ChainID(L₀|…|Lₙ₋₁) + " " + DiffID(Lₙ))."""
    one, two, three = (str(Digest.of(name)) for name in (b"1", b"2", b"3"))
    second = "sha256:" + hashlib.sha256(f"{one} {two}".encode()).hexdigest()
    third = "sha256:" + hashlib.sha256(f"{second} {three}".encode()).hexdigest()
    assert m.chain_ids([one, two, three]) == [one, second, third]
    assert m.chain_ids([]) == []


# a whole image


class Image:
    """A layout with a config, a manifest, and an index that names it, all of which a test may change."""

    def __init__(self, path: Path) -> None:
        self.layout = OciLayout(path, LIMITS)
        self.reference = Reference("", str(path), "1")
        self.config = config()
        self.config_size = 0
        self.entry_size = 0

    async def store(self) -> Digest:
        """Returns the manifest's digest."""
        text = raw(self.config)
        path = Path(self.reference.repository) / "blobs/sha256"
        await self.layout.put_manifest(self.reference, b"{}", "x")  # makes the directories
        (path / Digest.of(text).hex).write_bytes(text)
        described = descriptor(Digest.of(text), self.config_size or len(text), labels.MEDIA_OCI_CONFIG)
        document = raw(manifest(config=described))
        digest = await self.layout.put_manifest(
            Reference("", self.reference.repository, "m"), document, labels.MEDIA_OCI_MANIFEST
        )
        listed = entry("linux/amd64") | {"digest": digest, "size": self.entry_size or len(document)}
        await self.layout.put_manifest(self.reference, raw(index(entry("linux/arm64"), listed)), labels.MEDIA_OCI_INDEX)
        return digest


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path / "layout")


async def test_an_image_is_fetched_through_its_index(image: Image) -> None:
    digest = await image.store()
    resolved = await m.fetch_image(image.layout, image.reference, "linux/amd64", LIMITS)
    assert resolved.manifest_digest == digest
    assert resolved.config == image.config
    assert raw(resolved.config) == resolved.raw_config
    pinned = await m.fetch_image(image.layout, image.reference.pinned(digest), None, LIMITS)
    assert pinned == resolved
    assert await m.image_digests(image.layout, image.reference, LIMITS) == [Digest.of(b"linux/arm64"), digest]
    assert await m.image_digests(image.layout, image.reference.pinned(digest), LIMITS) == []


async def test_without_a_platform_an_index_is_refused(image: Image) -> None:
    await image.store()
    with pytest.raises(MalformedImage, match="index"):
        await m.fetch_image(image.layout, image.reference, None, LIMITS)


async def test_sizes_must_be_what_the_descriptors_say(image: Image) -> None:
    image.entry_size = 7
    await image.store()
    with pytest.raises(DigestMismatch, match="expected size 7"):
        await m.fetch_image(image.layout, image.reference, "linux/amd64", LIMITS)
    image.entry_size, image.config_size = 0, 7
    await image.store()
    with pytest.raises(DigestMismatch, match="expected size 7"):
        await m.fetch_image(image.layout, image.reference, "linux/amd64", LIMITS)


async def test_a_config_must_have_a_diff_id_for_each_layer(image: Image) -> None:
    image.config = config(rootfs={"type": "layers", "diff_ids": [LAYER, LAYER]})
    await image.store()
    with pytest.raises(MalformedImage, match="2 diff_ids"):
        await m.fetch_image(image.layout, image.reference, "linux/amd64", LIMITS)
