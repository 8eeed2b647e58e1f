"""Random layer stacks: the converted image shows what an overlay mount of the unpacked layers shows.

The reference unpacks each layer with plain system calls through a writable overlay mount of those below it, so the
kernel itself makes the whiteouts and the copies.
"""

import copy
import gzip
import io
import os
import shutil
import stat
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from snapshotter.build.unpack import LayerUnpacker
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import BadLayer
from tests.unit.build import images

MTIME = 1_600_000_000
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking mounts for minutes; the failing stack is small
CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00" + bytes(12)
NAMES = ("a", "b", "c")
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
times = st.integers(1, 4 * 10**18 - 1)
CONTENTS = {"empty": b"", "x": b"x", "zeros": b"zero" + bytes(9000), "long": b"long" * 3000, "block": b"y" * 4096}
xattr_sets = st.sampled_from([{}, {}, {"user.a": "1"}, {"user.b": "\n=1", "user.c": ""}])


@dataclass(frozen=True)
class Op:
    """One wish; those that make no sense where they come are left out."""

    what: str
    path: str
    other: str = ""
    content: str = "empty"
    mode: int = 0o644
    mtime_ns: int = 0
    xattrs: dict[str, str] = field(default_factory=dict)


ops = st.builds(
    Op,
    what=st.sampled_from(["file", "file", "file", "dir", "dir", "symlink", "link", "link", "fifo", "char"]),
    path=paths,
    other=paths,
    content=st.sampled_from(sorted(CONTENTS)),
    mode=st.sampled_from([0o644, 0o755, 0o4711, 0o1777, 0o600]),
    mtime_ns=times,
    xattrs=xattr_sets,
)
removals = st.builds(Op, what=st.sampled_from(["whiteout", "opaque"]), path=paths)
layers = st.tuples(st.lists(removals, max_size=3), st.lists(ops, min_size=1, max_size=12))


@dataclass
class Made:
    """A layer's archive, and what the reference needs to know about it."""

    tar: bytes
    removed: list[str]
    emptied: list[str]
    described: set[str]  # directories with entries of their own
    replaced: set[str]  # what was no directory at some point: there, unpackers disagree about lower directories


class Model:
    """What exists while layers are made: path → its last entry. Keeps archives to what every unpacker takes alike."""

    def __init__(self) -> None:
        self.entries: dict[str, tarfile.TarInfo | None] = {}  # None: a directory without an entry

    def is_directory(self, path: str) -> bool:
        entry = self.entries.get(path)
        return path in self.entries and (entry is None or entry.isdir())

    def below(self, path: str) -> list[str]:
        return [name for name in self.entries if name.startswith(path + "/")]

    def remove(self, path: str) -> None:
        for name in [path, *self.below(path)]:
            self.entries.pop(name, None)

    def parents_fit(self, path: str) -> bool:
        return all(parent not in self.entries or self.is_directory(parent) for parent in parents(path))

    def add(self, path: str, entry: tarfile.TarInfo) -> None:
        if not (entry.isdir() and self.is_directory(path)):
            self.remove(path)
        for parent in parents(path):
            self.entries.setdefault(parent, None)
        self.entries[path] = entry


def parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def make_layer(model: Model, removing: list[Op], adding: list[Op]) -> Made:
    out = io.BytesIO()
    made = Made(b"", [], [], set(), set())
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        last = []
        for number, op in enumerate(removing):
            name = hide(model, op, made)
            if name and number % 2:
                last.append(name)
            elif name:
                archive.addfile(tarfile.TarInfo(name))
        for op in adding:
            add(archive, model, op, made, last)
        for name in last:
            archive.addfile(tarfile.TarInfo(name))
    made.tar = out.getvalue()
    return made


def hide(model: Model, op: Op, made: Made) -> str:
    """Name of the whiteout, "" when there is nothing to hide or the layer hides something above or below already."""
    taken = {*made.removed, *made.emptied}
    if op.path not in model.entries or taken & {op.path, *parents(op.path)}:
        return ""
    if any(path.startswith(op.path + "/") for path in taken):
        return ""
    if op.what == "whiteout":
        made.removed.append(op.path)
        model.remove(op.path)
        return os.path.join(os.path.dirname(op.path), ".wh." + os.path.basename(op.path))
    if not model.is_directory(op.path):
        return ""
    made.emptied.append(op.path)
    for below in model.below(op.path):
        model.entries.pop(below, None)
    return op.path + "/.wh..wh..opq"


def add(archive: tarfile.TarFile, model: Model, op: Op, made: Made, last: list[str]) -> None:
    in_the_way = [name for name in last if name.startswith(op.path + "/")]
    becoming = {*parents(op.path), op.path} if op.what == "dir" else set(parents(op.path))
    if not model.parents_fit(op.path) or (in_the_way and op.what != "dir") or becoming & made.replaced:
        return
    info = tarfile.TarInfo(op.path)
    info.mode, info.uid, info.gid = op.mode, len(op.path), op.mode & 7
    info.pax_headers = {"mtime": f"{op.mtime_ns // 10**9}.{op.mtime_ns % 10**9:09}"}
    attributes = {f"SCHILY.xattr.{name}": value for name, value in op.xattrs.items()}
    data = b""
    match op.what:
        case "file":
            data = CONTENTS[op.content]
            info.size = len(data)
            info.pax_headers |= attributes
            if op.mode == 0o755:
                info.pax_headers["SCHILY.xattr.security.capability"] = CAPABILITY.decode()
        case "dir":
            info.type = tarfile.DIRTYPE
            info.pax_headers |= attributes
        case "symlink":
            info.type, info.linkname = tarfile.SYMTYPE, op.other
        case "link":
            target = model.entries.get(op.other)
            if target is None or target.isdir() or op.other == op.path or op.other.startswith(op.path + "/"):
                return
            info = copy.copy(target)
            info.name, info.type, info.linkname, info.size = op.path, tarfile.LNKTYPE, op.other, 0
            archive.addfile(info)
            model.add(op.path, target)
            made.replaced.add(op.path)
            return
        case "fifo":
            info.type = tarfile.FIFOTYPE
        case "char":
            info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, 1, 3
    archive.addfile(info, io.BytesIO(data))
    model.add(op.path, info)
    (made.described if info.isdir() else made.replaced).add(op.path)


def unpack(made: Made, number: int, work: Path, lowers: list[Path]) -> Path:
    """Unpack a layer into a directory of its own, through an overlay of the layers below it (top first)."""
    upper = work / f"layer-{number}"
    upper.mkdir()
    os.utime(upper, ns=(0, MTIME * 10**9))
    with images.overlay(lowers or [work / "empty"], work / "merged", upper) as merged:
        before = directories(merged)
        for path in made.removed:
            remove(merged / path)
        for path in made.emptied:
            for child in (merged / path).iterdir():
                remove(child)
        kept = directories(merged)
        with tarfile.open(fileobj=io.BytesIO(made.tar)) as archive:
            for entry in archive:
                if not os.path.basename(entry.name).startswith(".wh."):
                    content = archive.extractfile(entry) if entry.isreg() else None
                    create(merged, entry, content.read() if content else b"")
            for entry in archive:
                if entry.isdir() and not made.replaced & {entry.name, *parents(entry.name)}:
                    set_time(merged / entry.name, entry)
        for path in sorted(directories(merged), key=len, reverse=True):
            if path not in made.described:
                old = before[path] if path in kept else MTIME * 10**9
                os.utime(merged / path, ns=(old, old))
    return upper


def create(top: Path, entry: tarfile.TarInfo, content: bytes) -> None:
    """One entry, by the system calls that any unpacker makes."""
    path = top / entry.name
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    if os.path.lexists(path) and not (entry.isdir() and path.is_dir() and not path.is_symlink()):
        remove(path)
    if entry.islnk():
        os.link(top / entry.linkname, path, follow_symlinks=False)
        return
    if entry.isdir():
        path.mkdir(exist_ok=True)
        for name in os.listxattr(path):
            os.removexattr(path, name)
    elif entry.issym():
        path.symlink_to(entry.linkname)
    elif entry.isreg():
        path.write_bytes(content)
    elif entry.isfifo():
        os.mkfifo(path)
    else:
        os.mknod(path, stat.S_IFCHR, os.makedev(entry.devmajor, entry.devminor))
    os.lchown(path, entry.uid, entry.gid)
    if not entry.issym():
        path.chmod(entry.mode)
    for key, value in entry.pax_headers.items():
        if key.startswith("SCHILY.xattr."):
            os.setxattr(path, key.removeprefix("SCHILY.xattr."), value.encode())
    set_time(path, entry)


def set_time(path: Path, entry: tarfile.TarInfo) -> None:
    seconds, _, fraction = entry.pax_headers["mtime"].partition(".")
    os.utime(path, ns=(0, int(seconds) * 10**9 + int(fraction)), follow_symlinks=False)


def directories(top: Path) -> dict[str, int]:
    """Relative path → mtime of every directory, the top as `.`."""
    return {os.path.relpath(here, top): os.stat(here).st_mtime_ns for here, _, _ in os.walk(top)}


def remove(path: Path) -> None:
    if stat.S_ISDIR(path.lstat().st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.root
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=_PHASES)
@given(st.lists(layers, min_size=1, max_size=4))
def test_the_image_shows_what_an_overlay_mount_shows(stack: list[tuple[list[Op], list[Op]]]) -> None:
    model = Model()
    made = [make_layer(model, removing, adding) for removing, adding in stack]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        compare(made, Path(directory))


def compare(made: list[Made], work: Path) -> None:
    (work / "empty").mkdir()
    lowers: list[Path] = []
    for number, layer in enumerate(made):
        lowers.insert(0, unpack(layer, number, work, lowers))
    keys = images.key_pair(work)
    source = images.layout(work / "source", [layer.tar for layer in made])
    chosen = images.options(keys, directory_mtime_ns=MTIME * 10**9)
    images.run(images.convert(source, work / "target", chosen))
    _, found = images.run(images.opened(work / "target", keys))
    with (
        images.overlay([*lowers, work / "empty"], work / "merged") as expected,
        images.erofs(work / "target", found, work) as actual,
    ):
        seen = images.tree(actual)
        assert seen == images.tree(expected)
        for name, item in seen.items():
            links = len(item.names) or 2 + sum(
                child.mode.startswith("d") and os.path.dirname(other) == ("" if name == "." else name) and other != "."
                for other, child in seen.items()
            )
            assert (actual / name).lstat().st_nlink == links, f"{name}: links"


@pytest.mark.root
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=_PHASES)
@given(st.lists(layers, min_size=1, max_size=4))
def test_layers_unpack_to_what_an_overlay_mount_shows(stack: list[tuple[list[Op], list[Op]]]) -> None:
    model = Model()
    made = [make_layer(model, removing, adding) for removing, adding in stack]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        compare_unpacked(made, Path(directory))


def compare_unpacked(made: list[Made], work: Path) -> None:
    (work / "empty").mkdir()
    expected: list[Path] = []
    unpacked: list[Path] = []
    for number, layer in enumerate(made):
        target, staging = work / f"unpacked-{number}", work / f"staging-{number}"
        target.mkdir()
        staging.mkdir()
        unpacker = LayerUnpacker(target, staging, unpacked, Limits())
        try:
            unpacker.unpack(iter([gzip.compress(layer.tar)]), Digest.of(layer.tar))
        except BadLayer as error:
            if "which is not there" in str(error):  # a hard link to a file of a lower layer
                break
            raise
        unpacked.insert(0, target)
        expected.insert(0, unpack(layer, number, work, expected))
    with (
        images.overlay([*expected, work / "empty"], work / "merged") as there,
        images.overlay([*unpacked, work / "empty"], work / "merged-unpacked") as here,
    ):
        seen, wanted = images.tree(here), images.tree(there)
    assert seen.keys() == wanted.keys()
    for name, item in wanted.items():  # directories that no archive describes have no time of their own
        undated = name == "." or (item.mode.startswith("d") and not seen[name].mtime_ns)
        assert seen[name] == (item._replace(mtime_ns=seen[name].mtime_ns) if undated else item), name
