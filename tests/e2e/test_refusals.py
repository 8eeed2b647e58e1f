"""What must not run is refused with its reason in containerd's error, and leaves nothing behind."""

import re
from typing import Any

import grpc
import pytest

from tests.e2e.conftest import Image, Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness import serve, tiny
from tests.harness.machine import Work, until

pytestmark = [pytest.mark.root, pytest.mark.real]


def refused(guest: Node, image: Image, by: str = "digest") -> str:
    """Pull what must be refused; the reason. Checks that no snapshot, mount or cached byte is left."""
    before = guest.cached_files()
    with pytest.raises(grpc.RpcError) as failure:
        guest.pull(image, by)
    details = str(failure.value.details())
    found = re.search(r"reason=([\w-]+)", details)
    assert found, details
    # Layers that are another image's too were rightly there; containerd's collector takes them after the failed pull.
    until(guest.is_empty, "nothing of the refused image is left", 30)
    assert guest.cached_files() == before
    return found[1]


def test_a_tag_that_nobody_pinned(node: NodeMaker, images: Images) -> None:
    assert refused(node(mode="confidential"), images.sealed(), by="tag") == "unauthentic-image"


def test_a_pinned_tag_runs_and_its_replacements_do_not(node: NodeMaker, images: Images) -> None:
    image = images.sealed()
    guest = node(mode="confidential", policy={"pins": [image.by_digest]})
    other_seal = images.sealed(2)
    assert refused(guest, other_seal, by="tag") == "unauthentic-image"
    assert refused(guest, images.plain(), by="tag") == "unauthentic-image"
    assert refused(guest, images.ordinary(), by="tag") == "unauthentic-image"
    assert guest.shell(guest.pull(image, by="tag"), READ_ALL) == expected()


@pytest.mark.parametrize("kind", ["plain", "ordinary"])
def test_an_image_that_is_not_sealed_even_by_digest(node: NodeMaker, images: Images, kind: str) -> None:
    guest = node(mode="confidential")
    assert refused(guest, getattr(images, kind)()) == "not-sealed"


def test_the_wrong_key(node: NodeMaker, images: Images) -> None:
    assert refused(node(mode="confidential", key=images.other_key), images.sealed()) == "no-key"


def test_no_key_at_all(node: NodeMaker, images: Images) -> None:
    assert refused(node(keys={"files": []}), images.sealed()) == "no-key"


def test_a_second_recipient_can_read(node: NodeMaker, images: Images) -> None:
    image = images.sealed(1, "--recipient", f"jwe:{images.other_public}", label="two")
    guest = node(mode="confidential", key=images.other_key)
    assert guest.shell(guest.pull(image), READ_ALL) == expected()


def test_a_config_with_another_entrypoint(node: NodeMaker, images: Images) -> None:
    def swap(config: dict[str, Any]) -> None:
        config["config"]["Entrypoint"] = ["/bin/sh", "-c", "echo evil"]

    evil = images.sealed().variant("evil-config", change_config=swap)
    assert refused(node(), evil, by="tag") == "config-mismatch"


def test_data_blobs_of_another_image(node: NodeMaker, images: Images) -> None:
    image, other = images.sealed(1), images.sealed(2)

    def swap(manifest: dict[str, Any]) -> None:
        manifest["layers"][1] = other.manifest["layers"][1]

    def claim(config: dict[str, Any]) -> None:
        config["rootfs"]["diff_ids"][1] = other.layers[1]

    assert refused(node(), image.variant("evil-blobs", swap, claim), by="tag") == "identity-mismatch"


def test_claimed_diff_ids_never_make_another_image_run_these_files(node: NodeMaker, images: Images) -> None:
    """containerd answers "already there" by chain id, and a chain id is only a claim of the image's config."""
    victim, attacker = images.plain(1), images.plain(2)

    def claim(config: dict[str, Any]) -> None:
        config["rootfs"]["diff_ids"] = victim.config["rootfs"]["diff_ids"]

    guest = node()
    assert refused(guest, attacker.variant("claims", change_config=claim), by="tag") == "chain-mismatch"
    assert guest.shell(guest.pull(victim), READ_ALL) == expected(1)


def test_a_damaged_bootstrap_layer(node: NodeMaker, images: Images) -> None:
    image = images.sealed(3)
    bootstrap = image.layers[-1]
    guest = node()
    images.registry.flip(bootstrap, 1000)
    try:
        assert refused(guest, image) == "digest-mismatch"
    finally:
        images.registry.flip(bootstrap, 1000)
    assert guest.shell(guest.pull(image), READ_ALL) == expected(3)


def test_a_flipped_byte_is_an_error_of_that_read_only_and_heals(node: NodeMaker, images: Images) -> None:
    image = images.sealed(4)
    guest = node(mode="confidential")
    reference = guest.pull(image)
    blob = image.layers[1]
    offset = images.registry.stored(blob).stat().st_size // 2  # inside /data/random, 3 of the blob's 3.2 MB
    container = guest.containerd.start(reference, "/bin/sleep", "1000")
    container.wait_running()
    try:
        images.registry.flip(blob, offset)
        damaged = container.exec("/bin/sh", "-c", "md5sum /data/random 2>&1")
        assert damaged.returncode != 0
        assert "Input/output error" in damaged.stdout
        assert container.exec("/bin/cat", "/data/small").stdout == "small 4\n"
        images.registry.flip(blob, offset)
        mended = container.exec("/bin/sh", "-c", READ_ALL)
        assert mended.stdout == expected(4), mended.stderr
    finally:
        container.kill()


def test_a_cached_byte_flipped_by_the_host_is_fetched_again(node: NodeMaker, images: Images) -> None:
    image = images.sealed()
    guest = node(mode="confidential")
    reference = guest.pull(image)
    assert guest.shell(reference, READ_ALL) == expected()
    guest.containerd.remove_image(reference)
    for path in guest.cached_files():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert guest.shell(guest.pull(image), READ_ALL) == expected()


def test_a_bootstrap_key_is_not_a_signature(node: NodeMaker, images: Images) -> None:
    """Anyone can seal for a public key: by tag such an image is refused, whatever it holds."""
    layout = tiny.layout(images.work.path / "foreign", seed=9)
    foreign = serve.convert(
        images.work, f"oci:{layout.path}:tiny", f"docker://{images.registry.address}/t/app:foreign",
        "--recipient", f"jwe:{images.public}",
    )  # fmt: skip
    image = Image(images.registry, "t/app", "foreign", foreign)
    assert refused(node(mode="confidential"), image, by="tag") == "unauthentic-image"


def test_check_says_of_an_image_what_a_node_would(images: Images, work: Work) -> None:
    """Also of its ordinary layers, and of the diff_ids that its config claims."""

    def check(image: Image) -> tuple[int, str]:
        result = serve.program(work, "check", f"docker://{image.by_digest}", "--key", images.key)
        return result.returncode, result.stderr

    image = images.above(images.sealed())
    assert check(image)[0] == 0
    images.registry.flip(image.layers[-1], 50)
    try:
        assert check(image)[0] == 20
    finally:
        images.registry.flip(image.layers[-1], 50)

    def claim(config: dict[str, Any]) -> None:
        config["rootfs"]["diff_ids"] = images.plain(2).config["rootfs"]["diff_ids"]

    code, text = check(images.plain().variant("check-claims", change_config=claim))
    assert (code, "reason=chain-mismatch" in text) == (20, True)
