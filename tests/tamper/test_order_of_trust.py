"""Every way a registry can serve something else than was sealed, and the check that stops it.

Images are made by the converter and served from layout directories in which the attack has been prepared; everything
behind the registry is the real thing: resolver, policy, loader, keys.
"""

import base64
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshotter import labels
from snapshotter.config import Limits, Size
from snapshotter.crypto import layer as layer_crypto
from snapshotter.digest import Digest
from snapshotter.errors import FailedPrecondition, LimitExceeded, SnapshotterError
from snapshotter.keys import jwe
from snapshotter.snapshots.remote import LayerRequest
from tests.tamper.attacker import REPOSITORY, Node, Registry, World, chain_ids, refused

# the good cases, so that the refusals mean something


@pytest.mark.parametrize("mode", ["open", "confidential"])
async def test_an_authentic_image_is_admitted_layer_by_layer(
    made: World, registry: Registry, tmp_path: Path, mode: str
) -> None:
    node = Node(registry, made.keys.private, tmp_path, mode)
    manifest = registry.digest("app")
    count = len(registry.manifest("app")["layers"])
    verdicts = [await node.prepare(registry, manifest, layer=number) for number in range(count)]
    assert [verdict.kind for verdict in verdicts] == ["data"] * (count - 1) + ["image"]
    record = verdicts[-1].record
    assert record is not None
    assert record.sealed
    assert record.manifest == manifest
    cached = [path.read_bytes() for path in (node.cache / "bootstraps").iterdir()]
    assert cached == [registry.blob(record.bootstrap)]  # encrypted, as fetched


async def test_a_plain_nydus_image_is_admitted_in_mode_open(made: World, registry: Registry, tmp_path: Path) -> None:
    node = Node(registry, None, tmp_path)
    count = len(registry.manifest("plain")["layers"])
    verdict = await node.prepare(registry, registry.digest("plain"), layer=count - 1)
    assert verdict.kind == "image"
    assert verdict.record is not None
    assert not verdict.record.sealed


async def test_the_cached_bootstrap_layer_is_verified_again(made: World, registry: Registry, tmp_path: Path) -> None:
    manifest = registry.digest("app")
    first = Node(registry, made.keys.private, tmp_path)
    await first.prepare(registry, manifest)
    cached = [path for path in first.cache.rglob("*") if path.is_file()]
    assert len(cached) == 3  # bootstrap layer, manifest, config
    for path in cached:
        path.write_bytes(b"poison" + path.read_bytes()[6:])
    second = Node(registry, made.keys.private, tmp_path)
    assert (await second.prepare(registry, manifest)).kind == "data"


async def test_an_image_is_loaded_again_without_the_registry(made: World, registry: Registry, tmp_path: Path) -> None:
    manifest = registry.digest("app")
    await Node(registry, made.keys.private, tmp_path, "confidential").prepare(registry, manifest)
    document = registry.manifest("app")
    gone = Registry(tmp_path / "gone")
    (gone.path / "blobs/sha256").mkdir(parents=True)
    for needed in (manifest, document["config"]["digest"]):  # only for this test, to know what to ask for
        (gone.path / "blobs/sha256" / needed[7:]).write_bytes(registry.blob(needed))
    offline = Node(Registry(tmp_path / "nothing"), made.keys.private, tmp_path, "confidential")
    assert (await offline.prepare(gone, manifest)).kind == "data"


# step 0: origin


async def test_a_tag_without_a_pin_is_unauthentic(made: World, registry: Registry, tmp_path: Path) -> None:
    node = Node(registry, made.keys.private, tmp_path, "confidential")
    await refused(node, registry, registry.digest("app"), "unauthentic-image", reference=f"{REPOSITORY}:1")


async def test_an_image_sealed_by_a_stranger_to_our_key_is_unauthentic(
    made: World, registry: Registry, tmp_path: Path
) -> None:
    node = Node(registry, made.keys.private, tmp_path, "confidential", "any", f"{REPOSITORY}@{registry.digest('app')}")
    await refused(node, registry, registry.digest("evil"), "unauthentic-image", reference=f"{REPOSITORY}:1")


async def test_a_manifest_that_the_reference_does_not_name_is_refused(
    made: World, registry: Registry, tmp_path: Path
) -> None:
    node = Node(registry, made.keys.private, tmp_path, "confidential")
    reference = f"{REPOSITORY}@{registry.digest('app')}"
    await refused(node, registry, registry.digest("evil"), "digest-mismatch", reference=reference)


@pytest.mark.parametrize(("mode", "require"), [("confidential", "any"), ("open", "sealed")])
async def test_a_plain_image_is_not_sealed(
    made: World, registry: Registry, tmp_path: Path, mode: str, require: str
) -> None:
    node = Node(registry, made.keys.private, tmp_path, mode, require)
    await refused(node, registry, registry.digest("plain"), "not-sealed")


async def test_an_ordinary_image_is_not_sealed(made: World, registry: Registry, tmp_path: Path) -> None:
    def ordinary(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        manifest["layers"] = [{"mediaType": labels.MEDIA_LAYER_GZIP} | registry.put(gzip.compress(bytes(10240)))]
        config["rootfs"]["diff_ids"] = [f"sha256:{hashlib.sha256(bytes(10240)).hexdigest()}"]

    manifest = registry.forge("app", ordinary)
    await refused(Node(registry, made.keys.private, tmp_path, "confidential"), registry, manifest, "not-sealed")
    assert (await Node(registry, None, tmp_path).prepare(registry, manifest)).kind == "ordinary"


async def test_an_ordinary_layer_above_a_sealed_base(made: World, registry: Registry, tmp_path: Path) -> None:
    extra = b"\0" * 10240

    def grow(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        manifest["layers"].append({"mediaType": labels.MEDIA_LAYER_GZIP} | registry.put(gzip.compress(extra)))
        config["rootfs"]["diff_ids"].append(f"sha256:{hashlib.sha256(extra).hexdigest()}")

    manifest = registry.forge("app", grow)
    top = len(json.loads(registry.blob(manifest))["layers"]) - 1
    node = Node(registry, made.keys.private, tmp_path)
    assert (await node.prepare(registry, manifest, layer=top)).kind == "ordinary"
    strict = Node(registry, made.keys.private, tmp_path / "strict", "confidential")
    with pytest.raises(SnapshotterError) as caught:
        await strict.prepare(registry, manifest, layer=top)
    assert caught.value.reason == "not-sealed"


async def test_missing_labels_name_the_setting_to_change(made: World, registry: Registry, tmp_path: Path) -> None:
    node = Node(registry, made.keys.private, tmp_path)
    request = LayerRequest("default", {labels.NYDUS_BLOB: "true"}, "sha256:" + "0" * 64, "")
    with pytest.raises(FailedPrecondition, match="disable_snapshot_annotations"):
        await node.images.resolve(request)


# steps 1 and 4: digests


@pytest.mark.parametrize("what", ["manifest", "config", "bootstrap"])
async def test_other_bytes_under_a_digest(made: World, registry: Registry, tmp_path: Path, what: str) -> None:
    digest = registry.digest("app")
    manifest = registry.manifest("app")
    target = {
        "manifest": digest,
        "config": manifest["config"]["digest"],
        "bootstrap": manifest["layers"][-1]["digest"],
    }[what]
    node = Node(registry, made.keys.private, tmp_path)
    original = registry.blob(target)
    changed = original.replace(b"linux", b"minix", 1) if what != "bootstrap" else original[:-1] + b"x"
    if changed == original:
        changed = original.replace(b"sha256", b"sha257", 1)
    registry.overwrite(target, changed)
    claimed = chain_ids([entry["digest"] for entry in manifest["layers"]])
    request_labels = {
        labels.CRI_IMAGE_REF: f"{REPOSITORY}@{digest}",
        labels.CRI_MANIFEST_DIGEST: digest,
        labels.CRI_LAYER_DIGEST: manifest["layers"][0]["digest"],
        labels.NYDUS_BLOB: "true",
    }
    with pytest.raises(SnapshotterError) as caught:
        await node.images.resolve(LayerRequest("k8s.io", request_labels, claimed[0], ""))
    assert caught.value.reason == "digest-mismatch"
    node.assert_nothing_left()


@pytest.mark.parametrize("change", [-1, 1])
async def test_a_descriptor_that_lies_about_a_size(
    made: World, registry: Registry, tmp_path: Path, change: int
) -> None:
    def lie(manifest: dict[str, Any], _config: dict[str, Any]) -> None:
        manifest["layers"][-1]["size"] += change

    manifest = registry.forge("app", lie)
    await refused(Node(registry, made.keys.private, tmp_path), registry, manifest, "digest-mismatch")


# step 3: chain ids


async def test_an_image_cannot_claim_the_chain_of_another(made: World, registry: Registry, tmp_path: Path) -> None:
    """Pulled first, it would make containerd run its files under the other image's name."""

    def claim(_manifest: dict[str, Any], config: dict[str, Any]) -> None:
        config["rootfs"]["diff_ids"] = registry.config("app")["rootfs"]["diff_ids"]

    manifest = registry.forge("evil", claim)
    node = Node(registry, made.keys.private, tmp_path)
    with pytest.raises(SnapshotterError) as caught:
        await node.prepare(registry, manifest)
    assert (caught.value.reason, node.keys.times) == ("chain-mismatch", 0)
    assert (await node.prepare(registry, registry.digest("app"))).kind == "data"


async def test_layers_in_another_order_have_other_chain_ids(made: World, registry: Registry, tmp_path: Path) -> None:
    node = Node(registry, made.keys.private, tmp_path)
    swapped = chain_ids(list(reversed(registry.config("app")["rootfs"]["diff_ids"])))
    with pytest.raises(SnapshotterError) as caught:
        await node.prepare(registry, registry.digest("app"), chain=swapped)
    assert (caught.value.reason, node.keys.times) == ("chain-mismatch", 0)


# steps 5 and 6: keys and the layer's MAC


async def test_a_key_for_somebody_else_opens_nothing(made: World, registry: Registry, tmp_path: Path) -> None:
    error = await refused(Node(registry, made.keys.private, tmp_path), registry, registry.digest("foreign"), "no-key")
    assert made.keys.private.read_text().splitlines()[1] not in str(error)
    await refused(Node(registry, None, tmp_path), registry, registry.digest("app"), "no-key")


def edit_public_options(registry: Registry, edit: Callable[[dict[str, Any]], None]) -> Digest:
    def apply(manifest: dict[str, Any], _config: dict[str, Any]) -> None:
        annotations = manifest["layers"][-1]["annotations"]
        options = json.loads(base64.b64decode(annotations[labels.ENC_PUBOPTS]))
        edit(options)
        annotations[labels.ENC_PUBOPTS] = base64.b64encode(json.dumps(options).encode()).decode()

    return registry.forge("app", apply)


async def test_another_hmac_is_refused(made: World, registry: Registry, tmp_path: Path) -> None:
    manifest = edit_public_options(registry, lambda o: o.update(hmac=base64.b64encode(bytes(32)).decode()))
    await refused(Node(registry, made.keys.private, tmp_path), registry, manifest, "layer-hmac")


async def test_a_nonce_in_the_public_options_is_refused(made: World, registry: Registry, tmp_path: Path) -> None:
    nonce = {"nonce": base64.b64encode(bytes(16)).decode()}
    manifest = edit_public_options(registry, lambda o: o.update(cipheroptions=nonce))
    with pytest.raises(SnapshotterError):
        await Node(registry, made.keys.private, tmp_path).prepare(registry, manifest)


@pytest.mark.parametrize("position", [0, 1, 100, 1000, -1])
async def test_a_flipped_bit_in_the_encrypted_layer(
    made: World, registry: Registry, tmp_path: Path, position: int
) -> None:
    """The manifest names the changed bytes, so digests agree; the MAC does not."""
    layer = bytearray(registry.blob(registry.manifest("app")["layers"][-1]["digest"]))
    layer[position] ^= 1

    def swap(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        manifest["layers"][-1] |= registry.put(bytes(layer))
        config["rootfs"]["diff_ids"][-1] = manifest["layers"][-1]["digest"]

    manifest = registry.forge("app", swap)
    await refused(Node(registry, made.keys.private, tmp_path), registry, manifest, "layer-hmac")


# step 8: the bootstrap belongs to this image


async def test_another_entrypoint_is_refused(made: World, registry: Registry, tmp_path: Path) -> None:
    def swap(_manifest: dict[str, Any], config: dict[str, Any]) -> None:
        config["config"]["Entrypoint"] = ["/bin/sh", "-c", "cat /etc/passwd"]

    manifest = registry.forge("app", swap)
    await refused(Node(registry, made.keys.private, tmp_path), registry, manifest, "config-mismatch")


@pytest.mark.parametrize("member", ["Env", "User", "WorkingDir", "Cmd"])
async def test_any_other_start_setting_is_refused(made: World, registry: Registry, tmp_path: Path, member: str) -> None:
    def swap(_manifest: dict[str, Any], config: dict[str, Any]) -> None:
        config["config"][member] = "root" if member in ("User", "WorkingDir") else ["LD_PRELOAD=/evil.so"]

    manifest = registry.forge("app", swap)
    await refused(Node(registry, made.keys.private, tmp_path), registry, manifest, "config-mismatch")


async def test_the_bootstrap_of_another_image_is_refused(made: World, registry: Registry, tmp_path: Path) -> None:
    other = registry.manifest("evil")["layers"][-1]

    def swap(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        manifest["layers"][-1] = other
        config["rootfs"]["diff_ids"][-1] = other["digest"]

    manifest = registry.forge("app", swap)
    await refused(Node(registry, made.keys.private, tmp_path), registry, manifest, "identity-mismatch")


async def test_data_blobs_of_another_image_are_refused(made: World, registry: Registry, tmp_path: Path) -> None:
    other = registry.manifest("evil")["layers"][:-1]

    def swap(manifest: dict[str, Any], config: dict[str, Any]) -> None:
        manifest["layers"][:-1] = other
        config["rootfs"]["diff_ids"][:-1] = [layer["digest"] for layer in other]

    manifest = registry.forge("app", swap)
    await refused(Node(registry, made.keys.private, tmp_path), registry, manifest, "identity-mismatch")


# step 7: whatever the key holder of a hostile image may put inside


@pytest.fixture
def reseal(made: World, registry: Registry) -> Callable[[Callable[[dict[str, bytes]], None]], Digest]:
    """Re-make the bootstrap layer of `app` with edited members, properly encrypted: only parsing can refuse it."""

    def make(edit: Callable[[dict[str, bytes]], None]) -> Digest:
        layer = registry.manifest("app")["layers"][-1]
        packet = base64.b64decode(layer["annotations"][labels.ENC_KEYS_JWE])
        key = jwe.PrivateKey.load(made.keys.private.read_bytes())
        public = layer_crypto.LayerPublic.parse(base64.b64decode(layer["annotations"][labels.ENC_PUBOPTS]))
        with jwe.unwrap(packet, [key]) as options:
            private = layer_crypto.LayerPrivate.parse(options)
        plain = gzip.decompress(layer_crypto.decrypt_verified(registry.blob(layer["digest"]), private, public))
        with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
            files = {m.name: archive.extractfile(m).read() for m in archive if m.isreg()}  # type: ignore[union-attr]
        edit(files)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as writer:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                writer.addfile(info, io.BytesIO(content))
        cipher, public, private = layer_crypto.encrypt(gzip.compress(out.getvalue()))
        wrapped = jwe.wrap(private.pack(), [made.keys.public.read_bytes()])

        def swap(manifest: dict[str, Any], config: dict[str, Any]) -> None:
            top = manifest["layers"][-1] | registry.put(cipher)
            top["annotations"] |= {
                labels.ENC_KEYS_JWE: base64.b64encode(wrapped).decode(),
                labels.ENC_PUBOPTS: base64.b64encode(public.pack()).decode(),
            }
            manifest["layers"][-1] = top
            config["rootfs"]["diff_ids"][-1] = top["digest"]

        return registry.forge("app", swap)

    return make


def first_member(files: dict[str, bytes], suffix: str) -> str:
    return sorted(name for name in files if name.endswith(suffix))[0]


def _flip(files: dict[str, bytes], name: str, position: int) -> None:
    data = bytearray(files[name])
    data[position] ^= 0x40
    files[name] = bytes(data)


ATTACKS: dict[str, Callable[[dict[str, bytes]], None]] = {
    "no identity": lambda f: f.pop("image/identity.json") and None,
    "no config": lambda f: f.pop("image/config.json") and None,
    "no chunk table": lambda f: f.pop(first_member(f, ".blob.meta")) and None,
    "no keys": lambda f: f.pop(first_member(f, ".keys")) and None,
    "an extra member": lambda f: f.update({"image/extra": b""}),
    "identity with an unknown member": lambda f: f.update(
        {"image/identity.json": f["image/identity.json"].replace(b"{", b'{"a":1,', 1)}
    ),
    "a bad superblock": lambda f: _flip(f, "image/image.boot", 1024),
    "a bad device slot": lambda f: _flip(f, "image/image.boot", 1408),
    "a truncated bootstrap": lambda f: f.update({"image/image.boot": f["image/image.boot"][:-4096]}),
    "a wrong chunk offset": lambda f: _flip(f, first_member(f, ".blob.meta"), 8),
    "a wrong CI header": lambda f: _flip(f, first_member(f, ".blob.meta"), -4096),
    "a wrong keys header": lambda f: _flip(f, first_member(f, ".keys"), 0),
    "a wrong digest in the keys file": lambda f: _flip(f, first_member(f, ".keys"), 64),
    "short keys": lambda f: f.update({first_member(f, ".keys"): f[first_member(f, ".keys")][:-1]}),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_a_hostile_bootstrap_is_refused(
    made: World,
    registry: Registry,
    tmp_path: Path,
    reseal: Callable[[Callable[[dict[str, bytes]], None]], Digest],
    attack: str,
) -> None:
    manifest = reseal(ATTACKS[attack])
    await refused(Node(registry, made.keys.private, tmp_path), registry, manifest, "bad-bootstrap")


# limits


async def admitted(node: Node, registry: Registry, manifest: Digest) -> bool:
    """True if the image is admitted, False if a limit refuses it; any other refusal is a failure."""
    try:
        await node.prepare(registry, manifest)
    except LimitExceeded:
        return False
    return True


@pytest.mark.parametrize("row", ["bootstrap_bytes", "bootstrap_unpacked_bytes", "chunks", "inodes", "layers"])
async def test_a_limit_admits_what_fits_and_nothing_more(
    made: World, registry: Registry, tmp_path: Path, row: str
) -> None:
    manifest = registry.digest("app")
    low, high = 0, 1 << 20  # bisect for the exact need; one below it must be refused
    while high - low > 1:
        middle = (low + high) // 2
        node = Node(registry, made.keys.private, tmp_path / str(middle), limits=Limits(**{row: Size(middle)}))
        low, high = (low, middle) if await admitted(node, registry, manifest) else (middle, high)
        if low == middle:
            node.assert_nothing_left()
    assert low > 0
    exact = {
        "bootstrap_bytes": registry.manifest("app")["layers"][-1]["size"],
        "layers": len(registry.manifest("app")["layers"]),
    }
    assert high == exact.get(row, high)
