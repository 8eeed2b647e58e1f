"""Every kind of image runs, with the files it was made of, and lazily where it can be."""

import hashlib
import json
import lzma
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Image, Images, NodeMaker
from tests.harness import oci, tiny
from tests.harness.machine import Work
from tests.harness.oci import member

pytestmark = [pytest.mark.root, pytest.mark.real]

READ_ABOVE, ABOVE = "cat /data/link; ls /data", "replaced\nempty\nlink\nrandom\nsmall\n"  # of `Images.above`
READ_ALL = "md5sum /data/random /data/text /data/empty; cat /data/link; readlink /data/link"


def expected(seed: int = 1) -> str:
    """What READ_ALL prints in an image of that seed."""
    files = {"random": tiny.data(seed), "text": tiny.text(seed), "empty": b""}
    sums = "".join(f"{hashlib.md5(content).hexdigest()}  /data/{name}\n" for name, content in files.items())
    return f"{sums}small {seed}\nsmall\n"


@pytest.mark.parametrize("driver", ["file", "loop"])
def test_a_sealed_image_runs_lazily_in_mode_confidential(node: NodeMaker, images: Images, driver: str) -> None:
    image = images.sealed()
    mark = images.registry.mark()
    guest = node(mode="confidential", erofs={"driver": driver})
    reference = guest.pull(image)
    assert guest.shell(reference, READ_ALL) == expected()
    traffic = images.registry.since(mark)
    assert not traffic.by("containerd").of(set(image.layers))
    assert traffic.by("coco-snapshotter").of(set(image.layers))
    assert guest.containerd.content() == {image.digest, image.manifest["config"]["digest"]}
    [shown] = guest.daemon.status()["images"]
    assert (shown["manifest"], shown["bootstrap"], shown["mounted"]) == (image.digest, image.layers[-1], True)


def test_a_start_reads_only_what_it_needs(node: NodeMaker, images: Images) -> None:
    image = images.sealed()
    guest = node()
    reference = guest.pull(image)
    mark = images.registry.mark()
    assert guest.shell(reference, "cat /data/small") == "small 1\n"
    fetched = images.registry.since(mark).by("coco-snapshotter")
    assert fetched.size < tiny.DATA_SIZE, "the 3 MB of /data/random were not needed"


def test_a_plain_image_runs_lazily_in_mode_open(node: NodeMaker, images: Images) -> None:
    image = images.plain()
    mark = images.registry.mark()
    guest = node()
    assert guest.shell(guest.pull(image), READ_ALL) == expected()
    assert not images.registry.since(mark).by("containerd").of(set(image.layers))


def test_an_ordinary_image_runs_in_mode_open(node: NodeMaker, images: Images) -> None:
    guest = node()
    assert guest.shell(guest.pull(images.ordinary()), READ_ALL) == expected()
    assert not guest.daemon.status()["images"]


def test_all_kinds_side_by_side_and_containers_that_write(node: NodeMaker, images: Images) -> None:
    guest = node()
    script = "echo changed >/data/small; rm /data/text; mkdir /new; " + "cat /data/small; ls /data"
    for image in (images.sealed(), images.plain(), images.ordinary()):
        reference = guest.pull(image)
        assert guest.shell(reference, script) == "changed\nempty\nlink\nrandom\nsmall\n"
        assert guest.shell(reference, READ_ALL) == expected(), "a container changed its image"


def test_images_that_share_layers(node: NodeMaker, images: Images) -> None:
    """busybox is a layer of both; each image still shows its own data, before and after the other is gone."""
    guest = node()
    for pair in ([images.ordinary(1), images.ordinary(2)], [images.plain(1), images.plain(2)]):
        assert pair[0].layers[0] == pair[1].layers[0]
        first, second = (guest.pull(image) for image in pair)
        assert guest.shell(first, READ_ALL) == expected(1)
        assert guest.shell(second, READ_ALL) == expected(2)
        guest.containerd.remove_image(first)
        assert guest.shell(second, READ_ALL) == expected(2)


def test_images_of_one_domain_share_fetched_chunks(node: NodeMaker, images: Images) -> None:
    secret = images.work.path / "convergence"
    secret.write_bytes(b"s" * 32)
    options = ("--domain", "tenant", "--convergence-secret", secret)
    first, second = (images.sealed(seed, *options, label="tenant") for seed in (1, 2))
    assert first.layers[0] == second.layers[0], "equal files of one domain are equal blobs"
    guest = node()
    guest.shell(guest.pull(first), "md5sum /bin/busybox")
    reference = guest.pull(second)
    mark = images.registry.mark()
    assert guest.shell(reference, READ_ALL) == expected(2)
    assert not images.registry.since(mark).of({first.layers[0]}), "busybox was fetched a second time"


def test_ordinary_layers_on_a_sealed_base(node: NodeMaker, images: Images) -> None:
    guest = node()
    reference = guest.pull(images.above(images.sealed()))
    assert guest.shell(reference, READ_ABOVE) == ABOVE
    assert guest.shell(guest.pull(images.sealed()), READ_ALL) == expected()


# images made by other tools


def foreign_image(images: Images, work: Work, fixture: Path, name: str) -> Image:
    """Push a bootstrap and its blobs, as another tool wrote them, the way that tool's image would list them."""
    source = work.directory(name)
    oci.unpack(fixture, source)
    [top] = [path.parent for path in source.rglob("boot")]
    layout = oci.Layout(work.path / f"{name}.oci")
    boot = (top / "boot").read_bytes()
    bootstrap = layout.add_members([(member("image/"), b""), (member("image/image.boot"), boot)])
    blobs = [path.read_bytes() for path in sorted((top / "blobs").iterdir())]
    layers, diff_ids = [], []
    for content in blobs:
        digest = images.registry.put_blob("t/foreign", content)
        layers.append({
            "mediaType": "application/vnd.oci.image.layer.nydus.blob.v1", "digest": digest, "size": len(content),
            "annotations": {"containerd.io/snapshot/nydus-blob": "true"},
        })  # fmt: skip
        diff_ids.append(digest)
    images.registry.put_blob("t/foreign", layout.blob(bootstrap.digest))
    marks = {"containerd.io/snapshot/nydus-bootstrap": "true", "containerd.io/snapshot/nydus-fs-version": "6"}
    layers.append({**bootstrap.descriptor, "annotations": marks})
    config = {
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/none"]},
        "rootfs": {"type": "layers", "diff_ids": [*diff_ids, bootstrap.diff_id]},
    }  # fmt: skip
    content = json.dumps(config).encode()
    stored = {
        "mediaType": oci.MEDIA_CONFIG,
        "digest": images.registry.put_blob("t/foreign", content),
        "size": len(content),
    }
    manifest = {"schemaVersion": 2, "mediaType": oci.MEDIA_MANIFEST, "config": stored, "layers": layers}
    digest = images.registry.put_manifest("t/foreign", name, json.dumps(manifest).encode(), oci.MEDIA_MANIFEST)
    return Image(images.registry, "t/foreign", name, digest)


def tree(top: Path) -> dict[str, dict[str, Any]]:
    """All entries of a mounted image in the words of the reference listings."""
    found = {}
    raw_top = os.fsencode(top)
    for here, directories, files in os.walk(raw_top):
        for path in [here] if here == raw_top else []:
            found["/"] = entry(path)
        for name in [*directories, *files]:
            path = os.path.join(here, name)
            found[os.fsdecode(path[len(raw_top) :])] = entry(path)
    return found


def entry(path: bytes) -> dict[str, Any]:
    status = os.lstat(path)
    shown: dict[str, Any] = {
        "mode": stat.S_IMODE(status.st_mode), "uid": status.st_uid, "gid": status.st_gid,
        "mtime_ns": status.st_mtime_ns,
    }  # fmt: skip
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            shown["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    elif stat.S_ISLNK(status.st_mode):
        shown["target"] = os.fsdecode(os.readlink(path))
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        shown["rdev"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
    if not stat.S_ISDIR(status.st_mode):
        shown["nlink"] = status.st_nlink
    names = os.listxattr(path, follow_symlinks=False)
    if xattrs := {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names}:
        shown["xattrs"] = xattrs
    return shown


@pytest.mark.peer
@pytest.mark.parametrize("name", ["v6-zstd", "v6-lz4-sha256-64k", "v6-none-4k"])
def test_images_of_other_tools_show_exactly_their_source_tree(
    node: NodeMaker, images: Images, work: Work, fixtures_dir: Path, name: str
) -> None:
    made = fixtures_dir / "nydus-made"
    guest = node()
    guest.pull(foreign_image(images, work, made / f"{name}.tar.xz", name))
    [top] = guest.containerd.snapshots().keys() - {parent for parent, _ in guest.containerd.snapshots().values()}
    with guest.containerd.view(top, work.directory("view")) as target:
        seen = tree(target)
    truth = json.loads(lzma.decompress((made / "truth/A-full.json.xz").read_bytes()))
    keys = {"mode", "uid", "gid", "mtime_ns", "sha256", "target", "rdev", "nlink", "xattrs"}
    expected_tree = {item["path"]: {key: value for key, value in item.items() if key in keys} for item in truth}
    # That tool writes no mtime of the root directory.
    del seen["/"]["mtime_ns"], expected_tree["/"]["mtime_ns"]
    assert seen.keys() == expected_tree.keys()
    assert {path: (seen[path], item) for path, item in expected_tree.items() if seen[path] != item} == {}
