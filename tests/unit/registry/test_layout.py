"""Layout directories, our own and those of somebody who wants us to read elsewhere."""

import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from snapshotter import labels
from snapshotter.config import Config, Limits
from snapshotter.digest import Digest
from snapshotter.errors import (
    BadReference,
    DigestMismatch,
    InvalidArgument,
    LimitExceeded,
    MalformedImage,
    NotFound,
    SnapshotterError,
)
from snapshotter.registry.layout import OciLayout
from snapshotter.registry.reference import Reference, parse_location
from snapshotter.registry.transport import open_location

CONTENT = os.urandom(3 << 20)
SIZE = len(CONTENT)
DIGEST = Digest.of(CONTENT)
RAW = b'{"schemaVersion":2}'


def named(path: Path, tag: str | None = None, digest: Digest | None = None) -> Reference:
    return Reference("", str(path), tag, digest)


async def pieces_of(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 1 << 20):
        yield content[start : start + (1 << 20)]


@pytest.fixture
async def layout(tmp_path: Path) -> OciLayout:
    """A layout with one blob and one image, tag `1`."""
    layout = OciLayout(tmp_path / "layout", Limits())
    await layout.upload_blob(named(tmp_path), DIGEST, SIZE, lambda: pieces_of(CONTENT))
    await layout.put_manifest(named(tmp_path, "1"), RAW, labels.MEDIA_OCI_MANIFEST)
    return layout


@pytest.fixture
def here(tmp_path: Path) -> Reference:
    return named(tmp_path / "layout", "1")


def blob_path(tmp_path: Path, digest: Digest = DIGEST) -> Path:
    return tmp_path / "layout/blobs/sha256" / digest.hex


async def test_what_was_written_is_read(layout: OciLayout, here: Reference) -> None:
    assert await layout.manifest(here) == (RAW, labels.MEDIA_OCI_MANIFEST, Digest.of(RAW))
    assert await layout.manifest(here.pinned(Digest.of(RAW))) == (RAW, labels.MEDIA_OCI_MANIFEST, Digest.of(RAW))
    assert await layout.blob(here, DIGEST, SIZE, SIZE) == CONTENT
    assert await layout.read_range(here, DIGEST, 1 << 20, 100, SIZE) == CONTENT[1 << 20 : (1 << 20) + 100]
    with pytest.raises(NotFound):
        await layout.blob(here, Digest.of(b"absent"), 6, 6)
    with pytest.raises(InvalidArgument):
        await layout.read_range(here, DIGEST, SIZE, 1, SIZE)


async def test_a_tag_names_the_image_put_last(layout: OciLayout, here: Reference, tmp_path: Path) -> None:
    second = await layout.put_manifest(here, RAW + b" ", labels.MEDIA_OCI_MANIFEST)
    await layout.put_manifest(named(tmp_path, "other"), RAW, labels.MEDIA_OCI_MANIFEST)
    assert (await layout.manifest(here))[2] == second
    assert (await layout.manifest(named(tmp_path, "other")))[0] == RAW
    with pytest.raises(NotFound):
        await layout.manifest(named(tmp_path, "absent"))
    with pytest.raises(BadReference, match="1, other"):
        await layout.manifest(named(tmp_path))
    listed = json.loads((tmp_path / "layout/index.json").read_bytes())["manifests"]
    assert len(listed) == 2


async def test_a_single_image_needs_no_tag(layout: OciLayout, tmp_path: Path) -> None:
    assert (await layout.manifest(named(tmp_path)))[0] == RAW
    await layout.put_manifest(named(tmp_path), RAW, labels.MEDIA_OCI_MANIFEST)
    assert (await layout.manifest(named(tmp_path)))[0] == RAW


async def test_nothing_but_the_blob_remains(layout: OciLayout, here: Reference, tmp_path: Path) -> None:
    before = sorted(path.name for path in (tmp_path / "layout").rglob("*"))
    with pytest.raises(DigestMismatch):
        await layout.upload_blob(here, Digest.of(b"other"), SIZE, lambda: pieces_of(CONTENT))
    with pytest.raises(SnapshotterError):
        await layout.upload_blob(here, Digest.of(b"other"), SIZE, tmp_path / "missing")
    assert sorted(path.name for path in (tmp_path / "layout").rglob("*")) == before
    assert blob_path(tmp_path).stat().st_mode & 0o777 == 0o644


async def test_a_stored_blob_of_the_wrong_size_is_written_again(
    layout: OciLayout, here: Reference, tmp_path: Path
) -> None:
    blob_path(tmp_path).write_bytes(b"cut")
    await layout.upload_blob(here, DIGEST, SIZE, lambda: pieces_of(CONTENT))
    assert await layout.blob(here, DIGEST, SIZE, SIZE) == CONTENT


async def test_changed_content_is_refused(layout: OciLayout, here: Reference, tmp_path: Path) -> None:
    blob_path(tmp_path).write_bytes(bytes(SIZE))
    with pytest.raises(DigestMismatch, match=DIGEST):
        await layout.blob(here, DIGEST, SIZE, SIZE)
    blob_path(tmp_path, Digest.of(RAW)).write_bytes(b'{"schemaVersion":3}')
    with pytest.raises(DigestMismatch):
        await layout.manifest(here)


async def test_a_lie_about_the_size_is_refused(layout: OciLayout, here: Reference) -> None:
    for size in (SIZE - 1, SIZE + 1):
        with pytest.raises(DigestMismatch, match="expected size"):
            await layout.blob(here, DIGEST, size, size)
        with pytest.raises(DigestMismatch, match="expected size"):
            await layout.read_range(here, DIGEST, 0, 1, size)


def _link_blob(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(CONTENT)
    blob_path(tmp_path).unlink()
    blob_path(tmp_path).symlink_to(tmp_path / "secret")


def _link_directory(tmp_path: Path) -> None:
    (tmp_path / "layout/blobs").rename(tmp_path / "elsewhere")
    (tmp_path / "layout/blobs").symlink_to(tmp_path / "elsewhere")


def _fifo(tmp_path: Path) -> None:
    blob_path(tmp_path).unlink()
    os.mkfifo(blob_path(tmp_path))


def _directory(tmp_path: Path) -> None:
    blob_path(tmp_path).unlink()
    blob_path(tmp_path).mkdir()


@pytest.mark.parametrize("damage", [_link_blob, _link_directory, _fifo, _directory], ids=lambda damage: damage.__name__)
async def test_only_plain_files_below_the_layout_are_read(
    layout: OciLayout, here: Reference, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(tmp_path)
    with pytest.raises(MalformedImage):
        await layout.blob(here, DIGEST, SIZE, SIZE)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b'{"manifests":7}',
        b'{"manifests":[{}]}',
        b'{"manifests":[{"digest":"sha256:../../../etc/passwd"}]}',
        b'{"manifests":[{"digest":"../x"}]}',
        b'{"manifests":[{"digest":"sha256:00","annotations":7}]}',
        b"\xff",
        b"[" * 100_000,
    ],
    ids=range(9),
)
async def test_a_broken_index_is_refused(layout: OciLayout, tmp_path: Path, index: bytes) -> None:
    (tmp_path / "layout/index.json").write_bytes(index)
    with pytest.raises(MalformedImage):
        await layout.manifest(named(tmp_path))


async def test_a_linked_or_missing_index_is_no_layout(layout: OciLayout, tmp_path: Path) -> None:
    index = tmp_path / "layout/index.json"
    os.rename(index, tmp_path / "index.json")
    with pytest.raises(NotFound, match="not an OCI layout"):
        await layout.manifest(named(tmp_path))
    index.symlink_to(tmp_path / "index.json")
    with pytest.raises(NotFound, match="not an OCI layout"):
        await layout.manifest(named(tmp_path))


async def test_limits_hold_at_their_value_and_not_one_above(layout: OciLayout, here: Reference, tmp_path: Path) -> None:
    index = tmp_path / "layout/index.json"
    size = index.stat().st_size
    read = OciLayout(tmp_path / "layout", Limits(manifest_bytes=size, index_entries=1))  # type: ignore[arg-type]
    assert (await read.manifest(here))[0] == RAW
    with pytest.raises(LimitExceeded, match="manifest_bytes"):
        await OciLayout(tmp_path / "layout", Limits(manifest_bytes=size - 1)).manifest(here)  # type: ignore[arg-type]
    large = b" " * 1000 + RAW
    await layout.put_manifest(here, large, labels.MEDIA_OCI_MANIFEST)
    at = OciLayout(tmp_path / "layout", Limits(manifest_bytes=len(large)))  # type: ignore[arg-type]
    assert (await at.manifest(here))[0] == large
    below = OciLayout(tmp_path / "layout", Limits(manifest_bytes=len(large) - 1))  # type: ignore[arg-type]
    with pytest.raises(LimitExceeded, match="manifest_bytes"):
        await below.manifest(here)
    await layout.put_manifest(named(tmp_path, "2"), RAW, labels.MEDIA_OCI_MANIFEST)
    with pytest.raises(LimitExceeded, match="index_entries"):
        await OciLayout(tmp_path / "layout", Limits(index_entries=1)).manifest(here)
    with pytest.raises(LimitExceeded):
        await layout.blob(here, DIGEST, SIZE, SIZE - 1)


async def test_a_location_opens_its_store(tmp_path: Path) -> None:
    location = parse_location(f"oci:{tmp_path}/new:v1")
    async with open_location(location, Config()) as store:
        digest = await store.put_manifest(location.reference, RAW, labels.MEDIA_OCI_MANIFEST)
        assert (await store.manifest(location.reference))[2] == digest
    async with open_location(parse_location("docker://127.0.0.1:1/a"), Config()) as store:
        assert not isinstance(store, OciLayout)


@pytest.mark.real
async def test_skopeo_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    layout = OciLayout(tmp_path / "ours", Limits())
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [DIGEST]}}
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": labels.MEDIA_OCI_MANIFEST,
        "config": {"mediaType": labels.MEDIA_OCI_CONFIG, "digest": Digest.of(config), "size": len(config)},
        "layers": [{"mediaType": labels.MEDIA_LAYER_TAR, "digest": DIGEST, "size": SIZE}],
    }
    raw = json.dumps(manifest).encode()
    reference = named(tmp_path, "v1")
    await layout.upload_blob(reference, DIGEST, SIZE, lambda: pieces_of(CONTENT))
    await layout.upload_blob(reference, Digest.of(config), len(config), lambda: pieces_of(config))
    await layout.put_manifest(reference, raw, labels.MEDIA_OCI_MANIFEST)
    subprocess.run(  # noqa: ASYNC221
        ["skopeo", "copy", "-q", "--preserve-digests", f"oci:{tmp_path}/ours:v1", f"oci:{tmp_path}/theirs:v2"],
        check=True,
    )
    theirs = OciLayout(tmp_path / "theirs", Limits())
    assert await theirs.manifest(named(tmp_path, "v2")) == (raw, labels.MEDIA_OCI_MANIFEST, Digest.of(raw))
    assert await theirs.blob(reference, DIGEST, SIZE, SIZE) == CONTENT
