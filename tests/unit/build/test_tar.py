import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from snapshotter.build.stream import ByteStream
from snapshotter.build.tar import Entry, Kind, TarReader
from snapshotter.config import Limits
from snapshotter.errors import BadLayer, LimitExceeded
from tests.unit.build import tars
from tests.unit.build.tars import END, header, member, pad, pax, pieces

LIMITS = Limits()


def read(data: bytes, limits: Limits = LIMITS) -> list[tuple[Entry, bytes]]:
    """All entries with their expanded content."""
    found = []
    for entry in TarReader(ByteStream(pieces(data)), limits):
        content = b"".join(bytes(piece) for piece in entry.pieces(700))  # bytes(5) is five zeros
        found.append((entry, content))
    return found


def only(data: bytes) -> tuple[Entry, bytes]:
    [(entry, content)] = read(data)
    return entry, content


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_what_the_standard_library_writes(format_: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        for name, kind, extra in [
            ("dir", tarfile.DIRTYPE, {"mode": 0o1777}),
            ("dir/file", tarfile.REGTYPE, {"size": 1500, "uid": 1000, "gid": 50, "mtime": 1700000000, "mode": 0o4755}),
            ("dir/hard", tarfile.LNKTYPE, {"linkname": "dir/file"}),
            ("dir/soft", tarfile.SYMTYPE, {"linkname": "../x"}),
            ("null", tarfile.CHRTYPE, {"devmajor": 1, "devminor": 3}),
            ("disk", tarfile.BLKTYPE, {"devmajor": 259, "devminor": 260}),
            ("pipe", tarfile.FIFOTYPE, {}),
        ]:
            info = tarfile.TarInfo(name)
            info.type = kind
            for key, value in extra.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(b"z" * 1500))
    found = {entry.name.rstrip(b"/"): (entry, content) for entry, content in read(out.getvalue())}
    assert [entry.kind for entry, _ in found.values()] == [
        Kind.DIRECTORY, Kind.FILE, Kind.LINK, Kind.SYMLINK, Kind.CHAR, Kind.BLOCK, Kind.FIFO,
    ]  # fmt: skip
    file, content = found[b"dir/file"]
    assert (file.uid, file.gid, file.permissions, file.mtime_ns) == (1000, 50, 0o4755, 1700000000 * 10**9)
    assert content == b"z" * 1500
    assert found[b"dir"][0].permissions == 0o1777
    assert found[b"dir/hard"][0].target == b"dir/file"
    assert found[b"dir/soft"][0].target == b"../x"
    assert found[b"disk"][0].device == (259, 260)


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_non_ascii_names(format_: int) -> None:
    out = io.BytesIO()
    name, target = "ü" * 60 + "/" + "n" * 200, "t" * 300
    with tarfile.open(fileobj=out, mode="w", format=format_) as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        archive.addfile(info)
    entry, _ = only(out.getvalue())
    assert (entry.name, entry.target) == (name.encode(), target.encode())


def test_ustar_prefix_is_a_directory_and_gnu_fields_there_are_not() -> None:
    assert only(member(b"name", prefix=b"some/dir") + END)[0].name == b"some/dir/name"
    assert only(member(b"name", prefix=b"some/dir", magic=b"ustar  \0") + END)[0].name == b"name"
    assert only(member(b"name", prefix=b"some/dir", magic=b"") + END)[0].name == b"name"


def test_v7_directories_end_in_a_slash() -> None:
    assert only(header(b"dir/", b"\0", magic=b"") + END)[0].kind is Kind.DIRECTORY


def test_base_256_numbers() -> None:
    big = b"\x80\0\0\0\0\0\0\0\0\0\x07\xd0"
    entry, content = only(
        header(b"f", size=big, uid=b"\x80\0\0\0\x10\0\0\0", mtime=b"\xff" * 12) + pad(b"x" * 2000) + END
    )
    assert (entry.size, content, entry.uid) == (2000, b"x" * 2000, 1 << 28)
    assert entry.mtime_ns == 0  # before 1970


def test_numbers_with_spaces_and_signed_checksums() -> None:
    assert only(header(b"f", size=b"      3 ") + pad(b"abc") + END)[1] == b"abc"
    assert only(member(b"\xff\xfe", signed_checksum=True) + END)[0].name == b"\xff\xfe"


def test_pax_records_override_headers() -> None:
    records = {
        b"path": "wörk/file".encode(),
        b"mtime": b"1700000000.123456789",
        b"uid": b"4000000000",
        b"gid": b"3000000000",
        b"size": b"5",
        b"comment": b"ignored",
    }
    entry, content = only(pax(records) + header(b"short", size=0) + pad(b"hello") + END)
    assert entry.name == "wörk/file".encode()
    assert (entry.uid, entry.gid, entry.mtime_ns) == (4000000000, 3000000000, 1700000000_123456789)
    assert content == b"hello"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"1", 10**9),
        (b"1.", 10**9),
        (b"1.5", 1_500_000_000),
        (b"1.0000000019", 1_000_000_001),
        (b"-5.5", 0),
        (b"99999999999999999", 0),
    ],
)
def test_pax_times_are_exact_nanoseconds(text: bytes, expected: int) -> None:
    assert only(pax({b"mtime": text}) + member(b"f") + END)[0].mtime_ns == expected


def test_extended_attributes_are_bytes() -> None:
    value = bytes(range(256)) + b"\n12 a=b\n"
    records = {
        b"SCHILY.xattr.user.bin": value,
        b"SCHILY.xattr.user.empty": b"",
        b"SCHILY.xattr.user.n\xff": b"=x",
        b"LIBARCHIVE.xattr.user.other": b"eA==",
    }
    entry, _ = only(pax(records) + member(b"f") + END)
    assert entry.xattrs == {b"user.bin": value, b"user.empty": b"", b"user.n\xff": b"=x"}


def test_extension_headers_hold_for_one_entry_and_global_ones_for_none() -> None:
    data = pax({b"mtime": b"7"}, b"g") + pax({b"uid": b"9"}) + member(b"one") + member(b"two") + END
    assert [(entry.uid, entry.mtime_ns) for entry, _ in read(data)] == [(9, 0), (0, 0)]


def test_an_archive_may_hold_or_end_with_nothing_but_a_global_header() -> None:
    """As `git archive` makes of an empty tree."""
    comment = pax({b"comment": b"x"}, b"g")
    assert not list(read(comment + END))
    assert not list(read(comment))
    assert [entry.name for entry, _ in read(member(b"one") + comment + END)] == [b"one"]


def test_an_empty_pax_value_takes_the_record_back() -> None:
    assert only(pax([(b"path", b"x"), (b"path", b"")]) + member(b"real") + END)[0].name == b"real"


def test_types_without_data_have_none_whatever_they_claim() -> None:
    assert [e.name for e, _ in read(header(b"l", b"2", size=900, target=b"t") + member(b"next") + END)] == [
        b"l",
        b"next",
    ]


def test_unread_content_is_skipped() -> None:
    data = member(b"a", b"x" * 5000) + member(b"b", b"yy") + END
    names = [entry.name for entry in TarReader(ByteStream(pieces(data)), LIMITS)]
    assert names == [b"a", b"b"]


def test_an_archive_may_simply_end() -> None:
    assert len(read(member(b"a"))) == 1
    assert read(b"") == []
    assert len(read(member(b"a") + bytes(512))) == 1


def test_what_follows_the_end_is_ignored() -> None:
    assert len(read(member(b"a") + END + b"garbage" * 999)) == 1


# sparse files


@pytest.mark.parametrize("format_", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_files_as_gnu_tar_writes_them(tmp_path: Path, format_: str) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for position in range(60):  # more extents than one old header block holds
            file.seek(position * 100_000)
            file.write(b"%d" % position * 1000)
        file.truncate(7_000_000)
    options = ["--format=gnu"] if format_ == "gnu" else ["--format=pax", f"--sparse-version={format_}"]
    out = subprocess.run(
        ["tar", "-C", tmp_path, "--sparse", *options, "-cf", "-", "sparse"], check=True, capture_output=True
    ).stdout
    assert len(out) < 3_000_000, "the archive is sparse"
    entry, content = only(out)
    assert (entry.name, entry.size) == (b"sparse", 7_000_000)
    assert content == path.read_bytes()


def test_a_huge_hole_is_a_number() -> None:
    records = {
        b"GNU.sparse.major": b"1",
        b"GNU.sparse.minor": b"0",
        b"GNU.sparse.name": b"big",
        b"GNU.sparse.realsize": b"68719476736",
    }
    body = b"1\n4096\n3\n".ljust(512, b"\0") + b"abc"
    [entry] = TarReader(ByteStream(pieces(pax(records) + member(b"x", body) + END)), LIMITS)
    assert entry.name == b"big"
    entries = TarReader(ByteStream(pieces(pax(records) + member(b"x", body) + END)), LIMITS)
    assert [list(entry.pieces(100)) for entry in entries] == [[4096, b"abc", 68719476736 - 4099]]


@pytest.mark.parametrize(
    "map_text",
    [b"0,3,2,3", b"0,3", b"0,6,99999,1", b"0", b"a,b", b"-1,6", b"0,6,"],
    ids=["overlap", "too-little", "behind-the-end", "odd", "letters", "negative", "trailing"],
)
def test_lying_sparse_maps_are_refused(map_text: bytes) -> None:
    records = {b"GNU.sparse.map": map_text, b"GNU.sparse.size": b"100"}
    with pytest.raises(BadLayer):
        read(pax(records) + member(b"f", b"abcdef") + END)


def test_a_sparse_map_that_claims_more_entries_than_headers_may_have() -> None:
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"100"}
    with pytest.raises(LimitExceeded):
        read(pax(records) + member(b"f", b"99999999999\n".ljust(512, b"\0")) + END)


# hostile headers


def test_header_bombs_are_refused_before_they_are_read() -> None:
    limits = Limits(tar_entry_header_bytes=10_000)
    for bomb in (
        header(b"x", b"x", size=1 << 33),
        header(b"L", b"L", size=20_000),
        header(b"K", b"K", size=20_000),
        pax({b"comment": b"x" * 4000}) * 10,
        header(b"L", b"L", size=0) * 30,
    ):
        with pytest.raises(LimitExceeded):
            read(bomb + member(b"f") + END, limits)


def test_many_global_headers_before_an_entry_are_bounded() -> None:
    with pytest.raises(LimitExceeded):
        read(pax({b"a": b"b"}, b"g") * 100 + member(b"f"), Limits(tar_entry_header_bytes=10_000))


@pytest.mark.parametrize(
    "data",
    [
        member(b"f", b"x" * 600)[:700],
        header(b"f", size=1 << 40) + b"short",
        header(b"f")[:-1],
        bytes([*header(b"f")[:20], 1, *header(b"f")[21:]]),
        header(b"f", size=b"9x"),
        header(b"f", size=b"\xff" * 12),
        header(b"f", size=b"\x80" + b"\xff" * 11),
        header(b"f", uid=b"\xff" * 8),
        header(b"f", b"Z"),
        header(b"f", b"M"),
        header(b"d", b"3", device=(0o7777777, 0)),
        bytes(512) + member(b"f"),
        pax({b"size": b"-1"}) + member(b"f"),
        pax({b"size": b"1" * 30}) + member(b"f"),
        pax({b"size": b"99999999999999999999"}) + member(b"f"),
        pax({b"uid": b"4294967295"}) + member(b"f"),
        pax({b"path": b"a\0b"}) + member(b"f"),
        pax({b"linkpath": b"a\0b"}) + member(b"f"),
        pax({b"mtime": b"1e9"}) + member(b"f"),
        pax({b"mtime": b"1.x"}) + member(b"f"),
        pax({b"mtime": b"\xb2"}) + member(b"f"),
        pax({b"a": b"b"}),
        header(b"x", b"x", size=20) + pad(b"99999 path=x\n") + member(b"f"),
        header(b"x", b"x", size=8) + pad(b"8 path=x") + member(b"f"),
        header(b"x", b"x", size=3) + pad(b"2 \n") + member(b"f"),
        header(b"x", b"x", size=6) + pad(b"6 abc\n") + member(b"f"),
        header(b"x", b"x", size=5) + pad(b"5 =a\n") + member(b"f"),
        header(b"x", b"x", size=9) + pad(b"xx path=x") + member(b"f"),
        pax([(b"GNU.sparse.numbytes", b"1"), (b"GNU.sparse.offset", b"1")]) + member(b"f"),
    ],
    ids=lambda _: None,
)
def test_broken_archives_are_refused(data: bytes) -> None:
    with pytest.raises(BadLayer):
        read(data + END if data[-512:] != bytes(512) and len(data) % 512 == 0 else data)


@pytest.mark.parametrize("cut", [100, 600, 1030, 1500])
def test_a_truncated_archive_is_never_taken_as_whole(cut: int) -> None:
    with pytest.raises(BadLayer):
        read((member(b"f", b"x" * 1000) + END)[:cut])


def test_helpers_write_what_the_standard_library_reads() -> None:
    data = tars.pax({b"path": b"long"}) + member(b"f", b"abc") + END
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == ["long"]
