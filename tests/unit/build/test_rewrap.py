"""Other recipients for an image in a layout: what changes of the manifest, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshotter import labels
from snapshotter.build.rewrap import EncryptedManifest, check_target
from snapshotter.cli.main import main
from snapshotter.config import Limits
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, KeyDenied, LimitExceeded
from snapshotter.keys.packet import Kek
from snapshotter.keys.provider import FileKeys
from snapshotter.keys.resource import ResourceUri
from snapshotter.registry.layout import OciLayout
from snapshotter.registry.reference import LayoutLocation, Reference
from tests.unit.build import images, tars
from tests.unit.build.images import KeyPair

LIMITS = Limits()
URI = ResourceUri("default", "image-kek", "app")
KEK = Kek(URI, SecretBytes(bytes(range(32))))


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return images.key_pair(tmp_path)


@pytest.fixture
async def sealed(tmp_path: Path, keys: KeyPair) -> Path:
    source = images.layout(tmp_path / "source", [tars.member(b"a", b"a") + tars.END])
    await images.convert(source, tmp_path / "out", images.options(keys))
    return tmp_path / "out"


@pytest.fixture(scope="module")
def sealed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    directory = tmp_path_factory.mktemp("sealed")
    source = images.layout(directory / "source", [tars.member(b"a", b"a") + tars.END])
    images.run(images.convert(source, directory / "out", images.options(images.key_pair(directory))))
    return directory / "out"


async def fetch(path: Path, tag: str = "out") -> EncryptedManifest:
    return await EncryptedManifest.fetch(OciLayout(path, LIMITS), LayoutLocation(path, tag).reference, LIMITS)


async def changed(path: Path, tag: str, change: Callable[[dict[str, Any]], None]) -> EncryptedManifest:
    """The manifest of `path`, changed and stored under another tag."""
    found = await fetch(path)
    document = json.loads(found.raw)
    change(document)
    reference = LayoutLocation(path, tag).reference
    await OciLayout(path, LIMITS).put_manifest(reference, json.dumps(document).encode(), found.media_type)
    return await fetch(path, tag)


async def test_only_the_annotations_of_the_layer_change(sealed: Path, keys: KeyPair) -> None:
    found = await changed(sealed, "strange", lambda document: document.update(artifactType="x/y", more=[1]))
    before = {path: path.read_bytes() for path in (sealed / "blobs/sha256").iterdir()}
    content = await found.add(FileKeys([keys.private]), [KEK], LIMITS)
    digest = await found.publish(OciLayout(sealed, LIMITS), content)
    old, new = json.loads(found.raw), json.loads(content)
    name = labels.ENC_KEYS_PREFIX + "provider.attestation-agent"
    assert new["layers"][-1]["annotations"].pop(name)
    assert new == old
    after = {path: path.read_bytes() for path in (sealed / "blobs/sha256").iterdir()}
    assert {path.name for path in after.keys() - before.keys()} == {digest.hex}
    assert (await fetch(sealed, "strange")).digest == digest
    assert (await fetch(sealed)).digest != digest


async def test_a_kek_is_removed_by_its_name(sealed: Path, keys: KeyPair) -> None:
    found = await fetch(sealed)
    with pytest.raises(InvalidArgument, match=f"{URI} is no recipient"):
        found.remove([], [URI], LIMITS)
    await found.publish(OciLayout(sealed, LIMITS), await found.add(FileKeys([keys.private]), [KEK], LIMITS))
    more = await fetch(sealed)
    assert more.remove([], [URI], LIMITS) == more.remove([2], [], LIMITS) == found.raw
    with pytest.raises(InvalidArgument, match="last recipient"):
        more.remove([1], [URI], LIMITS)


async def test_without_a_key_that_opens_it_nobody_is_added(tmp_path: Path, sealed: Path) -> None:
    (tmp_path / "other").mkdir()
    other = images.key_pair(tmp_path / "other")
    with pytest.raises(KeyDenied):
        await (await fetch(sealed)).add(FileKeys([other.private]), [KEK], LIMITS)


async def test_layers_with_different_recipients(sealed: Path, keys: KeyPair) -> None:
    """Adding works for each; a number would mean another recipient in each, so removing does not."""

    def twice(document: dict[str, Any]) -> None:
        layer = document["layers"][-1]
        document["layers"].append(layer | {"annotations": dict(layer["annotations"])})

    found = await changed(sealed, "twice", twice)
    assert len(found.layers) == 2
    assert json.loads(found.raw) == json.loads(
        (await _published(sealed, found, await found.add(FileKeys([keys.private]), [KEK], LIMITS))).remove(
            [2], [], LIMITS
        )
    )

    def other(document: dict[str, Any]) -> None:
        twice(document)
        name = labels.ENC_KEYS_JWE
        text = document["layers"][-1]["annotations"][name]
        document["layers"][-1]["annotations"][name] = f"{text},{text}"

    different = await changed(sealed, "different", other)
    with pytest.raises(InvalidArgument, match="different recipients"):
        different.remove([1], [], LIMITS)


async def _published(path: Path, found: EncryptedManifest, content: bytes) -> EncryptedManifest:
    await found.publish(OciLayout(path, LIMITS), content)
    return await fetch(path, "twice")


async def test_images_that_have_no_recipients(tmp_path: Path, sealed: Path) -> None:
    source = images.layout(tmp_path / "plain", [tars.member(b"a", b"a") + tars.END])
    with pytest.raises(InvalidArgument, match="no layer is encrypted"):
        await fetch(source, "src")
    store, reference = OciLayout(sealed, LIMITS), LayoutLocation(sealed, "index").reference
    index = {"schemaVersion": 2, "mediaType": labels.MEDIA_OCI_INDEX, "manifests": []}
    await store.put_manifest(reference, json.dumps(index).encode(), labels.MEDIA_OCI_INDEX)
    with pytest.raises(InvalidArgument, match="index of several images"):
        await fetch(sealed, "index")


async def test_what_grew_too_large_is_not_written(sealed: Path, keys: KeyPair) -> None:
    found = await fetch(sealed)
    for limits in (Limits(recipients=1), Limits(annotation_bytes=Limits().annotation_bytes // 64)):
        with pytest.raises(LimitExceeded):
            await found.add(FileKeys([keys.private]), [keys.public, KEK], limits)


def test_a_changed_manifest_needs_a_tag() -> None:
    digest = "sha256:" + "0" * 64
    check_target(Reference.parse(f"h.io/a:t@{digest}"))
    check_target(Reference.parse("h.io/a"))
    with pytest.raises(InvalidArgument, match="name the tag"):
        check_target(Reference.parse(f"h.io/a@{digest}"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("list IMAGE --number 1", "--number does not go with it"),
        ("add IMAGE", "give --recipient"),
        ("add IMAGE --recipient x --number 1", "--number does not go with it"),
        ("add IMAGE --recipient x", "write jwe:PUBLIC.pem"),
        ("remove IMAGE", "give either"),
        ("remove IMAGE --recipient jwe:/x", "not kbs:///"),
        ("remove IMAGE --recipient kbs:///a/b/c", "kbs:///a/b/c is no recipient"),
        ("remove IMAGE --number 2", "recipient 2: there are 1"),
        ("remove IMAGE --number 1", "last recipient"),
        ("remove IMAGE@DIGEST --number 1", "name the tag"),
    ],
)
def test_what_the_command_refuses(sealed_once: Path, capsys: pytest.CaptureFixture[str], words: str, text: str) -> None:
    before = (sealed_once / "index.json").read_bytes()
    image = f"oci:{sealed_once}:out" if "@" not in words else f"oci:{sealed_once}"
    words = words.replace("IMAGE", image).replace("DIGEST", "sha256:" + "0" * 64)
    assert main(["recipients", *words.split()]) == 2
    assert text in capsys.readouterr().err
    assert (sealed_once / "index.json").read_bytes() == before
