"""One layer's tar archive unpacked into the upper directory of an overlay, as containerd's unpacker would do it.

The archive is first placed into a tree in memory (`tree`), where names, links and symlinks are resolved; files wait
under numbers in a directory of their own. Only then is the tree laid out, top down, from directories made here, so that
no entry of an archive can lead anywhere else.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import structlog

from snapshotter.build.stream import ByteStream, decompressed
from snapshotter.build.tar import Entry, TarReader
from snapshotter.build.tree import Budget, Directory, LayerTree, new_directory
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import BadLayer, DigestMismatch, LimitExceeded
from snapshotter.formats.rafs6_write import Node

log = structlog.get_logger(__name__)

_STEP = 1 << 20
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPAQUE = "trusted.overlay.opaque"


class LayerUnpacker:
    """Unpacks into `target`, an empty directory; `staging` is another one on the same file system.

    `lower` are the upper directories of the layers below, topmost first: directories of theirs that this layer only
    adds to keep their metadata. A hard link to a file of a lower layer is refused.
    """

    def __init__(self, target: Path, staging: Path, lower: Sequence[Path], limits: Limits) -> None:
        self._target = target
        self._staging = staging
        self._lower = [os.fsencode(path) for path in lower]
        self._limits = limits
        self._left = int(limits.unpacked_layer_bytes)
        self._numbers = 0

    def unpack(self, layer: Iterator[bytes], diff_id: Digest, going: Callable[[], bool] = lambda: True) -> None:
        """Raises BadLayer, LimitExceeded, DigestMismatch when the archive is not `diff_id`, InterruptedError.

        `going` is asked before every entry and every piece whether somebody still wants this.
        """
        stream = ByteStream(decompressed(self._watched(layer, going)))
        tree = LayerTree(new_directory(0), self._limits, Budget(self._limits))
        for entry in TarReader(stream, self._limits):
            node = tree.add(entry)
            if node is not None:
                node.chunks.append(self._store(entry))
        found = stream.finish()
        if found != diff_id:
            raise DigestMismatch(f"layer: unpacks to {found}, the config says {diff_id}")
        self._lay_out(tree.root)

    def _watched(self, layer: Iterator[bytes], going: Callable[[], bool]) -> Iterator[bytes]:
        for piece in layer:
            if not going():
                raise InterruptedError("unpacking a layer: nobody waits for it")
            yield piece

    def _store(self, entry: Entry) -> int:
        """The content of a file under a number; holes stay holes."""
        self._left -= entry.size
        if self._left < 0:
            raise LimitExceeded("layer: its files are larger than limits.unpacked_layer_bytes")
        self._numbers += 1
        with open(self._staged(self._numbers), "xb", buffering=0) as file:
            for piece in entry.pieces(_STEP):
                if isinstance(piece, int):
                    file.seek(piece, os.SEEK_CUR)
                else:
                    _write(file.fileno(), piece)
            file.truncate(entry.size)
        return self._numbers

    def _staged(self, number: int) -> Path:
        return self._staging / str(number)

    def _lay_out(self, root: Directory) -> None:
        """Every directory is finished after all that is in it, which changes its times."""
        top = os.open(self._target, _OPEN_DIRECTORY)
        stack = [(root, top, b"", False, iter(sorted(root.names.items())))]
        try:
            while stack:
                here, fd, path, is_new, rest = stack[-1]
                item = next(rest, None)
                if item is None:
                    self._finish(here, fd, path, is_new)
                    os.close(fd)
                    stack.pop()
                    continue
                name, child = item
                if isinstance(child, Node):
                    self._make(fd, name, child)
                    continue
                os.mkdir(name, 0o700, dir_fd=fd)
                inside = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
                # What the layer took away and made anew, and all in a directory that hides its past, has none.
                anew = name in here.whiteouts
                child.opaque = child.opaque or anew
                anew = anew or is_new or here.opaque
                stack.append((child, inside, path + b"/" + name, anew, iter(sorted(child.names.items()))))
        finally:
            for _, fd, _, _, _ in stack:
                os.close(fd)

    def _make(self, parent: int, name: bytes, node: Node) -> None:
        """One name of a file, which may have several: each is a link to what is staged."""
        if not node.chunks:
            self._numbers += 1
            node.chunks.append(self._numbers)
            if stat.S_ISLNK(node.mode):
                os.symlink(node.target, self._staged(self._numbers))
            else:
                os.mknod(self._staged(self._numbers), stat.S_IFMT(node.mode) | 0o600, node.rdev)
        staged = self._staged(node.chunks[0])
        if os.lstat(staged).st_nlink == 1:
            _describe(staged, node, name)
        try:
            os.link(staged, name, dst_dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            raise BadLayer(f"layer: {name!r}: more hard links than the file system allows") from None

    def _finish(self, directory: Directory, fd: int, path: bytes, is_new: bool) -> None:
        for name in directory.whiteouts - directory.names.keys():
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=fd)
        itself = b"/proc/self/fd/%d/." % fd
        if directory.opaque:
            os.setxattr(itself, _OPAQUE, b"y")
        if directory.node is not None:
            _describe(itself, directory.node, path)
        elif path:
            _describe(itself, new_directory(0) if is_new else self._described_below(path), path)

    def _described_below(self, path: bytes) -> Node:
        """Metadata of the directory in the layers below that this layer only adds to; the default if there is none."""
        for lower in self._lower:
            here, hides_others = lower, False
            for part in path.split(b"/")[1:]:
                here += b"/" + part
                try:
                    found = os.lstat(here)
                except OSError:
                    break
                if not stat.S_ISDIR(found.st_mode):  # a whiteout, or something else in the way
                    return new_directory(0)
                hides_others = hides_others or _is_opaque(here)
            else:
                return _copied(here, found)
            if hides_others:
                break
        return new_directory(0)


def _is_opaque(path: bytes) -> bool:
    try:
        return os.getxattr(path, _OPAQUE) == b"y"
    except OSError:
        return False


def _copied(path: bytes, found: os.stat_result) -> Node:
    node = new_directory(found.st_mtime_ns)
    node.mode, node.uid, node.gid = found.st_mode, found.st_uid, found.st_gid
    names = [os.fsencode(name) for name in os.listxattr(path)]
    node.xattrs = {name: os.getxattr(path, name) for name in names if not name.startswith(b"trusted.")}
    return node


def _describe(path: bytes | Path, node: Node, shown: bytes) -> None:
    """Owner before mode and capabilities, which a change of owner takes away; times last. `shown`: for errors."""
    os.chown(path, node.uid, node.gid, follow_symlinks=False)
    if not stat.S_ISLNK(node.mode):
        os.chmod(path, stat.S_IMODE(node.mode))
    for name, value in node.xattrs.items():
        try:
            os.setxattr(path, name, value, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.EINVAL:  # the value, as of capabilities
                raise BadLayer(f"layer: {shown!r}: xattr {name!r}: {error.strerror}") from None
            if error.errno != errno.ENOTSUP:
                raise
            # As containerd does.
            log.info("ignored an xattr that the file system does not know", xattr=os.fsdecode(name))
    os.utime(path, ns=(node.mtime_ns, node.mtime_ns), follow_symlinks=False)


def _write(fd: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]
