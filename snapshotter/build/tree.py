"""The tree of one layer: tar entries placed as containerd's unpacker places them into an overlay's upper directory.

Names are cleaned and rooted, symlinks in the middle of a path are followed inside the layer and never out of it, a
later entry of the same name wins. What the layer hides of those below it (OCI image-spec layer.md, "Whiteouts") is kept
apart from what it adds, so that order inside a layer does not matter.
"""

import os
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from snapshotter.build.tar import Entry, Kind
from snapshotter.config import Limits
from snapshotter.errors import BadLayer, LimitExceeded
from snapshotter.formats.rafs6_write import Node

PATH_BYTES, NAME_BYTES = 4095, 255
DEFAULT_MODE = 0o755  # of directories nobody described
_FOLLOW = 40  # symlinks in one path, as in Linux
_WHITEOUT, _META, _OPAQUE = b".wh.", b".wh..wh.", b".wh..wh..opq"
_TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHAR: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.FIFO: stat.S_IFIFO,
}
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_XATTR_VALUE_BYTES = 65535  # EROFS counts in 16 bits


@dataclass(slots=True)
class Directory:
    """One directory of one layer. `node` is None while only its content needs it (metadata comes from below)."""

    node: Node | None = None
    names: "dict[bytes, Directory | Node]" = field(default_factory=dict)
    whiteouts: set[bytes] = field(default_factory=set)  # names of lower layers that are gone
    opaque: bool = False  # everything of lower layers is gone


class Budget:
    """How much the trees of all layers of an image may hold: a gigabyte of metadata compresses to a small layer."""

    def __init__(self, limits: Limits) -> None:
        self._inodes = limits.inodes
        self._bytes = int(limits.bootstrap_unpacked_bytes)

    def spend(self, size: int) -> None:
        """One more inode, with `size` bytes of names, attributes and link target. Raises LimitExceeded."""
        self._inodes -= 1
        self._bytes -= size
        if self._inodes < 0:
            raise LimitExceeded("image: its layers have more entries than limits.inodes")
        if self._bytes < 0:
            raise LimitExceeded("image: metadata of its layers is larger than limits.bootstrap_unpacked_bytes")


class LayerTree:
    """Grows by `add`; `root` is what the layer adds and hides. `lower` is the merged tree below, for hard links."""

    def __init__(self, lower: Node, limits: Limits, budget: Budget) -> None:
        self.root = Directory()
        self.entries = 0
        self._lower = lower
        self._limits = limits
        self._budget = budget

    def add(self, entry: Entry) -> Node | None:
        """Place one entry. Returns the node of a regular file, whose chunks the caller fills. Raises BadLayer."""
        self.entries += 1
        attributes = sum(len(name) + len(value) for name, value in entry.xattrs.items())
        self._budget.spend(len(entry.name) + len(entry.target) + attributes)
        parts = split(entry.name)
        if not parts:
            if entry.kind is Kind.DIRECTORY:
                self.root.node = make_node(entry, self._limits)
            return None
        base = parts.pop()
        if any(part.startswith(_META) for part in parts) or (base.startswith(_META) and base != _OPAQUE):
            return None  # bookkeeping of AUFS
        if any(part.startswith(_WHITEOUT) for part in parts):
            raise BadLayer(f"layer: {show(entry.name)} is inside a whiteout")
        parent = self._descend(parts, entry.name)
        if base.startswith(_WHITEOUT):
            _hide(parent, base)
            return None
        if entry.kind is Kind.CHAR and entry.device == (0, 0):  # how an overlay's own upper directory says it
            parent.names.pop(base, None)
            parent.whiteouts.add(base)
            return None
        if entry.kind is Kind.LINK:
            self._link(parent, base, entry)
            return None
        node = make_node(entry, self._limits)
        if entry.kind is Kind.DIRECTORY:
            old = parent.names.get(base)
            if isinstance(old, Directory):
                old.node = node
            else:
                parent.names[base] = Directory(node)
            return None
        parent.names[base] = node
        return node if entry.kind is Kind.FILE else None

    def _descend(self, parts: list[bytes], shown: bytes) -> Directory:
        """The directory of this path, through the layer's own symlinks, made where it is missing."""
        path = self._resolve(parts, shown)
        here = self.root
        for part in path:
            child = here.names.get(part)
            if child is None:
                self._budget.spend(len(part))
                child = here.names[part] = Directory()
            assert isinstance(child, Directory)
            here = child
        return here

    def _resolve(self, parts: list[bytes], shown: bytes) -> list[bytes]:
        """The same path without symlinks and `..`; components the layer does not have stay as they are."""
        path: list[bytes] = []
        stack: list[Directory | None] = [self.root]
        todo = parts[::-1]
        followed = 0
        while todo:
            part = todo.pop()
            if part == b"..":
                if path:
                    path.pop()
                    stack.pop()
                continue
            here = stack[-1]
            child = here.names.get(part) if here is not None else None
            if isinstance(child, Node):
                if not stat.S_ISLNK(child.mode):
                    raise BadLayer(f"layer: {show(shown)} is inside something that is not a directory")
                followed += 1
                if followed > _FOLLOW:
                    raise BadLayer(f"layer: too many symlinks on the way to {show(shown)}")
                if child.target.startswith(b"/"):
                    path, stack = [], [self.root]
                todo += [name for name in reversed(child.target.split(b"/")) if name not in (b"", b".")]
                continue
            path.append(part)
            stack.append(child)
            if len(path) >= self._limits.directory_depth or len(todo) > PATH_BYTES:
                raise LimitExceeded(f"layer: {show(shown)} is deeper than limits.directory_depth")
        return path

    def _link(self, parent: Directory, base: bytes, entry: Entry) -> None:
        """A hard link shares the node of its target. One of a lower layer is copied up first, as an overlay does."""
        parts = components(entry.target)  # a `..` behind a symlink means what it means to the kernel
        name = parts.pop() if parts else b".."
        if name == b"..":
            raise BadLayer(f"layer: hard link {show(entry.name)} leads to a directory")
        path = self._resolve(parts, entry.target)
        target = self._own(path, name)
        if target is None:
            found = self._visible_lower([*path, name])
            if found is None:
                raise BadLayer(f"layer: hard link {show(entry.name)} leads to {show(entry.target)}, which is not there")
            if found.children is None:
                target = copy_up(found)
                self._descend(path, entry.target).names[name] = target
        if not isinstance(target, Node):
            raise BadLayer(f"layer: hard link {show(entry.name)} leads to a directory")
        _describe_again(target, entry)
        parent.names[base] = target

    def _own(self, path: list[bytes], name: bytes) -> Directory | Node | None:
        here = self.root
        for part in path:
            child = here.names.get(part)
            if not isinstance(child, Directory):
                return None
            here = child
        return here.names.get(name)

    def _visible_lower(self, path: list[bytes]) -> Node | None:
        """What the layers below have at `path`, if this layer does not hide it so far."""
        here: Node | None = self._lower
        own: Directory | Node | None = self.root
        for part in path:
            if here is None or here.children is None:
                return None
            if isinstance(own, Directory):
                if own.opaque or part in own.whiteouts:
                    return None
                own = own.names.get(part)
            here = here.children.get(part)
        return here


def components(path: bytes) -> list[bytes]:
    """Names of a path and its `..`. Raises BadLayer for what Linux could not hold."""
    if len(path) > PATH_BYTES + 1:
        raise BadLayer(f"layer: a path of {len(path)} bytes; {PATH_BYTES} are possible")
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if any(len(part) > NAME_BYTES for part in parts):
        raise BadLayer(f"layer: a name above {NAME_BYTES} bytes in {show(path)}")
    return parts


def split(path: bytes) -> list[bytes]:
    """Names of a path taken as rooted: `..` is resolved by name, and never leads above the root."""
    parts: list[bytes] = []
    for part in components(path):
        if part != b"..":
            parts.append(part)
        elif parts:
            parts.pop()
    return parts


def show(name: bytes) -> str:
    """A hostile name for a message: short and printable."""
    return ascii(name[:80].decode("utf-8", "backslashreplace"))


def make_node(entry: Entry, limits: Limits) -> Node:
    """A node with the entry's metadata and no content."""
    target = b""
    if entry.kind is Kind.SYMLINK:
        target = entry.target
        if not 1 <= len(target) <= limits.symlink_bytes:
            raise BadLayer(f"layer: symlink {show(entry.name)} has a target of {len(target)} bytes")
    permissions = 0o777 if entry.kind is Kind.SYMLINK else entry.permissions
    return Node(
        mode=_TYPES[entry.kind] | permissions,
        uid=entry.uid,
        gid=entry.gid,
        mtime_ns=entry.mtime_ns,
        rdev=os.makedev(*entry.device) if entry.kind in (Kind.CHAR, Kind.BLOCK) else 0,
        size=entry.size if entry.kind is Kind.FILE else len(target),
        target=target,
        xattrs=kept_xattrs(entry, _TYPES[entry.kind], limits),
        chunks=array("Q"),
        children={} if entry.kind is Kind.DIRECTORY else None,
    )


def new_directory(mtime_ns: int) -> Node:
    """A directory that no layer describes."""
    return Node(
        mode=stat.S_IFDIR | DEFAULT_MODE,
        uid=0,
        gid=0,
        mtime_ns=mtime_ns,
        rdev=0,
        size=0,
        target=b"",
        xattrs={},
        chunks=array("Q"),
        children={},
    )


def copy_up(node: Node) -> Node:
    """The same file as a new inode."""
    return Node(
        mode=node.mode,
        uid=node.uid,
        gid=node.gid,
        mtime_ns=node.mtime_ns,
        rdev=node.rdev,
        size=node.size,
        target=node.target,
        xattrs=dict(node.xattrs),
        chunks=array("Q", node.chunks),
        children=None,
    )


def kept_xattrs(entry: Entry, kind: int, limits: Limits) -> dict[bytes, bytes]:
    """Those that an unpacker could set on a file of this type. `trusted.` and unknown namespaces are dropped."""
    kept: dict[bytes, bytes] = {}
    for name, value in entry.xattrs.items():
        if name in _ACLS:
            if kind == stat.S_IFLNK or (name == _ACLS[1] and kind != stat.S_IFDIR):
                continue
            if len(value) < 4 or value[:4] != b"\2\0\0\0" or (len(value) - 4) % 8:
                raise BadLayer(f"layer: {show(entry.name)} has a malformed access control list")
        elif name.startswith(b"user."):
            if kind not in (stat.S_IFREG, stat.S_IFDIR):
                continue
        elif not name.startswith(b"security."):
            continue
        if name in (b"user.", b"security.") or len(name) > NAME_BYTES or len(value) > _XATTR_VALUE_BYTES:
            raise BadLayer(f"layer: {show(entry.name)} has an impossible extended attribute {show(name)}")
        kept[name] = value
    if sum(len(name) + len(value) for name, value in kept.items()) > limits.xattr_bytes:
        raise LimitExceeded(f"layer: extended attributes of {show(entry.name)} larger than limits.xattr_bytes")
    return kept


def _describe_again(node: Node, entry: Entry) -> None:
    """containerd applies a link entry's own metadata to the inode that it shares."""
    if not stat.S_ISLNK(node.mode):
        node.mode = stat.S_IFMT(node.mode) | entry.permissions
    node.uid, node.gid, node.mtime_ns = entry.uid, entry.gid, entry.mtime_ns


def _hide(parent: Directory, base: bytes) -> None:
    if base == _OPAQUE:
        parent.opaque = True
        return
    name = base[len(_WHITEOUT) :]
    if name in (b"", b".", b".."):
        raise BadLayer(f"layer: whiteout of the name {show(name)}")
    parent.whiteouts.add(name)


def files(root: Directory) -> Iterator[Node]:
    """Regular files in directory order: names of each directory by bytes, sub-directories where their name falls."""
    stack = [iter(sorted(root.names.items()))]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
        elif isinstance(item[1], Directory):
            stack.append(iter(sorted(item[1].names.items())))
        elif stat.S_ISREG(item[1].mode):
            yield item[1]
