"""Layers into one tree: what an overlay mount of them would show."""

from snapshotter.build.tree import Directory, new_directory
from snapshotter.formats.rafs6_write import Node


def merge(lower: Node, layer: Directory, mtime_ns: int) -> None:
    """Put a layer on top of the merged tree `lower`, in place. `mtime_ns`: of directories that no layer describes."""
    stack = [(lower, layer)]
    while stack:
        target, source = stack.pop()
        if source.node is not None:
            _describe(target, source.node)
        names = target.children
        assert names is not None
        if source.opaque:
            names.clear()
        for name in source.whiteouts:
            names.pop(name, None)
        for name, child in source.names.items():
            if not isinstance(child, Directory):
                names[name] = child
                continue
            below = names.get(name)
            if below is None or below.children is None:
                below = names[name] = new_directory(mtime_ns)
            stack.append((below, child))


def _describe(target: Node, source: Node) -> None:
    target.mode, target.uid, target.gid = source.mode, source.uid, source.gid
    target.mtime_ns, target.xattrs = source.mtime_ns, source.xattrs
