"""Stock tools accept the plain images that the writer writes, and refuse sealed ones instead of showing garbage."""

import stat
import subprocess
from pathlib import Path

import pytest

from snapshotter.formats.rafs6_write import Node
from tests import trees
from tests.trees import LZ4, NONE, ZSTD, Blob, directory, symlink


def check(nydus_image: str, work: Path, bootstrap: bytes, blobs: list[Blob]) -> subprocess.CompletedProcess[str]:
    directory = work / "blobs"
    directory.mkdir()
    for blob in blobs:
        table, stored = blob.finish()
        (directory / table.entry.blob_id).write_bytes(stored)
    (work / "boot").write_bytes(bootstrap)
    command = [nydus_image, "check", "-v", str(work / "boot"), "-D", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def tree(*blobs: Blob) -> Node:
    """Everything but access control lists, which nydus-image 2.2 does not read even in images of its own making."""
    twice = blobs[-1].file(b"t" * 200_000, mtime_ns=1_700_000_000_123_456_789)
    return directory(
        {
            b"empty": blobs[0].file(b""),
            b"large": blobs[0].file(b"".join(b"%08d" % number for number in range(40_000))),
            b"twice": twice,
            b"char": Node(stat.S_IFCHR | 0o666, rdev=0x103),
            b"fifo": Node(stat.S_IFIFO | 0o600),
            b"link": symlink(b"l" * 4095),
            b"sub": directory({b"again": twice, b"%s" % (b"n" * 255): blobs[0].file(b"long")}),
            b"many": directory({b"%060d" % number: blobs[0].file(b"%d" % number) for number in range(300)}),
            b"attributes": blobs[0].file(b"x", xattrs={b"user.a": b"1", b"trusted.b": b"", b"security.c": b"2"}),
        }
    )


@pytest.mark.parametrize("codec", [NONE, LZ4, ZSTD])
@pytest.mark.parametrize("chunk_size", [4096, 65536])
def test_a_plain_image_is_valid(nydus_image: str, tmp_path: Path, codec: int, chunk_size: int) -> None:
    blobs = [Blob(index, chunk_size, codec) for index in range(2)]
    root = tree(*blobs)
    assert root.children is not None
    prefetch = [root.children[b"large"], root.children[b"twice"]]
    done = check(nydus_image, tmp_path, trees.write(root, *blobs, prefetch=prefetch), blobs)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "RAFS filesystem metadata is valid" in done.stdout
    assert f'"/many/{299:060d}"' in done.stdout


@pytest.mark.parametrize("count", [0, 1, 30, 253])
def test_any_number_of_blobs_is_valid(nydus_image: str, tmp_path: Path, count: int) -> None:
    blobs = [Blob(index) for index in range(count)]
    root = directory({b"%d" % blob.index: blob.file(b"content %d" % blob.index) for blob in blobs})
    done = check(nydus_image, tmp_path, trees.write(root, *blobs), blobs)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_sealed_image_is_refused(nydus_image: str, tmp_path: Path) -> None:
    blob = Blob(chunk_size=65536, codec=ZSTD, sealed=True)
    done = check(nydus_image, tmp_path, trees.write(tree(blob), blob), [blob])
    assert done.returncode != 0
    command = [nydus_image, "inspect", "-R", "blobs", str(tmp_path / "boot")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "invalid RAFS flags" in done.stdout + done.stderr
