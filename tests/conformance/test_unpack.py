"""What a converted image shows is what containerd's own unpacker and an overlay mount show, odd archives included."""

import subprocess
from pathlib import Path

import pytest

from tests.harness.containerd import Containerd
from tests.harness.machine import Work
from tests.unit.build import images
from tests.unit.build.tars import END, header, member, pax

ACL = bytes.fromhex("0200000001000600ffffffff02000400e803000004000400ffffffff10000400ffffffff20000400ffffffff")
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def directory(name: bytes, mode: int = 0o755, mtime: int = 7) -> bytes:
    return header(name, b"5", mode=mode, mtime=mtime)


def link(name: bytes, target: bytes) -> bytes:
    return header(name, b"1", target=target, mode=0o640, uid=5, mtime=9)


def symlink(name: bytes, target: bytes) -> bytes:
    return header(name, b"2", target=target, mtime=8)


def xattrs(**values: bytes) -> bytes:
    return pax({b"SCHILY.xattr." + name.replace("__", ".").encode(): value for name, value in values.items()})


BASE = b"".join(
    [
        directory(b"usr/"), directory(b"usr/lib"), symlink(b"lib", b"usr/lib"), member(b"lib/through", b"link"),
        member(b"/absolute/name", b"1"), member(b"../../up/and/away", b"2"), member(b"a/./b/../c", b"3"),
        member(b"twice", b"first"), member(b"twice", b"second", mode=0o600),
        member(b"was-dir/x"), member(b"was-dir", b"now a file"),
        member(b"was-file"), directory(b"was-file", 0o700), member(b"was-file/x"),
        member(b"h/one", b"shared", mode=0o640, uid=5, mtime=9), link(b"h/two", b"h/one"),
        link(b"h/three", b"/lib/../../h/two"),
        xattrs(user__note=b"\x00\xff binary", security__capability=CAPABILITY) + member(b"capable", mode=0o755),
        xattrs(system__posix_acl_access=ACL) + member(b"acl", mode=0o644, uid=1000),
        xattrs(system__posix_acl_default=ACL) + directory(b"acl-dir"),
        xattrs(trusted__overlay__opaque=b"y", trusted__x=b"1") + directory(b"trusted"),
        pax({b"mtime": b"1234567890.987654321"}) + member(b"nanoseconds"),
        header(b"null", b"3", device=(1, 3), mode=0o666), header(b"disk", b"4", device=(259, 300)),
        header(b"pipe", b"6"),
        member(b"setuid", mode=0o4755, uid=1), directory(b"sticky", 0o1777),
        directory(b"kept", 0o750), member(b"kept/a"), member(b"kept/b"),
        directory(b"cleared", 0o705), member(b"cleared/old"), directory(b"gone"), member(b"gone/x"),
        member(b"becomes/dir"), member(b"becomes-not"), symlink(b"swap", b"usr"), member(b"hidden-by-device"),
        END,
    ]
)  # fmt: skip
UPPER = b"".join(
    [
        member(b"kept/.wh.a"), member(b"kept/new"),
        member(b"cleared/new"), member(b"cleared/.wh..wh..opq"),
        member(b".wh.gone"), member(b"becomes", b"a file"), member(b"becomes-not/dir"), member(b"swap/inside"),
        header(b"hidden-by-device", b"3"),
        directory(b"usr", 0o700, 11), member(b"lib/second", b"a real directory over a symlink"),
        member(b"reused/x"), member(b"twice", b"third"), END,
    ]
)  # fmt: skip


@pytest.mark.root
@pytest.mark.real
def test_containerd_unpacks_the_same_tree(work: Work, tmp_path: Path) -> None:
    keys = images.key_pair(tmp_path)
    source = images.layout(tmp_path / "source", [BASE, UPPER])
    images.run(images.convert(source, tmp_path / "out", images.options(keys)))
    _, found = images.run(images.opened(tmp_path / "out", keys))
    daemon = Containerd(work, "containerd", snapshotter="overlayfs")
    archive = tmp_path / "source.tar"
    subprocess.run(
        ["skopeo", "copy", "--quiet", f"oci:{source}:src", f"oci-archive:{archive}:example.org/odd:1"], check=True
    )
    daemon.ctr("images", "import", "--snapshotter", "overlayfs", str(archive))
    target = work.directory("unpacked")
    daemon.ctr("images", "mount", "--snapshotter", "overlayfs", "example.org/odd:1", str(target))
    try:
        expected = images.tree(target)
    finally:
        daemon.ctr("images", "unmount", "--rm", "--snapshotter", "overlayfs", str(target))
    with images.erofs(tmp_path / "out", found, tmp_path) as mounted:
        actual = images.tree(mounted)
    assert set(actual) ^ set(expected) == set()
    for path, seen in actual.items():
        assert comparable(path, seen) == comparable(path, expected[path]), path


def comparable(path: str, seen: images.Seen) -> images.Seen:
    """Without what containerd does not take from the layers."""
    described = {"usr", "usr/lib", "was-file", "acl-dir", "trusted", "sticky"}
    if seen.mode.startswith("d") and path not in described:
        return seen._replace(mtime_ns=0)
    return seen
