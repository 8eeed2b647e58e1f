"""A start trace: paths in order of first use, and the chunks a start will ask for."""

import stat
from array import array
from collections.abc import Sequence
from pathlib import Path

from snapshotter.build.tree import split
from snapshotter.errors import BadLayer, InvalidArgument
from snapshotter.formats.rafs6_write import Node

_FOLLOW = 40
_MAX_BYTES = 64 << 20


def load(path: Path) -> list[bytes]:
    """One path a line; empty lines are skipped. Raises InvalidArgument."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InvalidArgument(f"trace {path}: {error.strerror}") from error
    if len(text) > _MAX_BYTES:
        raise InvalidArgument(f"trace {path}: larger than {_MAX_BYTES} bytes")
    return [line for line in text.split(b"\n") if line.strip()]


def traced_files(root: Node, paths: Sequence[bytes]) -> list[Node]:
    """The regular files of these paths, symlinks followed, each once. Paths that lead nowhere are skipped."""
    found: dict[int, Node] = {}
    for path in paths:
        node = _lookup(root, path)
        if node is not None and stat.S_ISREG(node.mode):
            found.setdefault(id(node), node)
    return list(found.values())


def start_chunks(files: list[Node]) -> "array[int]":
    """Numbers of their chunks in order, each once."""
    return array("Q", dict.fromkeys(number for node in files for number in node.chunks))


def _lookup(root: Node, path: bytes) -> Node | None:
    stack = [root]
    try:
        todo = split(path)[::-1]
    except BadLayer:  # no name that a file could have
        return None
    followed = 0
    while todo:
        part = todo.pop()
        if part == b"..":
            stack = stack[:-1] or [root]
            continue
        children = stack[-1].children
        child = children.get(part) if children is not None else None
        if child is None:
            return None
        if not stat.S_ISLNK(child.mode):
            stack.append(child)
            continue
        followed += 1
        if followed > _FOLLOW:
            return None
        if child.target.startswith(b"/"):
            stack = [root]
        todo += [name for name in reversed(child.target.split(b"/")) if name not in (b"", b".")]
    return stack[-1]
