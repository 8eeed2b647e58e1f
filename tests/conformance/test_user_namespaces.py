"""Labels of user namespaces: what a client that maps ids itself gets, and what one gets that has changed the owners."""

import os
from pathlib import Path

import grpc
import pytest

from snapshotter.labels import GID_MAPPING, SNAPSHOT_REF, UID_MAPPING
from snapshotter.snapshots.model import Mount
from tests.conformance.client import Client
from tests.conformance.layers import mounted
from tests.conformance.test_service import provide, refusal

pytestmark = pytest.mark.root

IDS = {UID_MAPPING: "0:100000:65536", GID_MAPPING: "0:200000:65536"}
OPTIONS = ("uidmap=0:100000:65536", "gidmap=0:200000:65536")


def upper(mount: Mount) -> Path:
    return Path(next(option for option in mount.options if option.startswith("upperdir="))[9:])


def owner(path: Path) -> tuple[int, int]:
    return path.stat().st_uid, path.stat().st_gid


def unpack(sn: Client, name: str, labels: dict[str, str]) -> None:
    sn.prepare("key", labels=labels)
    sn.commit(name, "key", labels)


def test_a_container_on_a_lazy_image(sn: Client) -> None:
    top = provide(sn, "sha256:1", verdict="image")
    (mount,) = sn.prepare("container", top, IDS)
    assert mount.kind == "overlay"
    assert mount.options[:2] == OPTIONS
    assert owner(upper(mount)) == (100005, 200006), "the image's root directory belongs to 5:6"
    assert sn.mounts("container") == [mount]
    (look,) = sn.view("look", top, IDS)
    assert (look.kind, look.options) == ("bind", (*OPTIONS, "ro", "rbind"))


def test_a_container_on_ordinary_layers(sn: Client) -> None:
    unpack(sn, "sha256:1", {SNAPSHOT_REF: "sha256:1"})
    (mount,) = sn.prepare("container", "sha256:1", IDS)
    assert mount.options[:2] == OPTIONS
    assert owner(upper(mount)) == (100000, 200000)


def test_no_parent(sn: Client) -> None:
    (mount,) = sn.prepare("container", labels=IDS)
    assert (mount.kind, mount.options) == ("bind", (*OPTIONS, "rw", "rbind"))
    assert owner(Path(mount.source)) == (100000, 200000)


def test_several_ranges_and_an_owner_that_none_of_them_has(sn: Client, tmp_path: Path) -> None:
    labels = {UID_MAPPING: "1000:500:10,0:100000:1000", GID_MAPPING: "0:7:4294967288"}
    for name, uid, expected in (("a", 1003, 503), ("b", 5000, 100000)):
        sn.prepare(name)
        with mounted(sn.mounts(name), tmp_path) as top:
            os.chown(top, uid, 0)
        sn.commit(f"base-{name}", name, {SNAPSHOT_REF: name})
        (mount,) = sn.prepare(f"container-{name}", f"base-{name}", labels)
        assert owner(upper(mount)) == (expected, 7)


def test_a_client_that_has_changed_the_owners_itself(sn: Client, tmp_path: Path) -> None:
    """Without the capability it commits a copy with other owners, and then sends the labels all the same."""
    top = provide(sn, "sha256:1", verdict="image")
    with mounted(sn.prepare("copy-remap", top), tmp_path) as root:
        os.chown(root, 100000, 200000)
    sn.commit("copy", "copy-remap")
    (mount,) = sn.prepare("container", "copy", IDS)
    assert not [option for option in mount.options if "map=" in option]
    assert owner(upper(mount)) == (100000, 200000)
    assert sn.mounts("container") == [mount]


def test_an_image_cannot_map_ids_of_its_layers(sn: Client) -> None:
    """Annotations of layers come as labels when they are unpacked; newer clients leave these out."""
    (mount,) = sn.prepare("extract", labels={SNAPSHOT_REF: "sha256:1", **IDS})
    assert mount.options == ("rw", "rbind")
    assert owner(Path(mount.source)) == (0, 0)
    sn.commit("layer", "extract", {SNAPSHOT_REF: "sha256:1", **IDS})
    (mount,) = sn.prepare("container", "layer")
    assert not [option for option in mount.options if "map=" in option]


@pytest.mark.parametrize(
    "labels",
    [
        {UID_MAPPING: "0:100000:65536"},
        {UID_MAPPING: "0:100000:65536", GID_MAPPING: ""},
        *(
            {UID_MAPPING: text, GID_MAPPING: "0:0:1"}
            for text in (
                "0", "0:1", "0:1:", "0:1:0", "a:b:c", "-1:0:9", "0:1:2:3", "0:1:1,", ",0:1:1", "0:1:1 ", "٠:1:1",
                "1:100000:65536", "0:4294967295:1", "0:4294967000:300", "0:0:4294967296", "0:0:99999999999",
            )
        ),
    ],
)  # fmt: skip
def test_mappings_of_no_meaning(sn: Client, labels: dict[str, str]) -> None:
    top = provide(sn, "sha256:1", verdict="image")
    for call in (sn.prepare, sn.view):
        code, message, _ = refusal(call, "container", top, labels)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "mapping" in message
    assert sn.names() == {top}
