"""The bootstrap layer's archive is hostile until proven otherwise, even when it is authentic."""

import gzip
import io
import tarfile

import pytest

from snapshotter.bootstrap import archive
from snapshotter.config import Limits, Size
from snapshotter.errors import LimitExceeded, MalformedImage, SnapshotterError

LIMITS = Limits()
BLOB = "ab" * 32


def tar(*entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as writer:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.type = kind
            writer.addfile(info, io.BytesIO(content))
    return out.getvalue()


GOOD = tar(("image/image.boot", b"boot"), (f"image/{BLOB}.blob.meta", b"meta"), (f"image/{BLOB}.keys", b"keys"))


def test_members_of_a_sealed_layer() -> None:
    found = archive.members(GOOD, LIMITS, sealed_names=True)
    assert found == {"image/image.boot": b"boot", f"image/{BLOB}.blob.meta": b"meta", f"image/{BLOB}.keys": b"keys"}


def test_a_directory_entry_for_image_may_precede() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as writer:
        directory = tarfile.TarInfo("image")
        directory.type = tarfile.DIRTYPE
        writer.addfile(directory)
        info = tarfile.TarInfo("image/image.boot")
        writer.addfile(info)
    assert archive.members(out.getvalue(), LIMITS, sealed_names=True) == {"image/image.boot": b""}


@pytest.mark.parametrize(
    "name",
    [
        "image/other",
        "image.boot",
        "../image/image.boot",
        "/image/image.boot",
        f"image/{BLOB.upper()}.keys",
        "image/a/b",
    ],
)
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(MalformedImage, match="unexpected member"):
        archive.members(tar(("image/image.boot", b""), (name, b"")), LIMITS, sealed_names=True)


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(MalformedImage, match="unexpected member"):
        archive.members(tar(("image/image.boot", b"a"), ("image/image.boot", b"b")), LIMITS, sealed_names=True)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_anything_but_a_plain_file_is_refused(kind: bytes) -> None:
    with pytest.raises(MalformedImage):
        archive.members(tar(("image/image.boot", b""), kind=kind), LIMITS, sealed_names=True)


def test_a_sparse_member_that_claims_terabytes_is_refused() -> None:
    info = tarfile.TarInfo("image/image.boot")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 42)}
    info.pax_headers["GNU.sparse.name"] = "image/image.boot"
    out = io.BytesIO()
    body = b"0\n".ljust(512, b"\0")
    info.size = len(body)
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as writer:
        writer.addfile(info, io.BytesIO(body))
    with pytest.raises(MalformedImage):
        archive.members(out.getvalue(), LIMITS, sealed_names=True)


def test_a_layer_without_bootstrap_is_refused() -> None:
    with pytest.raises(MalformedImage, match=r"image\.boot is missing"):
        archive.members(tar((f"image/{BLOB}.keys", b"")), LIMITS, sealed_names=True)


def test_member_count_at_the_limit_and_one_above() -> None:
    entries = [("image/image.boot", b""), *((f"image/{i:064x}.keys", b"") for i in range(4))]
    tight = Limits(bootstrap_files=4)
    assert len(archive.members(tar(*entries[:5]), tight, sealed_names=True)) == 5
    with pytest.raises(LimitExceeded):
        archive.members(tar(*entries, (f"image/{9:064x}.keys", b"")), tight, sealed_names=True)


@pytest.mark.parametrize("length", range(0, len(GOOD), 97))
def test_a_truncated_archive_never_escapes_as_another_error(length: int) -> None:
    try:
        found = archive.members(GOOD[:length], LIMITS, sealed_names=True)
    except SnapshotterError:
        return
    assert found["image/image.boot"] == b"boot"  # cut inside a later member's padding or the end marker


def test_gunzip_reads_all_members_of_the_stream() -> None:
    assert archive.gunzip(gzip.compress(b"one") + gzip.compress(b"two"), LIMITS) == b"onetwo"


def test_unpacked_bytes_at_the_limit_and_one_above() -> None:
    tight = Limits(bootstrap_unpacked_bytes=Size(5000))
    assert archive.gunzip(gzip.compress(bytes(5000)), tight) == bytes(5000)
    with pytest.raises(LimitExceeded):
        archive.gunzip(gzip.compress(bytes(5001)), tight)
    with pytest.raises(LimitExceeded):
        archive.gunzip(gzip.compress(bytes(4000)) + gzip.compress(bytes(1001)), tight)


@pytest.mark.parametrize("length", range(0, 40, 3))
def test_a_broken_gzip_stream_is_refused(length: int) -> None:
    whole = gzip.compress(b"some content that is long enough to be cut")
    if length == 0:
        assert archive.gunzip(b"", LIMITS) == b""
        return
    with pytest.raises(MalformedImage):
        archive.gunzip(whole[:length], LIMITS)


@pytest.mark.parametrize("position", range(10, 30))
def test_garbage_in_the_stream_is_refused(position: int) -> None:
    whole = bytearray(gzip.compress(bytes(range(256)) * 3))
    whole[position] ^= 0xFF
    with pytest.raises(SnapshotterError):
        archive.gunzip(bytes(whole), LIMITS)
