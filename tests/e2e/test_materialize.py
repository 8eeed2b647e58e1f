"""A lazily pulled image is whole for containerd after `materialize`: exported and pushed byte for byte."""

import io
import json
import subprocess
import tarfile
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from snapshotter.cli.containerd import Containerd as Client
from snapshotter.digest import Digest
from tests.e2e.conftest import Image, Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.containerd import NAMESPACE, Containerd
from tests.harness.machine import until
from tests.harness.serve import program

pytestmark = [pytest.mark.root, pytest.mark.real]


def materialize(node: Node, reference: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    return program(
        node.work, "materialize", reference, "--config", node.daemon.config, "--containerd",
        node.containerd.layout.socket, "--namespace", NAMESPACE, "--json", *flags,
    )  # fmt: skip


def export(node: Node, reference: str) -> "subprocess.CompletedProcess[str]":
    return node.containerd.try_ctr("images", "export", str(node.work.path / "image.tar"), reference)


def blobs(archive: Path) -> dict[str, bytes]:
    """Content by digest of an OCI archive."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile() and member.name.startswith("blobs/sha256/")]
        return {f"sha256:{Path(m.name).name}": (tar.extractfile(m) or io.BytesIO()).read() for m in members}


def expected_blobs(image: Image) -> dict[str, bytes]:
    registry, repository = image.registry, image.repository
    found = {image.digest: registry.get_manifest(repository, image.digest)[0]}
    for digest in (image.manifest["config"]["digest"], *image.layers):
        found[digest] = registry.get_blob(repository, digest)
    return found


def labels(containerd: Containerd, digest: str) -> dict[str, str]:
    row = next(row for row in containerd.ctr("content", "ls").splitlines() if row.startswith(digest))
    pairs = [pair.partition("=") for pair in row.split()[-1].split(",") if "=" in pair]
    return {name: value for name, _, value in pairs}


def test_a_sealed_image_is_exported_and_pushed_byte_for_byte(node: NodeMaker, images: Images) -> None:
    guest, image = node(), images.sealed()
    reference = guest.pull(image)
    failed = export(guest, reference)
    assert failed.returncode != 0 or image.layers[-1] not in blobs(guest.work.path / "image.tar")
    result = materialize(guest, reference)
    assert result.returncode == 0, result.stderr
    sizes = [layer["size"] for layer in image.manifest["layers"]]
    assert json.loads(result.stdout) == {"fetched": len(sizes), "bytes": sum(sizes), "present": 1}

    assert export(guest, reference).returncode == 0
    wanted = expected_blobs(image)
    assert {digest: raw for digest, raw in blobs(guest.work.path / "image.tar").items() if digest in wanted} == wanted
    mark = image.registry.mark()
    copy = f"{image.registry.address}/t/copy:1"
    guest.containerd.ctr("images", "push", "--plain-http", copy, reference)
    assert image.registry.get_manifest("t/copy", "1")[0] == wanted[image.digest]
    pushed = [image.registry.get_blob("t/copy", digest) for digest in image.layers]
    assert pushed == [wanted[digest] for digest in image.layers]
    assert not image.registry.since(mark).by("coco-snapshotter").of(set(image.layers))
    assert guest.shell(reference, READ_ALL) == expected(), "containers still read it lazily"

    missing = materialize(guest, "registry.example/none:1")
    assert missing.returncode == 3
    assert "containerd has no image of this name" in missing.stderr
    guest.containerd.collect_garbage()
    again = materialize(guest, reference)
    assert json.loads(again.stdout) == {"fetched": 0, "bytes": 0, "present": len(sizes) + 1}, "kept from collection"
    guest.containerd.remove_image(reference)
    until(lambda: not guest.containerd.content(), "the blobs go with their image")


def test_labels_are_those_of_an_ordinary_pull(node: NodeMaker, images: Images) -> None:
    """Compared with what containerd itself writes when it fetches the same image, in a namespace of its own."""
    guest, image = node(), images.plain()
    assert materialize(guest, guest.pull(image)).returncode == 0
    eager = guest.containerd.within("eager", "coco")
    eager.ctr("content", "fetch", "--plain-http", image.by_digest)
    for digest in (image.digest, image.manifest["config"]["digest"], *image.layers):
        ours, theirs = labels(guest.containerd, digest), labels(eager, digest)
        assert theirs.items() <= ours.items(), digest
        added = {name for name in ours.keys() - theirs.keys() if not name.startswith("containerd.io/gc.ref.snapshot.")}
        assert not added, digest


async def interrupted(node: Node, image: Image, digest: str, content: bytes, part: bytes) -> None:
    """Write the beginning of a blob and vanish."""

    async def rest(_: int) -> AsyncGenerator[bytes, None]:
        yield part
        raise ConnectionAbortedError

    async with Client(node.containerd.layout.socket, NAMESPACE) as client:
        with pytest.raises(ConnectionAbortedError):
            await client.write(Digest.parse(digest), len(content), {}, rest, lambda _: None)


async def test_it_goes_on_where_it_was_interrupted_and_keeps_no_bad_bytes(node: NodeMaker, images: Images) -> None:
    guest, image = node(), images.sealed()
    reference = guest.pull(image)
    digest = max(image.manifest["layers"], key=lambda layer: layer["size"])["digest"]
    content = image.registry.get_blob(image.repository, digest)
    half = len(content) // 2
    await interrupted(guest, image, digest, content, bytes(half))
    refused = materialize(guest, reference)
    assert refused.returncode == 20, refused.stderr
    assert "reason=digest-mismatch" in refused.stderr
    assert digest not in guest.containerd.ctr("content", "active")
    assert digest not in guest.containerd.content()

    await interrupted(guest, image, digest, content, content[:half])
    mark = image.registry.mark()
    result = materialize(guest, reference)
    assert result.returncode == 0, result.stderr
    assert image.registry.since(mark).by("coco-snapshotter").of({digest}).size == len(content) - half
    assert export(guest, reference).returncode == 0
    assert blobs(guest.work.path / "image.tar")[digest] == content
