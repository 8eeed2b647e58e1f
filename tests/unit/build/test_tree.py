import stat
from array import array

import pytest

from snapshotter.build.layers import every_node
from snapshotter.build.merge import merge
from snapshotter.build.stream import ByteStream
from snapshotter.build.tar import TarReader
from snapshotter.build.tree import Budget, LayerTree, files, new_directory
from snapshotter.config import Limits
from snapshotter.errors import BadLayer, LimitExceeded
from snapshotter.formats.rafs6_write import Node
from tests.unit.build.tars import END, header, member, pax, pieces

LIMITS = Limits()
MTIME = 5


def directory(name: bytes, **fields: object) -> bytes:
    return header(name, b"5", mode=fields.pop("mode", 0o755), **fields)  # type: ignore[arg-type]


def link(name: bytes, target: bytes, **fields: object) -> bytes:
    return header(name, b"1", target=target, **fields)  # type: ignore[arg-type]


def xattr(name: bytes, value: bytes) -> bytes:
    return pax({b"SCHILY.xattr." + name: value})


def symlink(name: bytes, target: bytes) -> bytes:
    return header(name, b"2", target=target)


def stack(*layers: bytes, limits: Limits = LIMITS) -> Node:
    root, budget = new_directory(MTIME), Budget(limits)
    for data in layers:
        tree = LayerTree(root, limits, budget)
        for entry in TarReader(ByteStream(pieces(data + END)), limits):
            node = tree.add(entry)
            if node is not None:
                node.chunks = array("Q", b"".join(bytes(8) for _ in entry.pieces(4096)))
        merge(root, tree.root, MTIME)
    return root


def paths(root: Node) -> list[str]:
    """All paths, directories with a slash behind."""
    found = []
    pending = [("", root)]
    while pending:
        prefix, node = pending.pop()
        for name, child in (node.children or {}).items():
            directory = child.children is not None
            found.append(f"{prefix}{name.decode()}{'/' if directory else ''}")
            if directory:
                pending.append((found[-1], child))
    return sorted(found)


def at(root: Node, path: bytes) -> Node:
    node = root
    for name in path.split(b"/"):
        assert node.children is not None
        node = node.children[name]
    return node


# names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"./a", ["a"]),
        (b"/etc/passwd", ["etc/", "etc/passwd"]),
        (b"../../etc/passwd", ["etc/", "etc/passwd"]),
        (b"a/../b", ["b"]),
        (b"a//b/./c", ["a/", "a/b/", "a/b/c"]),
        (b"..", []),
        (b"./", []),
    ],
)
def test_names_are_rooted(name: bytes, expected: list[str]) -> None:
    assert paths(stack(member(name))) == expected


def test_paths_and_names_have_the_limits_of_linux() -> None:
    assert len(paths(stack(pax({b"path": b"n" * 255}) + member(b"x")))) == 1
    for name in (b"n" * 256, b"a/" * 2048 + b"b"):
        with pytest.raises(BadLayer):
            stack(pax({b"path": name}) + member(b"x"))


def test_depth_and_count_are_limited() -> None:
    with pytest.raises(LimitExceeded):
        stack(pax({b"path": b"a/" * 50 + b"b"}) + member(b"x"), limits=Limits(directory_depth=40))
    with pytest.raises(LimitExceeded):
        stack(member(b"a") + member(b"b"), member(b"c"), limits=Limits(inodes=2))
    with pytest.raises(LimitExceeded):
        stack(member(b"a/b/c/d"), limits=Limits(inodes=3))
    with pytest.raises(LimitExceeded):
        stack((xattr(b"user.a", b"x" * 600) + member(b"f")) * 3, limits=Limits(bootstrap_unpacked_bytes=1500))


def test_the_deepest_path_works() -> None:
    assert len(paths(stack(pax({b"path": b"a/" * 1000 + b"b"}) + member(b"x")))) == 1001


def test_symlinks_in_a_path_stay_inside_the_layer() -> None:
    layer = symlink(b"lib", b"usr/lib") + member(b"lib/a") + symlink(b"up", b"../../..") + member(b"up/etc/x")
    layer += symlink(b"abs", b"/opt") + member(b"abs/y")
    assert paths(stack(layer)) == [
        "abs",
        "etc/",
        "etc/x",
        "lib",
        "opt/",
        "opt/y",
        "up",
        "usr/",
        "usr/lib/",
        "usr/lib/a",
    ]


def test_symlinks_of_lower_layers_are_replaced_not_followed() -> None:
    assert paths(stack(symlink(b"lib", b"usr/lib"), member(b"lib/a"))) == ["lib/", "lib/a"]


def test_symlink_loops_are_refused() -> None:
    with pytest.raises(BadLayer, match="symlinks"):
        stack(symlink(b"a", b"b") + symlink(b"b", b"a") + member(b"a/x"))


@pytest.mark.parametrize("target", [b"", b"t" * 4096])
def test_impossible_symlinks_are_refused(target: bytes) -> None:
    with pytest.raises(BadLayer, match="symlink"):
        stack(pax({b"linkpath": target}) + symlink(b"a", b""))


def test_an_entry_under_a_file_is_refused_in_one_layer_and_replaces_it_across_layers() -> None:
    with pytest.raises(BadLayer, match="not a directory"):
        stack(member(b"f") + member(b"f/x"))
    assert paths(stack(member(b"f"), member(b"f/x"))) == ["f/", "f/x"]


# one layer


def test_the_last_entry_of_a_name_wins() -> None:
    root = stack(member(b"f", mode=0o600) + member(b"f", mode=0o644))
    assert stat.S_IMODE(at(root, b"f").mode) == 0o644
    assert paths(stack(member(b"d/x") + member(b"d"))) == ["d"]
    assert paths(stack(member(b"d") + directory(b"d") + member(b"d/x"))) == ["d/", "d/x"]
    assert paths(stack(member(b"d/x") + directory(b"d", mode=0o700))) == ["d/", "d/x"]


def test_hard_links_share_a_node() -> None:
    root = stack(member(b"a") + link(b"d/b", b"a") + link(b"c", b"./d/../d/b"))
    assert at(root, b"a") is at(root, b"d/b") is at(root, b"c")
    assert len(list(every_node(root))) == 3


def test_a_hard_link_leaves_a_symlink_where_it_leads() -> None:
    layer = member(b"usr/lib/a") + member(b"h/a") + symlink(b"lib", b"usr/lib")
    assert at(stack(layer + link(b"b", b"lib/../../h/a")), b"b") is not None
    with pytest.raises(BadLayer, match="hard link"):
        stack(layer + link(b"b", b"lib/../h/a"))


def test_hard_links_to_symlinks_and_devices_share_a_node() -> None:
    root = stack(symlink(b"s", b"x") + link(b"t", b"s") + header(b"n", b"3", device=(1, 3)) + link(b"m", b"n"))
    assert at(root, b"s") is at(root, b"t")
    assert at(root, b"n") is at(root, b"m")


def test_a_link_entry_describes_the_inode_again() -> None:
    root = stack(member(b"a", uid=1, mode=0o600) + link(b"b", b"a", uid=7, mode=0o640))
    assert (at(root, b"a").uid, stat.S_IMODE(at(root, b"a").mode)) == (7, 0o640)


@pytest.mark.parametrize(
    "layer",
    [
        link(b"b", b"a"),
        link(b"b", b"a") + member(b"a"),
        directory(b"d") + link(b"b", b"d"),
        link(b"b", b"/"),
        link(b"b", b""),
    ],
    ids=["missing", "later", "directory", "root", "empty"],
)
def test_hard_links_to_nothing_are_refused(layer: bytes) -> None:
    with pytest.raises(BadLayer, match="hard link"):
        stack(layer)


def test_implied_directories_have_fixed_metadata() -> None:
    node = at(stack(member(b"a/b")), b"a")
    assert (node.mode, node.uid, node.gid, node.mtime_ns) == (stat.S_IFDIR | 0o755, 0, 0, MTIME)


def test_devices_and_fifos() -> None:
    root = stack(header(b"null", b"3", device=(1, 3)) + header(b"sda", b"4", device=(8, 0)) + header(b"p", b"6"))
    assert stat.S_ISCHR(at(root, b"null").mode)
    assert at(root, b"sda").rdev == 0x800
    assert stat.S_ISFIFO(at(root, b"p").mode)


def test_only_extended_attributes_that_could_be_set_are_kept() -> None:
    acl = b"\2\0\0\0" + bytes(8)
    names = {
        b"user.a": b"1",
        b"security.capability": b"cap",
        b"trusted.overlay.opaque": b"y",
        b"trusted.x": b"1",
        b"lustre.x": b"1",
        b"nonsense": b"1",
        b"system.posix_acl_access": acl,
        b"system.posix_acl_default": acl,
    }
    records = pax({b"SCHILY.xattr." + name: value for name, value in names.items()})
    root = stack(records + member(b"f") + records + directory(b"d") + records + symlink(b"s", b"x"))
    common = {b"user.a": b"1", b"security.capability": b"cap", b"system.posix_acl_access": acl}
    assert at(root, b"f").xattrs == common
    assert at(root, b"d").xattrs == common | {b"system.posix_acl_default": acl}
    assert at(root, b"s").xattrs == {b"security.capability": b"cap"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"user.", b"1"),
        (b"user." + b"n" * 251, b"1"),
        (b"user.a", b"x" * 65536),
        (b"system.posix_acl_access", b"nonsense"),
    ],
)
def test_impossible_extended_attributes_are_refused(name: bytes, value: bytes) -> None:
    with pytest.raises(BadLayer):
        stack(pax({b"SCHILY.xattr." + name: value}) + member(b"f"))


# layers


BASE = directory(b"d", mode=0o700, mtime=9) + member(b"d/a") + member(b"d/b") + member(b"e/x") + member(b"f")


@pytest.mark.parametrize(
    ("upper", "expected"),
    [
        (member(b".wh.f"), ["d/", "d/a", "d/b", "e/", "e/x"]),
        (member(b"d/.wh.a"), ["d/", "d/b", "e/", "e/x", "f"]),
        (member(b".wh.d"), ["e/", "e/x", "f"]),
        (member(b".wh.d") + member(b"d/new"), ["d/", "d/new", "e/", "e/x", "f"]),
        (member(b"d/new") + member(b".wh.d"), ["d/", "d/new", "e/", "e/x", "f"]),
        (member(b"d/.wh..wh..opq") + member(b"d/a2"), ["d/", "d/a2", "e/", "e/x", "f"]),
        (member(b"d/a2") + member(b"d/.wh..wh..opq"), ["d/", "d/a2", "e/", "e/x", "f"]),
        (member(b".wh..wh..opq") + member(b"only"), ["only"]),
        (member(b"f") + member(b".wh.f"), ["d/", "d/a", "d/b", "e/", "e/x", "f"]),
        (member(b".wh.missing"), ["d/", "d/a", "d/b", "e/", "e/x", "f"]),
        (header(b"f", b"3"), ["d/", "d/a", "d/b", "e/", "e/x"]),
        (header(b"f", b"3") + member(b"f"), ["d/", "d/a", "d/b", "e/", "e/x", "f"]),
        (member(b"d"), ["d", "e/", "e/x", "f"]),
        (directory(b"f"), ["d/", "d/a", "d/b", "e/", "e/x", "f/"]),
        (member(b".wh..wh.plnk/1.2") + member(b".wh..wh.aufs"), ["d/", "d/a", "d/b", "e/", "e/x", "f"]),
        (member(b"new/.wh.x"), ["d/", "d/a", "d/b", "e/", "e/x", "f", "new/"]),
    ],
)
def test_whiteouts_and_type_changes(upper: bytes, expected: list[str]) -> None:
    assert paths(stack(BASE, upper)) == expected


@pytest.mark.parametrize("name", [b".wh.", b".wh..", b".wh...", b".wh.x/y"])
def test_impossible_whiteouts_are_refused(name: bytes) -> None:
    with pytest.raises(BadLayer, match="whiteout"):
        stack(member(name))


def test_directory_metadata_comes_from_the_highest_layer_with_an_entry() -> None:
    assert stat.S_IMODE(at(stack(BASE, member(b"d/new")), b"d").mode) == 0o700
    assert at(stack(BASE, member(b"d/new")), b"d").mtime_ns == 9 * 10**9
    assert stat.S_IMODE(at(stack(BASE, directory(b"d", mode=0o711)), b"d").mode) == 0o711
    assert stat.S_IMODE(at(stack(BASE, member(b".wh.d") + member(b"d/new")), b"d").mode) == 0o755


def test_the_root_has_the_metadata_of_its_entry() -> None:
    assert stat.S_IMODE(stack(directory(b"./", mode=0o711), member(b"x")).mode) == 0o711
    assert stat.S_IMODE(stack(member(b"x")).mode) == 0o755


def test_a_hard_link_to_a_lower_layer_copies_up() -> None:
    base = member(b"a", b"x" * 10, uid=3) + link(b"b", b"a", uid=3)
    root = stack(base, link(b"c", b"a", uid=3))
    assert at(root, b"a") is at(root, b"c")
    assert at(root, b"b") is not at(root, b"a"), "other names of the lower inode stay with it"
    assert (at(root, b"c").size, at(root, b"c").uid) == (10, 3)


def test_a_hard_link_to_what_the_layer_hides_is_refused() -> None:
    for hiding in (member(b".wh.a"), member(b".wh..wh..opq")):
        with pytest.raises(BadLayer, match="hard link"):
            stack(member(b"a"), hiding + link(b"b", b"a"))


def test_directory_order_is_by_name_with_directories_where_they_fall() -> None:
    root = new_directory(0)
    tree = LayerTree(root, LIMITS, Budget(LIMITS))
    data = member(b"c", b"3") + member(b"b/z", b"22") + member(b"a-", b"1") + member(b"b/a", b"4444") + END
    for entry in TarReader(ByteStream(pieces(data)), LIMITS):
        tree.add(entry)
    assert [node.size for node in files(tree.root)] == [1, 4, 2, 1]
