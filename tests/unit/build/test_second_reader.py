"""The independent reader and the kernel see the same files, so documentation, converter and reader agree."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import second_reader
from tests.harness import tiny
from tests.harness.oci import member
from tests.unit.build import images

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[3]


def odd_members() -> list[tuple[tarfile.TarInfo, bytes]]:
    """What busybox and its data do not have: devices, hard links, large and zero files, odd names, a whiteout."""
    made = [
        (member("odd/"), b""),
        (member("odd/large", xattrs={"user.a": "1", "user.long": "v" * 2000}), tiny.data(9, 1_000_003)),
        (member("odd/zeros"), bytes(700_000)),
        (member("odd/\udcff-not-utf-8"), b"name"),
        (member("odd/-x"), b"sorts before the dot"),
        (member("data/.wh.text"), b""),
    ]
    for name, kind in (("chr", tarfile.CHRTYPE), ("blk", tarfile.BLKTYPE), ("fifo", tarfile.FIFOTYPE)):
        device = member(f"odd/{name}", 0o640)
        device.type, device.devmajor, device.devminor = kind, 259, 70_000
        made.append((device, b""))
    hard = member("odd/hard")
    hard.type, hard.linkname = tarfile.LNKTYPE, "odd/large"
    long = member("odd/long-link", link="x" * 4000)
    many = [(member(f"many/{n:04d}-{'n' * (n % 90)}"), b"%d" % n) for n in range(900)]
    return [*made, (hard, b""), (long, b""), (member("many/"), b""), *many]


@pytest.mark.parametrize(("chunk_size", "codec"), [(262_144, "zstd"), (4096, "none"), (65_536, "zstd")])
def test_the_second_reader_equals_the_kernel_mount(tmp_path: Path, chunk_size: int, codec: str) -> None:
    keys = images.key_pair(tmp_path)
    tiny.layout(tmp_path / "src", name="src", extra=[odd_members()])
    chosen = images.options(keys, chunk_size=chunk_size)
    if codec == "none":
        chosen = images.options(keys, chunk_size=chunk_size, codec=type(chosen.codec)(algorithm=0, level=0))
    images.run(images.convert(tmp_path / "src", tmp_path / "out", chosen))
    image, found = images.run(images.opened(tmp_path / "out", keys))
    assert image.encrypted
    reader = second_reader.Image(tmp_path / "out", "out", keys.private.read_bytes())
    with images.erofs(tmp_path / "out", found, tmp_path) as mount:
        seen = set()
        for entry in reader:
            path = os.fsencode(mount) + os.fsencode(entry.path)
            status = os.lstat(path)
            seen.add(os.fsencode(entry.path))
            assert (entry.mode, entry.uid, entry.gid) == (status.st_mode, status.st_uid, status.st_gid), entry.path
            assert (entry.mtime_ns, entry.nlink) == (status.st_mtime_ns, status.st_nlink), entry.path
            names = os.listxattr(path, follow_symlinks=False)
            assert entry.xattrs == {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
            kind = entry.mode >> 12
            if kind == 8:
                assert reader.content(entry) == Path(os.fsdecode(path)).read_bytes(), entry.path
            elif kind == 10:
                assert entry.target == os.readlink(path)
            elif kind in (2, 6):
                device = entry.rdev
                major, minor = device >> 8 & 0xFFF, device & 0xFF | device >> 12 & 0xFFF00
                assert (major, minor) == (os.major(status.st_rdev), os.minor(status.st_rdev))
        there = {b"/"}
        for here, directories, files in os.walk(os.fsencode(mount)):
            there |= {os.path.join(here, name)[len(os.fsencode(mount)) :] for name in (*directories, *files)}
    assert seen == there
    assert b"/data/text" not in seen, "the whiteout was applied"
    assert reader.config["config"]["Cmd"] == ["/bin/sh"]


def test_it_refuses_another_key_and_damage(tmp_path: Path) -> None:
    keys = images.key_pair(tmp_path)
    (tmp_path / "other").mkdir()
    other = images.key_pair(tmp_path / "other")
    tiny.layout(tmp_path / "src", name="src")
    images.run(images.convert(tmp_path / "src", tmp_path / "out", images.options(keys)))
    with pytest.raises(second_reader.Refused):
        second_reader.Image(tmp_path / "out", "out", other.private.read_bytes())
    layers = second_reader.Layout(tmp_path / "out").manifest("out")["layers"]
    blob = tmp_path / "out/blobs/sha256" / layers[0]["digest"][7:]
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.write_bytes(content)
    with pytest.raises(second_reader.Refused):
        second_reader.Image(tmp_path / "out", "out", keys.private.read_bytes())


def test_it_shares_nothing_with_the_package() -> None:
    script = (
        "import sys, runpy; sys.argv = ['x']\n"
        "try: runpy.run_path('tests/second_reader.py', run_name='__main__')\n"
        "except TypeError: pass\n"
        "print([name for name in sys.modules if name.startswith('snapshotter')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_its_command_line_prints_every_object(tmp_path: Path) -> None:
    keys = images.key_pair(tmp_path)
    tiny.layout(tmp_path / "src", name="src")
    images.run(images.convert(tmp_path / "src", tmp_path / "out", images.options(keys)))
    out = io.StringIO()
    before, sys.stdout = sys.stdout, out
    try:
        second_reader.main(str(tmp_path / "out"), "out", str(keys.private))
    finally:
        sys.stdout = before
    assert hashlib.sha256(tiny.data()).hexdigest() in out.getvalue()
