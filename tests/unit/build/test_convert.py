import asyncio
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard

from snapshotter import labels
from snapshotter.build.chunker import Codec
from snapshotter.build.options import Options, convergence_secret, load_recipient
from snapshotter.config import Limits
from snapshotter.crypto.secret import SecretBytes
from snapshotter.digest import Digest
from snapshotter.errors import BadLayer, DigestMismatch, InvalidArgument, LimitExceeded, SnapshotterError
from snapshotter.formats import rafs6_tree
from snapshotter.registry.layout import OciLayout
from snapshotter.registry.reference import LayoutLocation, Reference
from tests.harness.oci import Layer, Layout
from tests.unit.build import images
from tests.unit.build.images import KeyPair
from tests.unit.build.tars import END, header, member

ALPHA = b"".join(b"alpha %d\n" % n for n in range(1000))
ZETA = b"".join(b"zeta %d\n" % n for n in range(1300))
BASE = member(b"etc/a", ALPHA) + member(b"bin/z", ZETA) + member(b"bin/a", b"a" * 100) + END
UPPER = member(b"etc/.wh.a") + member(b"opt/new", b"new" * 100) + member(b"opt/same", ZETA) + END
ONLY_METADATA = header(b"etc", b"5", mode=0o700) + member(b"link-me") + END
CONFIG = {
    "User": "1000",
    "Env": ["A=b"],
    "Cmd": ["/bin/sh"],
    "ExposedPorts": {"80/tcp": {}},
    "Labels": {"secret": "yes"},
    "Volumes": {"/data": {}},
    "Healthcheck": {"Test": ["CMD", "x"]},
}


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return images.key_pair(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return images.layout(tmp_path / "source", [BASE, ONLY_METADATA, UPPER], CONFIG)


def manifest(path: Path, tag: str = "out") -> Mapping[str, Any]:
    made = Layout(path)
    name = "org.opencontainers.image.ref.name"
    entries = json.loads((path / "index.json").read_text())["manifests"]
    [digest] = [entry["digest"] for entry in entries if entry["annotations"][name] == tag]
    found: Mapping[str, Any] = json.loads(made.blob(digest))
    return found


def blob(path: Path, digest: str) -> bytes:
    return Layout(path).blob(digest)


async def file_contents(path: Path, keys: KeyPair | None, tag: str = "out") -> dict[bytes, bytes]:
    _, found = await images.opened(path, keys, tag)
    devices = [images.device_bytes(path, found, index) for index in range(len(found.devices))]
    contents = {}
    for entry in rafs6_tree.walk(found.bootstrap):
        if not entry.mode & 0o040000:
            data = b"".join(
                devices[b][(info := found.devices[b].chunks[c]).uncompressed_offset :][: info.uncompressed_size]
                for b, c in entry.chunks
            )
            contents[entry.path] = data
    return contents


EXPECTED = {
    b"/bin/a": b"a" * 100,
    b"/bin/z": ZETA,
    b"/link-me": b"",
    b"/opt/new": b"new" * 100,
    b"/opt/same": ZETA,
}


@pytest.mark.parametrize("codec", ["zstd:3", "lz4", "none"])
@pytest.mark.parametrize("sealed", [True, False])
async def test_files_come_back(tmp_path: Path, source: Path, keys: KeyPair, codec: str, sealed: bool) -> None:
    reader = keys if sealed else None
    await images.convert(source, tmp_path / "out", images.options(reader, codec=Codec.parse(codec)))
    assert await file_contents(tmp_path / "out", reader) == EXPECTED


async def test_each_layer_that_brings_chunks_has_a_blob_and_all_its_chunks_once(
    tmp_path: Path, source: Path, keys: KeyPair
) -> None:
    await images.convert(source, tmp_path / "out", images.options(keys))
    _, found = await images.opened(tmp_path / "out", keys)
    sizes = [[info.uncompressed_size for info in device.chunks] for device in found.devices]
    # In directory order: bin/a, bin/z, etc/a (hidden above, and still here); then opt/new, for opt/same is bin/z.
    assert sizes == [[100, 4096, 4096, len(ZETA) - 8192, 4096, 4096, len(ALPHA) - 8192], [300]]


async def test_base_layers_give_the_same_blob_in_every_image(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    images.layout(tmp_path / "other", [BASE, member(b"x", b"other") + END])
    await images.convert(source, tmp_path / "out", images.options(keys), "one")
    await images.convert(tmp_path / "other", tmp_path / "out", images.options(keys), "two")
    one, two = manifest(tmp_path / "out", "one"), manifest(tmp_path / "out", "two")
    assert one["layers"][0]["digest"] == two["layers"][0]["digest"]


async def test_conversion_is_deterministic_but_for_the_layer_key(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    seen = []
    for tag in ("one", "two"):
        await images.convert(source, tmp_path / tag, images.options(keys))
        _, found = await images.opened(tmp_path / tag, keys)
        seen.append((manifest(tmp_path / tag)["layers"][:-1], dict(found.files)))
        seen[-1][0][0].pop("annotations")
        seen[-1][0][1].pop("annotations")
    assert seen[0] == seen[1]
    plain = [(await images.convert(source, tmp_path / "out", images.options(None), tag)).manifest for tag in ("a", "b")]
    assert plain[0] == plain[1]


async def test_other_secrets_give_other_bytes(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    for tag, secret in (("one", bytes(32)), ("two", bytes(31) + b"1")):
        await images.convert(source, tmp_path / "out", images.options(keys, secret=SecretBytes(secret)), tag)
    layers = [{layer["digest"] for layer in manifest(tmp_path / "out", tag)["layers"]} for tag in ("one", "two")]
    assert not layers[0] & layers[1]


async def test_nothing_readable_is_left_outside(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    await images.convert(source, tmp_path / "out", images.options(keys))
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            for text in (b"alpha", b"zeta", b"opt/new", b"secret", b"link-me", b"80/tcp", b"tests"):
                assert text not in path.read_bytes(), f"{text!r} in {path.name}"


async def test_the_public_config_keeps_what_a_runtime_needs(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    await images.convert(source, tmp_path / "out", images.options(keys))
    found = manifest(tmp_path / "out")
    config = json.loads(blob(tmp_path / "out", found["config"]["digest"]))
    kept = {name: CONFIG[name] for name in ("User", "Env", "Cmd", "Volumes")}
    diff_ids = [layer["digest"] for layer in found["layers"]]
    rootfs = {"type": "layers", "diff_ids": diff_ids}
    assert config == {"architecture": "amd64", "os": "linux", "config": kept, "rootfs": rootfs}
    await images.convert(source, tmp_path / "out", images.options(keys, hide_config="all"), "hidden")
    hidden = manifest(tmp_path / "out", "hidden")
    config = json.loads(blob(tmp_path / "out", hidden["config"]["digest"]))
    assert set(config) == {"architecture", "os", "rootfs"}
    _, opened = await images.opened(tmp_path / "out", keys, "hidden")
    assert json.loads(opened.files["image/config.json"])["config"] == CONFIG


async def test_layers_say_what_a_client_without_labels_needs(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    chosen = images.options(keys, repository="example.org/team/app")
    await images.convert(source, tmp_path / "out", chosen)
    layers = manifest(tmp_path / "out")["layers"]
    for layer in layers:
        assert layer["annotations"][labels.HINT_REPOSITORY] == "example.org/team/app"
        assert layer["annotations"][labels.HINT_LAYER_DIGEST] == layer["digest"]
        assert layer["annotations"][labels.HINT_BOOTSTRAP_DIGEST] == layers[-1]["digest"]
    assert [layer["mediaType"] for layer in layers] == [labels.MEDIA_NYDUS_BLOB] * 2 + [
        labels.MEDIA_LAYER_GZIP_ENCRYPTED
    ]
    _, opened = await images.opened(tmp_path / "out", keys)
    assert json.loads(opened.files["image/identity.json"])["repository"] == "example.org/team/app"


async def test_identity_names_the_image(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    await images.convert(source, tmp_path / "out", images.options(keys, domain="tenant"))
    _, opened = await images.opened(tmp_path / "out", keys)
    identity = json.loads(opened.files["image/identity.json"])
    layers = manifest(tmp_path / "out")["layers"]
    assert identity["blobs"] == [{"digest": layer["digest"], "size": layer["size"]} for layer in layers[:-1]]
    assert identity["source"] == json.loads((source / "index.json").read_text())["manifests"][0]["digest"]
    assert (identity["domain"], identity["created"]) == ("tenant", "2023-11-14T22:13:20Z")


async def test_a_trace_puts_its_chunks_in_front(tmp_path: Path, keys: KeyPair) -> None:
    layer = BASE[:-1024] + header(b"run", b"2", target=b"/bin/z") + END
    images.layout(tmp_path / "source", [layer])
    trace = (b"/run", b"etc/a", b"/missing", b"/" + b"x" * 300, b"/bin/z", b"/etc")
    await images.convert(tmp_path / "source", tmp_path / "out", images.options(keys, trace=trace))
    _, found = await images.opened(tmp_path / "out", keys)
    sizes = [[info.uncompressed_size for info in device.chunks] for device in found.devices]
    assert sizes == [[4096, 4096, len(ZETA) - 8192, 4096, 4096, len(ALPHA) - 8192], [100]]
    nids = {entry.path: entry.nid for entry in rafs6_tree.walk(found.bootstrap)}
    assert list(found.bootstrap.prefetch) == [nids[b"/bin/z"], nids[b"/etc/a"]]
    contents = await file_contents(tmp_path / "out", keys)
    assert contents[b"/bin/z"] == ZETA


async def test_an_image_without_any_content(tmp_path: Path, keys: KeyPair) -> None:
    images.layout(tmp_path / "source", [header(b"dir", b"5") + END])
    await images.convert(tmp_path / "source", tmp_path / "out", images.options(keys))
    assert len(manifest(tmp_path / "out")["layers"]) == 1
    _, found = await images.opened(tmp_path / "out", keys)
    assert [entry.path for entry in rafs6_tree.walk(found.bootstrap)] == [b"/", b"/dir"]


@pytest.mark.parametrize("compress", [lambda data: data, zstandard.compress], ids=["tar", "zstd"])
async def test_other_compressions(tmp_path: Path, keys: KeyPair, compress: Any) -> None:
    made = Layout(tmp_path / "source")
    descriptor = made.add_blob(compress(BASE), labels.MEDIA_LAYER_ZSTD)
    made.add_image("src", [Layer(descriptor, "sha256:" + hashlib.sha256(BASE).hexdigest())], {})
    await images.convert(tmp_path / "source", tmp_path / "out", images.options(keys))
    assert (await file_contents(tmp_path / "out", keys))[b"/bin/a"] == b"a" * 100


async def test_what_is_there_is_not_uploaded_again(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    first = await images.convert(source, tmp_path / "out", images.options(keys))
    again = await images.convert(source, tmp_path / "out", images.options(keys))
    assert (first.uploaded, first.present) == (4, 0)
    assert (again.uploaded, again.present) == (2, 2)  # the encrypted layer, and the config that names it


# refusals


def spoiled(path: Path, layer: bytes, diff_id: bytes | None = None) -> Path:
    made = Layout(path)
    descriptor = made.add_blob(gzip.compress(layer), labels.MEDIA_LAYER_GZIP)
    made.add_image("src", [Layer(descriptor, "sha256:" + hashlib.sha256(diff_id or layer).hexdigest())], {})
    return path


@pytest.mark.parametrize(
    ("layer", "diff_id", "error"),
    [
        (member(b"f", b"x" * 600)[:700], None, BadLayer),
        (BASE, b"something else", DigestMismatch),
        (header(b"link", b"1", target=b"nowhere") + END, None, BadLayer),
    ],
    ids=["truncated", "diff-id", "dangling-link"],
)
async def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path,
    keys: KeyPair,
    layer: bytes,
    diff_id: bytes | None,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "spool").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "spool"))
    source = spoiled(tmp_path / "source", layer, diff_id)
    with pytest.raises(error):
        await images.convert(source, tmp_path / "out", images.options(keys))
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "spool").iterdir()) == []


async def test_a_damaged_layer_is_refused(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    layer = Layout(source).layers("src")[0]
    path = source / "blobs/sha256" / layer.digest.removeprefix("sha256:")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotterError):
        await images.convert(source, tmp_path / "out", images.options(keys))
    assert not (tmp_path / "out").exists()


async def test_converted_images_are_not_converted_again(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    for tag, reader in (("sealed", keys), ("plain", None)):
        await images.convert(source, tmp_path / "out", images.options(reader), tag)
        with pytest.raises(InvalidArgument, match="already"):
            await images.convert(tmp_path / "out", tmp_path / "again", images.options(keys), name=tag)


async def test_a_digest_cannot_be_a_target(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    limits = Limits()
    target = Reference("", str(tmp_path / "out"), None, Digest("sha256:" + "0" * 64))
    from snapshotter.build.convert import Converter

    reading, writing = OciLayout(source, limits), OciLayout(tmp_path / "out", limits)
    at = LayoutLocation(source, "src").reference
    with pytest.raises(InvalidArgument, match="tag"):
        await Converter(reading, at, writing, target, images.options(keys), limits, images.Quiet()).run()


async def test_limits_hold(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    for limits in (Limits(layers=2), Limits(chunks=3), Limits(inodes=2), Limits(bootstrap_bytes=100)):
        with pytest.raises(LimitExceeded):
            await images.convert(source, tmp_path / "out", images.options(keys), limits=limits)


async def test_cancellation_ends_promptly(tmp_path: Path, source: Path, keys: KeyPair) -> None:
    from snapshotter.build.convert import Converter

    class Stalling(OciLayout):
        def blob_stream(self, reference: Reference, digest: Digest, size: int) -> Any:
            async def stall() -> AsyncIterator[bytes]:
                started.set()
                await asyncio.sleep(3600)
                yield b""

            return stall()

    started, limits = asyncio.Event(), Limits()
    at, to = LayoutLocation(source, "src").reference, LayoutLocation(tmp_path / "out", "out").reference
    reading, writing = Stalling(source, limits), OciLayout(tmp_path / "out", limits)
    task = asyncio.create_task(Converter(reading, at, writing, to, images.options(keys), limits, images.Quiet()).run())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "out").exists()


# options


@pytest.mark.parametrize(
    "changes",
    [
        {"plain": False, "recipients": ()},
        {"plain": True, "recipients": (b"pem",)},
        {"chunk_size": 5000},
        {"created": -1},
    ],
)
def test_contradicting_options_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        images.options(None, **changes)


def test_options_do_not_show_the_secret() -> None:
    shown = repr(images.options(None))
    assert isinstance(shown, str)
    assert repr(images.SECRET) not in shown
    assert "secret" not in shown


def test_convergence_secrets(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    for content in (images.SECRET, images.SECRET.hex().encode(), images.SECRET.hex().upper().encode() + b"\n"):
        path.write_bytes(content)
        assert convergence_secret("tenant", path, b"").expose() == images.SECRET
    for content in (b"", b"x" * 31, b"zz" * 32, images.SECRET.hex().encode() + b"\n\n"):
        path.write_bytes(content)
        with pytest.raises(InvalidArgument, match="32 raw bytes"):
            convergence_secret("tenant", path, b"")
    assert convergence_secret("image", None, b"r" * 32).expose() == b"r" * 32
    assert convergence_secret("public", None, b"r" * 32).expose() == hashlib.sha256(b"sealed-rafs/1 public").digest()
    for domain, file in (("tenant", None), ("image", path), ("public", path)):
        with pytest.raises(InvalidArgument, match="belong together"):
            convergence_secret(domain, file, b"r" * 32)


def test_recipients(tmp_path: Path, keys: KeyPair) -> None:
    (tmp_path / "pub").write_bytes(keys.public)
    assert load_recipient(f"jwe:{tmp_path / 'pub'}") == keys.public
    for text in (str(tmp_path / "pub"), "jwe:", "pgp:me", f"jwe:{tmp_path / 'none'}", f"jwe:{keys.private}"):
        with pytest.raises(InvalidArgument, match="recipient"):
            load_recipient(text)


async def test_the_bootstrap_archive_depends_on_its_content_only(tmp_path: Path, source: Path) -> None:
    await images.convert(source, tmp_path / "out", images.options(None))
    layer = blob(tmp_path / "out", manifest(tmp_path / "out")["layers"][-1]["digest"])
    assert layer[:10] == b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        members = archive.getmembers()
    assert [item.name for item in members][:2] == ["image", "image/image.boot"]
    assert {(item.mtime, item.uid, item.gid, item.uname) for item in members} == {(0, 0, 0, "")}


def test_options_default_to_the_constants() -> None:
    chosen = Options(plain=True, secret=SecretBytes(b"x"), platform="linux/amd64", created=0)
    assert (chosen.chunk_size, chosen.codec) == (256 << 10, Codec(3, 3))
