"""Ordinary images whose layers the real skopeo has encrypted as a whole: pulled, verified, unpacked, run."""

import gzip
import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.e2e.conftest import Image, Images, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.e2e.test_refusals import refused
from tests.harness import oci, serve, tiny
from tests.harness.containerd import Containerd
from tests.harness.machine import Work

pytestmark = [pytest.mark.root, pytest.mark.real]

PACKINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("application/vnd.oci.image.layer.v1.tar+gzip", lambda tar: gzip.compress(tar, mtime=0)),
    "zstd": ("application/vnd.oci.image.layer.v1.tar+zstd", zstandard.ZstdCompressor().compress),
    "tar": ("application/vnd.oci.image.layer.v1.tar", lambda tar: tar),
}


def skopeo(*arguments: str | Path) -> None:
    command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)


def source(work: Work, packing: str) -> Path:
    """The small image, with layers of this compression, and a third one that deletes and adds."""
    whiteout, more = oci.member("data/.wh.text"), oci.member("data/more")
    third = [(oci.member("data/"), b""), (whiteout, b""), (more, b"more\n")]
    gzipped = tiny.layout(work.path / "gzip", extra=[third])
    media_type, pack = PACKINGS[packing]
    layout = oci.Layout(work.path / "source")
    layers = []
    for layer in gzipped.layers("tiny"):
        packed = layout.add_blob(pack(gzip.decompress(gzipped.blob(layer.digest))), media_type)
        layers.append(oci.Layer(packed, layer.diff_id))
    layout.add_image("tiny", layers, {"Env": [oci.PATH_ENV], "Cmd": ["/bin/sh"]})
    return layout.path


def encrypted(images: Images, work: Work, packing: str, *options: str | Path) -> Image:
    encrypting = options or ("--encryption-key", f"jwe:{images.public}")
    accept = "--dest-oci-accept-uncompressed-layers"
    skopeo(*encrypting, accept, f"oci:{source(work, packing)}:tiny", f"oci:{work.path}/encrypted:tiny")
    skopeo(
        f"oci:{work.path}/encrypted:tiny", f"docker://{images.registry.address}/{images.repository}:skopeo-{packing}"
    )
    content, _ = images.registry.get_manifest(images.repository, f"skopeo-{packing}")
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    image = Image(images.registry, images.repository, f"skopeo-{packing}", digest)
    kinds = {layer["mediaType"] for layer in image.manifest["layers"]}
    assert kinds == {PACKINGS[packing][0] + "+encrypted"}
    return image


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_image_that_skopeo_encrypted_runs(node: NodeMaker, images: Images, work: Work, packing: str) -> None:
    image = encrypted(images, work, packing)
    guest = node(mode="confidential" if packing == "gzip" else "open")
    mark = images.registry.mark()
    reference = guest.pull(image)
    fetched = images.registry.since(mark)
    assert not fetched.by("containerd").of(set(image.layers)), "containerd has no use for them"
    assert {request.digest for request in fetched.by("coco-snapshotter").of(set(image.layers))} == set(image.layers)
    script = "cd /data; cat small more; readlink link; ls; md5sum random"
    sums = hashlib.md5(tiny.data()).hexdigest()
    seen = guest.shell(reference, script)
    assert seen == f"small 1\nmore\nsmall\nempty\nlink\nmore\nrandom\nsmall\n{sums}  random\n"
    assert guest.shell(reference, "echo x >/data/small; rm /data/more; ls /data") == "empty\nlink\nrandom\nsmall\n"
    sizes = {name: kind for name, (_, kind) in guest.containerd.snapshots().items()}
    assert list(sizes.values()).count("Committed") == 3
    # Again, in another namespace: nothing is fetched a second time; and it survives a restart without the registry.
    mark = images.registry.mark()
    other = Containerd(work, "other", plugins={"coco": guest.daemon.address})
    other.cri.pull(reference)
    assert not images.registry.since(mark).of(set(image.layers))
    assert guest.daemon.terminate() == 0
    guest.daemon.start()
    guest.containerd.wait_connected()
    assert guest.shell(reference, "cat /data/more") == "more\n"
    for daemon in (guest.containerd, other):
        daemon.remove_image(reference)
        daemon.wait_for_no_snapshots()


def test_without_the_key_it_is_refused_and_nothing_is_left(node: NodeMaker, images: Images, work: Work) -> None:
    image = encrypted(images, work, "gzip")
    guest = node(mode="confidential", key=images.other_key)
    assert refused(guest, image) == "no-key"
    assert guest.is_empty()
    assert not [path for path in (guest.daemon.root / "snapshots").iterdir() if path.name.startswith("unpack")]


def test_what_was_changed_is_refused_before_a_byte_is_unpacked(node: NodeMaker, images: Images, work: Work) -> None:
    image = encrypted(images, work, "gzip")

    def other_mac(manifest: dict[str, Any]) -> None:
        """The registry has changed a bit of the layer and fitted its digest."""
        layer = manifest["layers"][1]
        content = bytearray(images.registry.get_blob(images.repository, layer["digest"]))
        content[len(content) // 2] ^= 1
        layer |= {"digest": images.registry.put_blob(images.repository, bytes(content)), "size": len(content)}

    def other_diff_id(config: dict[str, Any]) -> None:
        config["rootfs"]["diff_ids"][1] = "sha256:" + "0" * 64

    def exchanged(manifest: dict[str, Any]) -> None:
        manifest["layers"][1:] = reversed(manifest["layers"][1:])

    guest = node()
    cases = [
        (image.variant("mac", other_mac), "layer-hmac"),
        (image.variant("diff-id", None, other_diff_id), "digest-mismatch"),
        (image.variant("exchanged", exchanged), "digest-mismatch"),
    ]
    for changed, reason in cases:
        assert refused(guest, changed) == reason
    assert guest.shell(guest.pull(image), "cat /data/small /data/more") == "small 1\nmore\n"


def test_a_partly_encrypted_image(node: NodeMaker, images: Images, work: Work) -> None:
    """skopeo encrypts single layers on request: the others are containerd's, in mode open only."""
    plain = tiny.layout(work.path / "plain").path
    skopeo(
        "--encryption-key", f"jwe:{images.public}", "--encrypt-layer", "1", f"oci:{plain}:tiny",
        f"docker://{images.registry.address}/{images.repository}:partly",
    )  # fmt: skip
    content, _ = images.registry.get_manifest(images.repository, "partly")
    image = Image(images.registry, images.repository, "partly", "sha256:" + hashlib.sha256(content).hexdigest())
    guest = node()
    assert guest.shell(guest.pull(image), READ_ALL) == expected()
    confidential = node(name="confidential", mode="confidential")
    assert refused(confidential, image) == "not-sealed"


def test_check_and_inspect(images: Images, work: Work) -> None:
    image = encrypted(images, work, "zstd")
    where = f"docker://{image.by_digest}"
    shown = json.loads(serve.program(work, "inspect", where, "--json").stdout)
    assert shown["kind"] == "encrypted layers"
    checked = serve.program(work, "check", where, "--key", images.key)
    assert checked.returncode == 0, checked.stderr
    assert "3 layers, encrypted as a whole" in checked.stdout
    assert serve.program(work, "check", where, "--key", images.other_key).returncode == 11
