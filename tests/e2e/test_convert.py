"""`convert`, `inspect` and `check` as people use them: real layouts, a real registry, stock tools."""

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from snapshotter.build.chunker import Codec
from tests.harness import debian, serve, tiny
from tests.harness.machine import Work
from tests.harness.registry import Registry
from tests.unit.build import images
from tests.unit.build.images import KeyPair
from tests.unit.build.tars import header


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    pair = images.key_pair(tmp_path)
    (tmp_path / "public.pem").write_bytes(pair.public)
    return pair


@pytest.fixture
def source(tmp_path: Path) -> str:
    tiny.layout(tmp_path / "source", name="tiny")
    return f"oci:{tmp_path / 'source'}:tiny"


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def test_layout_to_layout(work: Work, tmp_path: Path, keys: KeyPair, source: str) -> None:
    target = f"oci:{tmp_path / 'out'}:sealed"
    done = serve.program(work, "convert", source, target, "--recipient", f"jwe:{tmp_path / 'public.pem'}")
    assert done.returncode == 0, done.stderr
    reference, _, digest = last_line(done.stdout).rpartition("@")
    assert reference == target
    raw = (tmp_path / "out/blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()
    assert digest == f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert "chunks" in done.stderr
    assert "\r" not in done.stderr
    checked = serve.program(work, "check", target, "--key", keys.private)
    assert (checked.returncode, checked.stdout.startswith("ok: sealed image")) == (0, True), checked.stderr


def test_registry_to_registry(work: Work, tmp_path: Path, keys: KeyPair, source: str) -> None:
    registry = Registry(work)
    registry.push(tmp_path / "source", "tiny", "team/app", "oci")
    base = f"docker://{registry.address}/team/app"
    recipient = f"jwe:{tmp_path / 'public.pem'}"
    done = serve.program(work, "convert", f"{base}:oci", f"{base}:sealed", "--recipient", recipient)
    assert done.returncode == 0, done.stderr
    digest = last_line(done.stdout).rpartition("@")[2]
    raw, media_type = registry.get_manifest("team/app", "sealed")
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == digest
    assert media_type == "application/vnd.oci.image.manifest.v1+json"
    hint = "containerd.io/snapshot/coco.repository"
    assert {layer["annotations"][hint] for layer in json.loads(raw)["layers"]} == {f"{registry.address}/team/app"}
    bootstrap = json.loads(raw)["layers"][-1]["digest"].removeprefix("sha256:")
    assert registry.get_manifest("team/app", f"coco-{bootstrap}") == (raw, media_type), "where the hints lead"
    assert serve.program(work, "check", f"{base}@{digest}", "--key", keys.private).returncode == 0
    copied = subprocess.run(
        ["skopeo", "copy", "--quiet", "--src-tls-verify=false", f"{base}:sealed", f"oci:{tmp_path / 'copy'}:x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert copied.returncode == 0, copied.stderr
    assert serve.program(work, "check", f"oci:{tmp_path / 'copy'}:x", "--key", keys.private).returncode == 0


def test_stock_tools_unwrap_the_bootstrap_layer(work: Work, tmp_path: Path, keys: KeyPair, source: str) -> None:
    target = tmp_path / "out"
    serve.convert(work, source, f"oci:{target}:sealed", "--recipient", f"jwe:{tmp_path / 'public.pem'}")
    done = subprocess.run(
        ["skopeo", "copy", "--quiet", "--decryption-key", keys.private, f"oci:{target}:sealed",
         f"oci:{tmp_path / 'plain'}:x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "plain/index.json").read_text())
    blobs = tmp_path / "plain/blobs/sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].removeprefix("sha256:")).read_text())
    layer = manifest["layers"][-1]
    assert layer["mediaType"].endswith("tar+gzip")
    with tarfile.open(blobs / layer["digest"].removeprefix("sha256:")) as archive:
        assert "image/identity.json" in archive.getnames()


def test_inspect_shows_what_the_reader_may_see(work: Work, tmp_path: Path, keys: KeyPair, source: str) -> None:
    target = f"oci:{tmp_path / 'out'}:sealed"
    serve.convert(work, source, target, "--recipient", f"jwe:{tmp_path / 'public.pem'}")
    outside = json.loads(serve.program(work, "inspect", target, "--json").stdout)
    assert (outside["kind"], [layer["role"] for layer in outside["layers"]]) == (
        "encrypted", ["data", "data", "bootstrap"],
    )  # fmt: skip
    assert "tree" not in outside
    assert "blobs" not in outside
    inside = json.loads(serve.program(work, "inspect", target, "--json", "--tree", "--key", keys.private).stdout)
    assert inside["kind"] == "sealed"
    assert inside["true_config"]["history"]
    files = {entry["path"]: entry for entry in inside["tree"]}
    assert len(files["/data/random"]["chunk_ids"]) == 12
    shown = json.dumps(inside)
    found = images.run(images.opened(tmp_path / "out", keys, "sealed"))[1]
    for device in found.devices:
        for secrets in (device.digests, device.secrets):
            assert not any(secrets[at : at + 32].hex() in shown for at in range(0, len(secrets), 32))
    text = serve.program(work, "inspect", target, "--tree", "--key", keys.private).stdout
    assert "/bin/sh -> busybox" in text
    assert serve.program(work, "inspect", target, "--tree").returncode == 11


def test_check_finds_every_kind_of_damage(work: Work, tmp_path: Path, keys: KeyPair, source: str) -> None:
    target = tmp_path / "out"
    location = f"oci:{target}:sealed"
    digest = serve.convert(work, source, location, "--recipient", f"jwe:{tmp_path / 'public.pem'}")
    manifest = json.loads((target / "blobs/sha256" / digest.removeprefix("sha256:")).read_text())
    for descriptor in (manifest["config"], *manifest["layers"]):
        path = target / "blobs/sha256" / descriptor["digest"].removeprefix("sha256:")
        good = path.read_bytes()
        damaged = bytearray(good)
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        assert serve.program(work, "check", location, "--key", keys.private).returncode == 20, descriptor
        path.write_bytes(good)
    other = images.key_pair(tmp_path / "source")
    assert serve.program(work, "check", location, "--key", other.private).returncode == 11
    assert serve.program(work, "check", f"oci:{target}:nothing").returncode == 3
    assert serve.program(work, "check", location, "--key", keys.private).returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--plain"),
        (("--plain", "--recipient", "jwe:KEY"), "--plain"),
        (("--plain", "--chunk-size", "3000"), "chunk size"),
        (("--plain", "--chunk-size", "lots"), "--chunk-size"),
        (("--plain", "--codec", "gzip"), "codec"),
        (("--recipient", "jwe:KEY", "--domain", "tenant"), "--convergence-secret"),
        (("--recipient", "pgp:me"), "recipient"),
        (("--plain", "--trace", "/nonexistent"), "trace"),
        (("--plain", "--repository", "UPPER/case!"), "reference"),
        (("--plain", "--repository", "host.example/app:1"), "without tag and digest"),
    ],
)
def test_wrong_options_are_explained(
    work: Work, tmp_path: Path, keys: KeyPair, source: str, options: tuple[str, ...], words: str
) -> None:
    given = [option.replace("KEY", str(tmp_path / "public.pem")) for option in options]
    done = serve.program(work, "convert", source, f"oci:{tmp_path / 'out'}:x", *given)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_source_date_epoch_makes_plain_images_repeatable(work: Work, tmp_path: Path, source: str) -> None:
    digests = {
        serve.convert(work, source, f"oci:{tmp_path / tag}:x", "--plain", environment={"SOURCE_DATE_EPOCH": "1000"})
        for tag in ("one", "two")
    }
    assert len(digests) == 1
    done = serve.program(
        work, "convert", source, f"oci:{tmp_path / 'x'}:x", "--plain", environment={"SOURCE_DATE_EPOCH": "now"}
    )
    assert done.returncode == 2


def test_a_public_domain_is_announced(work: Work, tmp_path: Path, keys: KeyPair, source: str) -> None:
    done = serve.program(
        work, "convert", source, f"oci:{tmp_path / 'out'}:x", "--domain", "public", "--recipient",
        f"jwe:{tmp_path / 'public.pem'}",
    )  # fmt: skip
    assert done.returncode == 0
    assert "everybody" in done.stderr


def test_hostile_layers_are_refused_with_a_word(work: Work, tmp_path: Path) -> None:
    images.layout(tmp_path / "source", [header(b"f", b"Z")])
    done = serve.program(work, "convert", f"oci:{tmp_path / 'source'}:src", f"oci:{tmp_path / 'out'}:x", "--plain")
    assert done.returncode == 20
    assert "reason=bad-layer" in done.stderr


def test_a_sparse_file_of_64_gib_takes_seconds_and_little_memory(work: Work, tmp_path: Path, keys: KeyPair) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.write(b"begin")
        file.seek(33 << 30)
        file.write(b"middle")
        file.truncate(64 << 30)
    tar = subprocess.run(
        ["tar", "-C", tmp_path, "--sparse", "--format=pax", "-cf", "-", "disk"], check=True, capture_output=True
    ).stdout
    images.layout(tmp_path / "source", [tar])
    done = subprocess.run(
        ["/usr/bin/time", "-f", "%M", *serve.PROGRAM, "convert", f"oci:{tmp_path / 'source'}:src",
         f"oci:{tmp_path / 'out'}:x", "--recipient", f"jwe:{tmp_path / 'public.pem'}"],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(last_line(done.stderr)) < 250 << 10
    with (tmp_path / "out/index.json").open() as file:
        assert json.load(file)["manifests"]


def test_nydus_image_accepts_plain_images_and_refuses_sealed_ones(
    nydus_image: str, tmp_path: Path, keys: KeyPair, source: str
) -> None:
    layout_path = tmp_path / "source"
    for reader in (None, keys):
        target = tmp_path / f"out-{reader is None}"
        for codec in ("zstd", "lz4", "none"):
            chosen = images.options(reader, codec=Codec.parse(codec), chunk_size=65536)
            images.run(images.convert(layout_path, target, chosen, codec, name="tiny"))
            _, found = images.run(images.opened(target, reader, codec))
            bootstrap = tmp_path / "image.boot"
            bootstrap.write_bytes(found.files["image/image.boot"])
            done = subprocess.run([nydus_image, "check", "--bootstrap", bootstrap], capture_output=True, check=False)
            assert (done.returncode == 0) == (reader is None), done.stderr.decode()


def test_nydus_image_unpacks_a_plain_image(nydus_image: str, tmp_path: Path, source: str) -> None:
    single = images.layout(tmp_path / "single", [images.tar_of(tiny.data_members())])
    images.run(images.convert(single, tmp_path / "out", images.options(None, chunk_size=65536)))
    _, found = images.run(images.opened(tmp_path / "out", None))
    bootstrap, output = tmp_path / "image.boot", tmp_path / "unpacked.tar"
    bootstrap.write_bytes(found.files["image/image.boot"])
    blob = tmp_path / "out/blobs/sha256" / found.devices[0].digest.removeprefix("sha256:")
    done = subprocess.run(
        [nydus_image, "unpack", "--bootstrap", bootstrap, "--blob", blob, "--output", output],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with tarfile.open(output) as archive:
        names = {name.lstrip("./") for name in archive.getnames()}
        assert {"data/random", "data/text", "data/link"} <= names
        member = next(item for item in archive.getmembers() if item.name.endswith("data/random"))
        content = archive.extractfile(member)
        assert content is not None
        assert content.read() == tiny.data()


@pytest.mark.root
@pytest.mark.real
@pytest.mark.timeout(900)
def test_a_debian_image_is_the_same_tree(work: Work, tmp_path: Path, keys: KeyPair) -> None:
    made = debian.image("python")
    target = tmp_path / "out"
    serve.convert(
        work, f"oci:{made.path}:python", f"oci:{target}:x", "--recipient", f"jwe:{tmp_path / 'public.pem'}", timeout=600
    )
    assert serve.program(work, "check", f"oci:{target}:x", "--key", keys.private, timeout=600).returncode == 0
    expected = tmp_path / "unpacked"
    subprocess.run(["umoci", "unpack", "--image", f"{made.path}:python", expected], check=True, capture_output=True)
    _, found = images.run(images.opened(target, keys, "x"))
    with images.erofs(target, found, tmp_path) as mounted:
        actual = images.tree(mounted)
    reference = images.tree(expected / "rootfs")
    shutil.rmtree(expected)
    assert sorted(actual) == sorted(reference)
    for path, seen in actual.items():
        if seen.mode.startswith("d"):  # umoci leaves its own time on directories that only later layers pass through
            seen, reference[path] = seen._replace(mtime_ns=0), reference[path]._replace(mtime_ns=0)
        assert seen == reference[path], path
