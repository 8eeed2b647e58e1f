"""Trees of any shape survive writer and reader; parsers answer anything with a value or a typed error."""

import json
import stat
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshotter.digest import Digest
from snapshotter.errors import SnapshotterError
from snapshotter.formats import blobmeta, sealed, toc
from snapshotter.formats.blobmeta import ChunkInfo, ChunkTable
from snapshotter.formats.rafs6 import Bootstrap
from snapshotter.formats.rafs6_tree import dirents
from snapshotter.formats.rafs6_write import Node
from tests import trees
from tests.trees import LIMITS, Blob, directory, symlink

NAMES = st.binary(min_size=1, max_size=255).filter(lambda name: not set(name) & {0, 0x2F} and name not in (b".", b".."))
XATTRS = st.dictionaries(
    st.one_of(
        st.binary(min_size=1, max_size=40).filter(lambda name: 0 not in name).map(lambda name: b"user." + name),
        st.sampled_from([b"security.capability", b"trusted.x", b"system.posix_acl_access"]),
    ),
    st.binary(max_size=300),
    max_size=4,
)
METADATA = st.fixed_dictionaries(
    {
        "uid": st.integers(0, 2**32 - 1),
        "gid": st.integers(0, 2**32 - 1),
        "mtime_ns": st.integers(-(2**62), 2**62),
        "xattrs": XATTRS,
    }
)
SPECIAL = [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK]
PERMISSIONS = st.integers(0, 0o7777)
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def roots(draw: Any, blobs: tuple[Blob, ...]) -> Node:
    """A tree with hard links, over chunks of these blobs."""
    files: list[Node] = []

    def leaf() -> Node:
        kind = draw(st.sampled_from(["file", "file", "again", "link", "special"]))
        if kind == "again" and files:
            return draw(st.sampled_from(files))
        fields = draw(METADATA)
        if kind == "link":
            return symlink(draw(st.binary(min_size=1, max_size=4095).filter(lambda t: 0 not in t)), **fields)
        if kind == "special":
            mode = draw(st.sampled_from(SPECIAL)) | draw(PERMISSIONS)
            device = draw(st.integers(0, 2**32 - 1)) if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0
            return Node(mode, rdev=device, **fields)
        pieces = draw(st.lists(st.sampled_from([b"a" * 4096, b"b" * 4096, bytes(4096)]), max_size=5))
        data = b"".join(pieces) + draw(st.binary(max_size=50))
        node = draw(st.sampled_from(blobs)).file(data, mode=stat.S_IFREG | draw(PERMISSIONS), **fields)
        files.append(node)
        return node

    def branch(depth: int) -> Node:
        children = {}
        for name in draw(st.lists(NAMES, max_size=6, unique=True)):
            children[name] = branch(depth - 1) if depth and draw(st.booleans()) else leaf()
        return directory(children, mode=stat.S_IFDIR | draw(PERMISSIONS), **draw(METADATA))

    return branch(3)


@SLOW
@given(st.data(), st.sampled_from([4096, 8192, 1 << 20]), st.booleans())
def test_any_tree_survives(data: st.DataObject, chunk_size: int, is_sealed: bool) -> None:
    blobs = tuple(Blob(index, chunk_size, sealed=is_sealed) for index in range(2))
    for blob in blobs:
        blob.add(b"so that no blob is empty %d" % blob.index)
    root = data.draw(roots(blobs))
    chunk = trees.device_chunk(*blobs)
    written = trees.write(root, *blobs)
    assert written == trees.write(root, *blobs)
    assert trees.listing(trees.read(written, *blobs).walk(), chunk) == trees.nodes(root, chunk)


@SLOW
@given(st.lists(NAMES, min_size=1, max_size=700, unique=True))
def test_any_names_survive_and_ascend(names: list[bytes]) -> None:
    empty = Node(stat.S_IFREG)
    root = directory(dict.fromkeys(names, empty))
    walked = [entry.path[1:] for entry in trees.read(trees.write(root)).walk()]
    assert walked == [b"", *sorted(names)]


CHUNKS = st.lists(
    st.tuples(st.integers(1, 1 << 16), st.integers(1, 1 << 16), st.booleans(), st.integers(0, 3)), max_size=50
)


@given(CHUNKS, st.booleans())
def test_any_chunk_table_survives(chunks: list[tuple[int, int, bool, int]], v2: bool) -> None:
    table = ChunkTable()
    device = 0
    for size, stored, flag, gap in chunks:
        flags = (blobmeta.FLAG_CRC32 if flag else 0) if v2 else int(size != stored)
        table.append(ChunkInfo(device, size, device // 3, stored, flags, size if v2 else 0))
        device += (-(-size // 4096) + gap) * 4096
    if v2:
        again = ChunkTable.decode_v2(table.encode_v2(), len(table), LIMITS)
    else:
        again = ChunkTable.decode_v1(table.encode_v1(), len(table), LIMITS)
    assert list(again) == list(table)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(JSON)
def test_canonical_json_has_one_form(value: Any) -> None:
    raw = sealed.canonical(value)
    assert json.loads(raw) == value
    assert sealed.canonical(json.loads(raw)) == raw


# whatever comes in


def answers(function: Any, *arguments: Any) -> None:
    """Returns or raises one of ours."""
    with suppress(SnapshotterError):
        found = function(*arguments)
        if hasattr(found, "__next__"):
            list(found)


ANY = st.binary(max_size=5000)


@given(ANY)
def test_any_bytes_get_an_answer(raw: bytes) -> None:
    answers(Bootstrap.parse, raw.ljust(8192, b"\0"), LIMITS)
    answers(dirents, raw, 1)
    answers(ChunkTable.decode_v1, raw, len(raw) // 16, LIMITS)
    answers(ChunkTable.decode_v2, raw, len(raw) // 24, LIMITS)
    answers(blobmeta.CiHeader.parse, raw[:4096].ljust(4096, b"\0"))
    answers(sealed.KeysFile.parse, raw, "ab" * 32, len(raw) // 64, LIMITS)
    answers(sealed.Identity.parse, raw, LIMITS)
    answers(toc.sections, raw[:4096], max(4096, len(raw)))


def _base() -> tuple[bytes, Blob]:
    blob = Blob(sealed=True)
    root = directory(
        {
            b"f": blob.file(b"x" * 9000, xattrs={b"user.a": b"b"}),
            b"l": symlink(b"f"),
            b"d": directory({b"%d" % i: blob.file(b"%d" % i) for i in range(40)}),
        }
    )
    return trees.write(root, blob), blob


BASE, BASE_BLOB = _base()


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.integers(0, 255)), max_size=8), st.integers(0, len(BASE)))
def test_a_changed_bootstrap_gets_an_answer(changes: list[tuple[int, int]], cut: int) -> None:
    raw = bytearray(BASE)
    for at, value in changes:
        raw[at] = value
    answers(_read_all, bytes(raw))
    answers(_read_all, bytes(raw[:cut]))


def _read_all(raw: bytes) -> None:
    found = Bootstrap.parse(raw, LIMITS)
    found.validate([BASE_BLOB.chunks])
    for entry in found.walk():  # what is valid can be walked
        assert all(blob == 0 and 0 <= chunk < len(BASE_BLOB.chunks) for blob, chunk in entry.chunks)
    assert len(found.prefetch) < 10


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.lists(st.integers(0, 2**40)), st.text(max_size=20))
def test_identities_survive(name: str, sizes: list[int], epoch: str) -> None:
    digest = Digest(f"sha256:{name}")
    identity = sealed.Identity(
        version=1,
        blobs=tuple(sealed.IdentityBlob(digest=digest, size=size) for size in sizes[:200]),
        source=digest,
        config_sha256=name,
        domain="tenant",
        epoch=epoch,
        created="2026-01-02T03:04:05Z",
    )
    try:
        raw = identity.pack()
    except SnapshotterError:
        assert any(0xD800 <= ord(letter) < 0xE000 for letter in epoch)
        return
    assert sealed.Identity.parse(raw, LIMITS) == identity
