"""Encrypted layers end to end, and what their annotations must not be."""

import base64
import json
from pathlib import Path

import pytest

from snapshotter import labels
from snapshotter.config import Limits, Size
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError, DecryptError, InvalidArgument, KeyDenied, LimitExceeded, MalformedImage
from snapshotter.keys import jwe, ocicrypt
from snapshotter.keys.provider import FileKeys
from tests.unit.keys.conftest import Pair

PLAIN = b"layer content, canary " * 100
JWE, PUBOPTS = labels.ENC_KEYS_JWE, labels.ENC_PUBOPTS


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def keys(pairs: dict[str, Pair], *names: str) -> FileKeys:
    return FileKeys([pairs[name].private for name in names])


@pytest.fixture(scope="module")
def layer(pairs: dict[str, Pair]) -> tuple[bytes, dict[str, str]]:
    return ocicrypt.encrypt_layer(PLAIN, [pairs["p-256"].spki])


@pytest.mark.parametrize("kind", ["rsa-2048", "rsa-4096", "p-256", "p-384", "p-521"])
async def test_what_was_encrypted_comes_back(pairs: dict[str, Pair], kind: str) -> None:
    cipher, annotations = ocicrypt.encrypt_layer(PLAIN, [pairs[kind].spki])
    assert set(annotations) == {JWE, PUBOPTS}
    assert await ocicrypt.decrypt_layer(cipher, annotations, keys(pairs, kind), Limits()) == PLAIN


async def test_any_of_several_recipients_can_read(pairs: dict[str, Pair]) -> None:
    cipher, annotations = ocicrypt.encrypt_layer(PLAIN, [pairs["rsa-2048"].spki, pairs["p-384"].spki])
    for kind in ("rsa-2048", "p-384"):
        assert await ocicrypt.decrypt_layer(cipher, annotations, keys(pairs, "stranger", kind), Limits()) == PLAIN


async def test_the_key_of_somebody_else_is_refused(pairs: dict[str, Pair], layer: tuple[bytes, dict[str, str]]) -> None:
    for provider in (keys(pairs, "stranger", "rsa-stranger"), FileKeys([])):
        with pytest.raises(KeyDenied) as caught:
            await ocicrypt.decrypt_layer(*layer, provider, Limits())
        assert caught.value.reason == "no-key"
        assert all(kid in str(caught.value) for kid in provider.kids)


async def test_packets_are_tried_until_one_opens(pairs: dict[str, Pair], layer: tuple[bytes, dict[str, str]]) -> None:
    """An added recipient is an added packet; one that nobody here can read does not hide ours."""
    cipher, annotations = layer
    foreign = jwe.wrap(SecretBytes(b"{}"), [pairs["stranger"].spki])
    for others in ([foreign], [b"not a packet"], [foreign, b"{}", foreign]):
        joined = ",".join([*map(b64, others), annotations[JWE]])
        assert (
            await ocicrypt.decrypt_layer(cipher, annotations | {JWE: joined}, keys(pairs, "p-256"), Limits()) == PLAIN
        )


async def test_other_schemes_are_named(pairs: dict[str, Pair], layer: tuple[bytes, dict[str, str]]) -> None:
    cipher, annotations = layer
    named = {PUBOPTS: annotations[PUBOPTS], labels.ENC_KEYS_PREFIX + "provider.attestation-agent": "e30="}
    with pytest.raises(KeyDenied, match=r"provider\.attestation-agent"):
        await ocicrypt.decrypt_layer(cipher, named, keys(pairs, "p-256"), Limits())
    with pytest.raises(KeyDenied, match="wrapped for nothing"):
        await ocicrypt.decrypt_layer(cipher, {PUBOPTS: annotations[PUBOPTS]}, keys(pairs, "p-256"), Limits())


async def test_a_changed_layer_or_mac_is_refused(pairs: dict[str, Pair], layer: tuple[bytes, dict[str, str]]) -> None:
    cipher, annotations = layer
    provider = keys(pairs, "p-256")
    other_cipher, other = ocicrypt.encrypt_layer(PLAIN, [pairs["p-256"].spki])
    for data, changed in (
        (bytes([cipher[0] ^ 1]) + cipher[1:], annotations),
        (cipher[:-1], annotations),
        (b"", annotations),
        (other_cipher, annotations),
        (cipher, annotations | {PUBOPTS: other[PUBOPTS]}),
        (cipher, annotations | {JWE: other[JWE]}),
    ):
        with pytest.raises(DecryptError) as caught:
            await ocicrypt.decrypt_layer(data, changed, provider, Limits())
        assert caught.value.reason == "layer-hmac"


async def test_a_nonce_in_the_public_options_is_refused(
    pairs: dict[str, Pair], layer: tuple[bytes, dict[str, str]]
) -> None:
    """Other readers prefer it to the wrapped one, so whoever edits the manifest could choose it."""
    cipher, annotations = layer
    options = json.loads(base64.b64decode(annotations[PUBOPTS]))
    options["cipheroptions"] = {"nonce": b64(bytes(16))}
    changed = annotations | {PUBOPTS: b64(json.dumps(options).encode())}
    with pytest.raises(MalformedImage, match="cipheroptions are not empty"):
        await ocicrypt.decrypt_layer(cipher, changed, keys(pairs, "p-256"), Limits())


@pytest.mark.parametrize("value", ["", "=", "e30", "e30=\n", " e30=", "e31=", "ä", "e30=,e30=", "e30=e30=", "%"])
async def test_public_options_that_are_not_base64_are_refused(
    pairs: dict[str, Pair], layer: tuple[bytes, dict[str, str]], value: str
) -> None:
    with pytest.raises(MalformedImage):
        await ocicrypt.decrypt_layer(layer[0], layer[1] | {PUBOPTS: value}, keys(pairs, "p-256"), Limits())


@pytest.mark.parametrize("value", [",", "e30=,", "=", "e30", "e30=\n", "e31=", "ä", "e30=;e30="])
async def test_packets_that_are_not_base64_are_refused(
    pairs: dict[str, Pair], layer: tuple[bytes, dict[str, str]], value: str
) -> None:
    with pytest.raises(MalformedImage):
        await ocicrypt.decrypt_layer(layer[0], layer[1] | {JWE: value}, keys(pairs, "p-256"), Limits())


async def test_a_packet_for_us_with_broken_content_is_refused(
    pairs: dict[str, Pair], layer: tuple[bytes, dict[str, str]]
) -> None:
    good = json.dumps({"symkey": b64(bytes(32)), "digest": "", "cipheroptions": {"nonce": b64(bytes(16))}})
    for content in (
        b"{}",
        b"canary",
        b"[]",
        good.replace("symkey", "Symkey").encode(),
        good.replace("==", "").encode(),
    ):
        packet = jwe.wrap(SecretBytes(content), [pairs["p-256"].spki])
        with pytest.raises(MalformedImage, match="private layer options") as caught:
            await ocicrypt.decrypt_layer(layer[0], layer[1] | {JWE: b64(packet)}, keys(pairs, "p-256"), Limits())
        assert "canary" not in str(caught.value)


async def test_everything_is_bounded(pairs: dict[str, Pair], layer: tuple[bytes, dict[str, str]]) -> None:
    cipher, annotations = layer
    provider = keys(pairs, "p-256")
    for limits, changed in (
        (Limits(bootstrap_bytes=Size(len(cipher) - 1)), annotations),
        (Limits(annotation_bytes=Size(100)), annotations),
        (Limits(), annotations | {"x": "y" * 70_000}),
        (Limits(recipients=1), annotations | {JWE: f"{annotations[JWE]},e30="}),
    ):
        with pytest.raises(LimitExceeded) as caught:
            await ocicrypt.decrypt_layer(cipher, changed, provider, limits)
        assert caught.value.reason == "limit"
    many = jwe.wrap(SecretBytes(b"{}"), [pairs["p-256"].spki] * 3)
    with pytest.raises(LimitExceeded):
        await provider.unwrap({JWE: b64(many)}, Limits(recipients=2))


async def test_the_layer_key_is_wiped_after_use(pairs: dict[str, Pair], layer: tuple[bytes, dict[str, str]]) -> None:
    inner, seen = keys(pairs, "p-256"), []

    class Watching:
        async def unwrap(self, annotations: dict[str, str], limits: Limits) -> LayerPrivate:
            seen.append(await inner.unwrap(annotations, limits))
            return seen[-1]

    assert await ocicrypt.decrypt_layer(*layer, Watching(), Limits()) == PLAIN  # type: ignore[arg-type]
    assert len(seen[0].symkey) == 0


def test_recipients_must_be_public_keys(pairs: dict[str, Pair]) -> None:
    with pytest.raises(InvalidArgument, match="recipient 1"):
        ocicrypt.encrypt_layer(PLAIN, [pairs["p-256"].private.read_bytes()])


def test_key_files_are_named_when_they_cannot_be_read(tmp_path: Path, pairs: dict[str, Pair]) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN PRIVATE KEY-----\ncanary\n")
    for path, text in ((tmp_path / "absent.pem", "No such file"), (tmp_path, "directory"), (broken, "not PEM of")):
        with pytest.raises(ConfigError, match=text) as caught:
            FileKeys([pairs["p-256"].private, path])
        assert str(path) in str(caught.value)
        assert "canary" not in f"{caught.value}{caught.value.__cause__!r}"


def test_loading_keys_logs_their_ids_only(pairs: dict[str, Pair], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        loaded = keys(pairs, "p-256")
    assert loaded.kids[0] in repr([record.__dict__ for record in caplog.records])
    body = pairs["p-256"].private.read_text().splitlines()[1]
    assert body not in repr([record.__dict__ for record in caplog.records])


async def test_layers_that_skopeo_encrypted(tmp_path: Path) -> None:
    """tests/vectors/skopeo-layers.json: one layer for each kind of recipient, and one for all of them."""
    vectors = json.loads((Path(__file__).parents[2] / "vectors" / "skopeo-layers.json").read_text())
    for vector in vectors["layers"]:
        for kind in vector["recipients"]:
            path = tmp_path / kind
            path.write_text(vectors["keys"][kind])
            cipher, plain = base64.b64decode(vector["cipher"]), base64.b64decode(vectors["plain"])
            opened = await ocicrypt.decrypt_layer(cipher, vector["annotations"], FileKeys([path]), Limits())
            assert opened == plain
