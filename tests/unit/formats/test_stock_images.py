"""Images made by stock tools: every plain one is read exactly, every other one is refused by name."""

import json
import lzma
import stat
from pathlib import Path
from typing import Any

import pytest

from snapshotter.errors import MalformedImage
from snapshotter.formats import blobmeta, toc
from snapshotter.formats.blobmeta import ChunkTable, CiHeader
from snapshotter.formats.rafs6 import Bootstrap
from snapshotter.formats.rafs6_tree import dirents
from tests import trees
from tests.harness import oci
from tests.trees import LIMITS

pytestmark = pytest.mark.peer

PLAIN = {
    "v6-zstd": "A-full",
    "v6-lz4-sha256-64k": "A-full",
    "v6-none-4k": "A-full",
    "v6-toc": "A-full",
    "v6-inline": "A-tsmall",
    "v6-snapshotter": "A-tfull",
    "v6-prefetch": "A-small",
    "v6-chunkdict": "A-mod",
    "v6-estargz-rafs": "A-tsmall",
    "v6-export-block": "A-small",
    "merge-oci": "A-merged",
    "merge-40-layers": "A-many",
    "whiteout-none": "A-l2",
    "whiteout-oci": "A-l2",
    "whiteout-overlayfs": "A-l2-ovl",
    "layered-parent": "A-merged",
}
REFUSED = {
    "v5-lz4": "RAFS v5",
    "v5-zstd-sha256": "RAFS v5",
    "v6-batch": "batched chunks",
    "v6-zran": "zran",
    "v6-estargz-ref": "zran",
    "v6-tarfs": "block size 2^9",
    "v6-encrypt-zstd": "AES-128-XTS",
    "v6-encrypt-none-small": "AES-128-XTS",
    "v6-snapshotter-encrypt": "AES-128-XTS",
}
TYPES = {
    "reg": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "lnk": stat.S_IFLNK,
    "chr": stat.S_IFCHR,
    "blk": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
    "sock": stat.S_IFSOCK,
}


@pytest.fixture(scope="module")
def unpacked(fixtures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name → directory of one fixture, unpacked when first asked for."""
    base = tmp_path_factory.mktemp("stock")

    def get(name: str) -> Path:
        if not (base / name).exists():
            oci.unpack(fixtures_dir / "nydus-made" / f"{name}.tar.xz", base)
        return base / name

    return get


class Image:
    """A stock image with its blobs, chunk information read from their tails as a node does."""

    def __init__(self, path: Path) -> None:
        self.bootstrap = Bootstrap.parse((path / "boot").read_bytes(), LIMITS)
        self.blobs = [(path / "blobs" / entry.blob_id).read_bytes() for entry in self.bootstrap.blobs]
        self.tables = []
        for entry, blob in zip(self.bootstrap.blobs, self.blobs, strict=True):
            blobmeta.check_location(entry, len(blob), LIMITS)
            raw = blob[entry.ci_offset : entry.ci_offset + entry.ci_compressed_size + blobmeta.HEADER_SIZE]
            header = raw[-blobmeta.HEADER_SIZE :]
            self.tables.append(blobmeta.decode_ci(raw[: -blobmeta.HEADER_SIZE], header, entry, LIMITS))

    def chunk(self, blob: int, index: int) -> bytes:
        info, entry = self.tables[blob][index], self.bootstrap.blobs[blob]
        stored = self.blobs[blob][info.compressed_offset : info.compressed_offset + info.compressed_size]
        codec = entry.compression_algo if info.flags & blobmeta.FLAG_COMPRESSED else 0
        data = trees.decompress(stored, codec, info.uncompressed_size)
        digest = self.bootstrap.digests(blob, entry.chunk_count)[32 * index : 32 * index + 32]
        assert trees.digest(data, entry.digest_algo) == digest
        return data


def truth(fixtures_dir: Path, name: str) -> dict[bytes, dict[str, Any]]:
    """The independent listing of a source tree, in the form of `trees.listing`."""
    found: dict[bytes, dict[str, Any]] = {}
    raw = (fixtures_dir / "nydus-made" / "truth" / f"{name}.json.xz").read_bytes()
    for item in json.loads(lzma.decompress(raw)):
        path = item["path"].encode("utf-8", "surrogateescape")
        one = {
            "mode": TYPES[item["type"]] | item["mode"],
            "uid": item["uid"],
            "gid": item["gid"],
            "mtime_ns": item["mtime_ns"],
            "xattrs": {name.encode(): bytes.fromhex(value) for name, value in item.get("xattrs", {}).items()},
        }
        if item["type"] == "reg":
            one["sha256"] = item["sha256"]
        if item["type"] == "lnk":
            one["target"] = item["target"].encode("utf-8", "surrogateescape")
        if item["type"] in ("chr", "blk"):
            one["rdev"] = tuple(item["rdev"])
        if item["type"] != "dir":
            one["nlink"] = item["nlink"]
        found[path] = one
    return found


def simplified(listing: dict[bytes, dict[str, Any]]) -> dict[bytes, dict[str, Any]]:
    """What both the truth and the tools can say."""
    for path, one in listing.items():
        one.pop("group", None)
        if stat.S_ISDIR(one["mode"]):
            one.pop("nlink", None)
        if "rdev" in one and isinstance(one["rdev"], int):
            one["rdev"] = ((one["rdev"] >> 8) & 0xFFF, one["rdev"] & 0xFF | one["rdev"] >> 12 & 0xFFF00)
        if path == b"/":
            one["mtime_ns"] = 0  # which is what the tool writes
    return listing


def as_the_tool_has_it(name: str, expected: dict[bytes, dict[str, Any]]) -> dict[bytes, dict[str, Any]]:
    """Without what the tool leaves out on purpose or by mistake, which the fixtures' README lists."""
    tar = name in ("v6-inline", "v6-snapshotter", "v6-estargz-rafs", "merge-oci")
    for path, one in list(expected.items()):
        whiteout = stat.S_ISCHR(one["mode"]) and one["rdev"] == (0, 0)
        if (
            (tar and stat.S_ISSOCK(one["mode"]))
            or (name == "whiteout-oci" and path.rpartition(b"/")[2].startswith(b".wh."))
            or (name == "whiteout-overlayfs" and whiteout)
        ):
            del expected[path]
        if tar:
            one["mtime_ns"] = max(0, one["mtime_ns"] - one["mtime_ns"] % 1_000_000_000)
    return expected


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_image_is_read_exactly(name: str, unpacked: Any, fixtures_dir: Path) -> None:
    image = Image(unpacked(name))
    image.bootstrap.validate(image.tables)
    found = simplified(trees.listing(image.bootstrap.walk(), image.chunk))
    expected = as_the_tool_has_it(name, simplified(truth(fixtures_dir, PLAIN[name])))
    assert found.keys() == expected.keys()
    assert {path: (one, expected[path]) for path, one in found.items() if one != expected[path]} == {}


@pytest.mark.parametrize("name", REFUSED)
def test_every_other_image_is_refused_by_name(name: str, unpacked: Any) -> None:
    with pytest.raises(MalformedImage, match=f"unsupported: .*{REFUSED[name].replace('^', '.')}") as caught:
        Image(unpacked(name))
    assert caught.value.reason == "bad-bootstrap"


def test_an_early_v5_layout_with_the_same_magic_is_refused(fixtures_dir: Path) -> None:
    raw = (fixtures_dir / "nydus" / "nydusd_daemon_test_bootstrap").read_bytes()
    with pytest.raises(MalformedImage, match="RAFS v5"):
        Bootstrap.parse(raw, LIMITS)


def test_bytes_of_a_real_bootstrap(fixtures_dir: Path) -> None:
    """rafs-v6-2.2.boot, byte for byte as annotated in the format's reference."""
    raw = (fixtures_dir / "nydus" / "rafs-v6-2.2.boot").read_bytes()
    found = Bootstrap.parse(raw, LIMITS)
    assert (found.root_nid, found.inodes, found.meta_blkaddr, found.flags) == (128, 3, 2, 0x194)
    assert (found.chunk_size, found.record_count, found.prefetch, found.sealed) == (1 << 20, 2, (), False)
    (entry,) = found.blobs
    assert entry.blob_id == "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
    assert (entry.chunk_count, entry.compression_algo, entry.digest_algo, entry.features) == (2, 3, 0, 0x70000021)
    assert (entry.compressed_size, entry.uncompressed_size, entry.toc_size) == (14554, 36864, 1024)
    assert (entry.ci_compressor, entry.ci_offset, entry.ci_compressed_size) == (0, 8314, 32)
    assert entry.data_size == 7802
    assert entry.pack() == raw[4096:4352]
    assert entry.toc_digest.hex() == "cfc89ed0739aef4eb1bf0904f0dfdb1c857134eca7319465baae95a99b84acde"
    assert list(dirents(raw[12352:12419], 128)) == [
        (b".", 128, 2), (b"..", 128, 2), (b"lib.rs", 133, 1), (b"sync_io.rs", 136, 1),
    ]  # fmt: skip
    first, second = found.chunk_records()
    assert first.digest.hex() == "812465bcc9e88393598311dc5fc93abaeccef0185bcd99f9701d17ebdf9adc3f"
    assert first[1:] == (0, 1, 2974, 13400, 4828, 20480, 0, 1, 0)
    assert found.digests(0, 2) == second.digest + first.digest
    entries = {entry.path: entry for entry in found.walk()}
    lib = entries[b"/lib.rs"]
    assert (lib.nid, lib.size, lib.mtime_ns, list(lib.chunks)) == (133, 16931, 1_676_819_553_628_661_334, [(0, 0)])
    assert list(entries[b"/sync_io.rs"].chunks) == [(0, 1)]


def test_bytes_of_a_real_blob(fixtures_dir: Path) -> None:
    boot = Bootstrap.parse((fixtures_dir / "nydus" / "rafs-v6-2.2.boot").read_bytes(), LIMITS)
    blob = (fixtures_dir / "nydus" / "blobs" / boot.blobs[0].blob_id).read_bytes()
    table = blobmeta.decode_ci(blob[8314:8346], blob[8346:12442], boot.blobs[0], LIMITS)
    boot.validate([table])
    assert list(table) == [(0, 16931, 0, 4828, 1, 0), (20480, 13400, 4828, 2974, 1, 0)]
    assert table.encode_v1() == blob[8314:8346]
    assert CiHeader.parse(blob[8346:12442]).pack() == blob[8346:12442]
    assert toc.toc_digest(blob[-4096:]) == boot.blobs[0].toc_digest
    listed = toc.sections(blob[-toc.TAIL_SIZE :], len(blob))
    digests = toc.find(listed, toc.DIGESTS)
    assert digests is not None
    assert digests.content(blob[digests.offset : digests.offset + digests.size], LIMITS) == boot.digests(0, 2)


def test_bytes_of_v2_records(fixtures_dir: Path) -> None:
    """Chunk information of a zran blob: its chunks cannot be read, its records can."""
    (path,) = (fixtures_dir / "nydus" / "zran").glob("*.blob.meta")
    raw = path.read_bytes()
    header = CiHeader.parse(raw[-4096:])
    assert (header.entries, header.zran_offset, header.zran_size, header.zran_count) == (163, 3912, 656200, 21)
    table = ChunkTable.decode_v2(raw[: 163 * 24], 163, LIMITS)
    assert table[0] == (0, 1404, 184, 649, 3, 1024)
    assert table[2] == (8192, 36575, 1125, 9093, 3, 5632)
    assert table.encode_v2() == raw[: 163 * 24]


def test_a_bootstrap_inside_of_a_blob_is_found(fixtures_dir: Path, unpacked: Any) -> None:
    (old,) = (fixtures_dir / "nydus" / "toc").iterdir()
    blobs = [old, *(unpacked("v6-snapshotter") / "blobs").iterdir(), *(unpacked("v6-inline") / "blobs").iterdir()]
    found = []
    for path in blobs:
        blob = path.read_bytes()
        section = toc.find(toc.sections(blob[-toc.TAIL_SIZE :], len(blob)), toc.BOOTSTRAP)
        assert section is not None
        content = section.content(blob[section.offset : section.offset + section.size], LIMITS)
        found.append(Bootstrap.parse(content, LIMITS).inodes)
    assert found == [4, 4428, 158]


def test_a_plain_blob_has_no_framing(unpacked: Any) -> None:
    (path,) = (unpacked("v6-zstd") / "blobs").iterdir()
    blob = path.read_bytes()
    assert toc.sections(blob[-toc.TAIL_SIZE :], len(blob)) == []


def test_a_prefetch_table_names_files(unpacked: Any) -> None:
    image = Image(unpacked("v6-prefetch"))
    assert len(image.bootstrap.prefetch) == 3
    assert set(image.bootstrap.prefetch) <= {entry.nid for entry in image.bootstrap.walk()}
