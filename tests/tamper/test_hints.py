"""Clients that hand on a layer's annotations and no more: what the annotations can and cannot bring about.

Whoever makes an image writes them, and whoever serves it decides where tags lead.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from snapshotter import labels
from snapshotter.digest import Digest
from snapshotter.errors import FailedPrecondition, IntegrityError, InvalidArgument
from tests.tamper.attacker import REPOSITORY, Node, Registry, World, refused


def bootstrap(registry: Registry, tag: str) -> Digest:
    return Digest(registry.manifest(tag)["layers"][-1]["digest"])


def hint_tag(registry: Registry, tag: str) -> str:
    return f"coco-{bootstrap(registry, tag).hex}"


@pytest.fixture
def tagged(registry: Registry) -> Registry:
    """Each image also has the tag that `convert` gives it on a registry."""
    for name in ("app", "plain", "evil"):
        registry.tag(hint_tag(registry, name), registry.digest(name))
    return registry


@pytest.mark.parametrize("name", ["app", "plain"])
async def test_hints_lead_to_the_image(made: World, tagged: Registry, tmp_path: Path, name: str) -> None:
    node = Node(tagged, made.keys.private, tmp_path)
    manifest = tagged.digest(name)
    count = len(tagged.manifest(name)["layers"])
    verdicts = [await node.prepare(tagged, manifest, layer=number, cri=False) for number in range(count)]
    assert [verdict.kind for verdict in verdicts] == ["data"] * (count - 1) + ["image"]
    record = verdicts[-1].record
    assert record is not None
    assert (record.reference, record.manifest) == (f"{REPOSITORY}:{hint_tag(tagged, name)}", manifest)
    assert record.sealed == (name == "app")


async def test_labels_of_the_client_win(made: World, registry: Registry, tmp_path: Path) -> None:
    def mislead(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        for layer in manifest["layers"]:
            layer["annotations"][labels.HINT_REPOSITORY] = "elsewhere.example/bad:tag@"
            layer["annotations"][labels.HINT_BOOTSTRAP_DIGEST] = "nonsense"

    manifest = registry.forge("app", mislead)
    assert (await Node(registry, made.keys.private, tmp_path).prepare(registry, manifest)).kind == "data"


async def test_a_missing_tag_names_both_ways_out(made: World, registry: Registry, tmp_path: Path) -> None:
    node = Node(registry, made.keys.private, tmp_path)
    with pytest.raises(FailedPrecondition) as caught:
        await node.prepare(registry, registry.digest("app"), cri=False)
    for words in (f"{REPOSITORY}:{hint_tag(registry, 'app')}", "copy the image's manifest", "disable_snapshot_annot"):
        assert words in str(caught.value)
    node.assert_nothing_left()


async def test_half_of_the_hints_are_none(made: World, tagged: Registry, tmp_path: Path) -> None:
    def forget(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        del manifest["layers"][0]["annotations"][labels.HINT_REPOSITORY]

    with pytest.raises(FailedPrecondition, match=r"needs label containerd\.io/snapshot/cri\.image-ref"):
        await Node(tagged, made.keys.private, tmp_path).prepare(tagged, tagged.forge("app", forget), cri=False)


@pytest.mark.parametrize(
    ("label", "value"),
    [
        (labels.HINT_REPOSITORY, f"{REPOSITORY}:tag"),
        (labels.HINT_REPOSITORY, f"{REPOSITORY}@sha256:{'0' * 64}"),
        (labels.HINT_REPOSITORY, "../../etc/passwd"),
        (labels.HINT_REPOSITORY, "registry.example:99999/app"),
        (labels.HINT_REPOSITORY, "r" * 2000),
        (labels.HINT_LAYER_DIGEST, "sha256:0"),
        (labels.HINT_BOOTSTRAP_DIGEST, "md5:" + "0" * 32),
        (labels.HINT_BOOTSTRAP_DIGEST, "sha256:" + "0" * 63 + "/"),
    ],
)
async def test_hints_of_no_meaning(made: World, tagged: Registry, tmp_path: Path, label: str, value: str) -> None:
    def scribble(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        manifest["layers"][0]["annotations"][label] = value

    node = Node(tagged, made.keys.private, tmp_path)
    with pytest.raises(InvalidArgument):
        await node.prepare(tagged, tagged.forge("app", scribble), cri=False)
    node.assert_nothing_left()


@pytest.mark.parametrize("other", ["evil", "ordinary"])
async def test_a_tag_that_leads_to_another_image(made: World, tagged: Registry, tmp_path: Path, other: str) -> None:
    def ordinary(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        for layer in manifest["layers"]:
            layer |= {"mediaType": labels.MEDIA_LAYER_GZIP, "annotations": {}}

    leads_to = tagged.digest("evil") if other == "evil" else tagged.forge("app", ordinary)
    tagged.tag(hint_tag(tagged, "app"), leads_to)
    node = Node(tagged, made.keys.private, tmp_path)
    await refused(node, tagged, tagged.digest("app"), "digest-mismatch", cri=False)


async def test_an_image_that_claims_the_layers_of_another(made: World, tagged: Registry, tmp_path: Path) -> None:
    """Its own lazy layer, under the chain id of the victim's: the hints lead to what is served under its digest."""

    def claim(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        config["rootfs"]["diff_ids"] = tagged.config("app")["rootfs"]["diff_ids"]

    node = Node(tagged, made.keys.private, tmp_path)
    for layer in range(len(tagged.manifest("evil")["layers"])):
        with pytest.raises(IntegrityError) as caught:
            await node.prepare(tagged, tagged.forge("evil", claim), layer=layer, cri=False)
        assert caught.value.reason == "chain-mismatch"


async def test_an_ordinary_layer_with_the_hints_of_a_sealed_image(
    made: World, tagged: Registry, tmp_path: Path
) -> None:
    """It is none of that image's layers, so it is not waved through where only sealed images may run."""

    def grow(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        annotations = manifest["layers"][-1]["annotations"] | {labels.HINT_LAYER_DIGEST: "sha256:" + "5" * 64}
        for name in (labels.NYDUS_BOOTSTRAP, labels.NYDUS_FS_VERSION):
            del annotations[name]
        layer = {"mediaType": labels.MEDIA_LAYER_GZIP, "annotations": annotations} | tagged.put(b"anything")
        manifest["layers"].append(layer)
        config["rootfs"]["diff_ids"].append("sha256:" + "6" * 64)

    manifest = tagged.forge("app", grow)
    top = len(json.loads(tagged.blob(manifest))["layers"]) - 1
    node = Node(tagged, made.keys.private, tmp_path, "open", "sealed")
    with pytest.raises(IntegrityError) as caught:
        await node.prepare(tagged, manifest, layer=top, cri=False)
    assert caught.value.reason == "chain-mismatch"


@pytest.mark.parametrize(("mode", "require"), [("confidential", "any"), ("open", "pinned"), ("open", "any")])
async def test_hints_do_not_say_which_config_will_run(
    made: World, tagged: Registry, tmp_path: Path, mode: str, require: str
) -> None:
    """Another command around the genuine layers of the pinned image: the client would run it."""

    def swap(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        config["config"]["Entrypoint"] = ["/bin/sh", "-c", "evil"]

    pin = f"{REPOSITORY}@{tagged.digest('app')}"
    node = Node(tagged, made.keys.private, tmp_path, mode, require, pin)
    error = await refused(node, tagged, tagged.forge("app", swap), "unauthentic-image", cri=False)
    assert "disable_snapshot_annotations" in str(error)
