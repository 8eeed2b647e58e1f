"""Source layers, bottom first, into one merged tree, and which chunks each layer brings."""

from array import array
from collections.abc import Iterator

from snapshotter.build.chunker import Chunker, ChunkStore
from snapshotter.build.merge import merge
from snapshotter.build.stream import ByteStream, decompressed
from snapshotter.build.tar import TarReader
from snapshotter.build.tree import Budget, LayerTree, files, new_directory
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import DigestMismatch
from snapshotter.formats.rafs6_write import Node


class LayerStack:
    """Takes layers one by one. `root` is what an overlay mount of those taken so far would show.

    `orders[i]` are the chunks that layer i brings: those of its files in directory order that no lower layer brought,
    each once. A file that an upper layer hides still counts, so the same base layers give the same blobs in any image.
    """

    def __init__(self, store: ChunkStore, chunker: Chunker, mtime_ns: int, limits: Limits) -> None:
        self.root: Node = new_directory(mtime_ns)
        self.orders: list[array[int]] = []
        self._store = store
        self._chunker = chunker
        self._mtime_ns = mtime_ns
        self._limits = limits
        self._budget = Budget(limits)
        self._assigned = bytearray()  # by chunk number

    def take(self, compressed: Iterator[bytes], diff_id: Digest) -> int:
        """Read a layer to its end; the number of its entries. Raises BadLayer, LimitExceeded, DigestMismatch."""
        stream = ByteStream(decompressed(compressed))
        tree = LayerTree(self.root, self._limits, self._budget)
        for entry in TarReader(stream, self._limits):
            node = tree.add(entry)
            if node is not None:
                node.chunks = self._chunker.cut(entry)
        found = stream.finish()
        for _ in compressed:  # its source checks the layer's own digest behind the last byte
            pass
        if found != diff_id:
            raise DigestMismatch(f"layer: unpacks to {found}, the config says {diff_id}")
        self._chunker.finish()
        self.orders.append(self._bring(tree))
        merge(self.root, tree.root, self._mtime_ns)
        return tree.entries

    def _bring(self, tree: LayerTree) -> "array[int]":
        order = array("Q")
        self._assigned.extend(bytes(len(self._store) - len(self._assigned)))
        for node in files(tree.root):
            for number in node.chunks:
                if not self._assigned[number]:
                    self._assigned[number] = 1
                    order.append(number)
        return order


def every_node(root: Node) -> Iterator[Node]:
    """Each node of a merged tree once, hard links too."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node.children is not None:
            stack.extend(node.children.values())
        elif id(node) in seen:
            continue
        else:
            seen.add(id(node))
        yield node
