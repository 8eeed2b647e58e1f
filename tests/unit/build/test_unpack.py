"""Archives that no file system can hold: the layer is refused, not the state directory blamed."""

import gzip
import struct
from pathlib import Path

import pytest

from snapshotter.build.unpack import LayerUnpacker
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import BadLayer
from tests.unit.build import tars

pytestmark = pytest.mark.root
LINKS = 65_000  # of one file on ext4, the fewest of the common file systems


def unpack(work: Path, archive: bytes) -> Path:
    for name in ("target", "staging"):
        (work / name).mkdir()
    unpacker = LayerUnpacker(work / "target", work / "staging", [], Limits())
    unpacker.unpack(iter([gzip.compress(archive, 1)]), Digest.of(archive))
    return work / "target"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("security.capability", b"\x01"),
        ("system.posix_acl_access", struct.pack("<IHHI", 2, 1, 7, 0xFFFFFFFF)),  # the owner's entry alone
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
@pytest.mark.parametrize("directory", [False, True])
def test_an_xattr_that_the_kernel_refuses(tmp_path: Path, name: str, value: bytes, directory: bool) -> None:
    entry = tars.member(b"it", kind=b"5") if directory else tars.member(b"it", b"content")
    with pytest.raises(BadLayer, match=rf"b'/?it': xattr b'{name}'"):
        unpack(tmp_path, tars.pax({f"SCHILY.xattr.{name}".encode(): value}) + entry + tars.END)


def test_more_hard_links_than_there_can_be(tmp_path: Path) -> None:
    links = [tars.header(b"link-%d" % number, kind=b"1", target=b"it") for number in range(LINKS)]
    with pytest.raises(BadLayer, match="more hard links than the file system allows"):
        unpack(tmp_path, tars.member(b"it", b"content") + b"".join(links) + tars.END)
