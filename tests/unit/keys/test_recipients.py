"""Recipients of a layer, listed, added and removed by its annotations alone; skopeo reads what is left."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, KeyDenied, LimitExceeded, MalformedImage
from snapshotter.keys import ocicrypt, packet, recipients
from snapshotter.keys.packet import Kek, PacketKeys
from snapshotter.keys.provider import AnyOf, FileKeys
from snapshotter.keys.recipients import Listed
from snapshotter.keys.resource import ResourceUri
from tests.unit.keys.conftest import Pair
from tests.unit.keys.test_skopeo_interop import Layout, skopeo

LIMITS = Limits()
TAR = bytes(10240)
PLAIN = gzip.compress(TAR, mtime=0)
URI = ResourceUri("default", "image-kek", "app")
KEK = Kek(URI, SecretBytes(bytes(range(32))))


class Held:
    async def get(self, uri: ResourceUri) -> SecretBytes:
        if uri != URI:
            raise KeyDenied("another")
        return SecretBytes(KEK.key.expose())


def encrypted(pairs: dict[str, Pair], *kinds: str) -> tuple[bytes, dict[str, str]]:
    return ocicrypt.encrypt_layer(PLAIN, [pairs[kind].spki for kind in kinds])


async def opens(cipher: bytes, annotations: dict[str, str], pair: Pair) -> bool:
    try:
        return await ocicrypt.decrypt_layer(cipher, annotations, FileKeys([pair.private]), LIMITS) == PLAIN
    except KeyDenied:
        return False


def layout(path: Path, cipher: bytes, annotations: dict[str, str]) -> Layout:
    kind, diff_id = labels.MEDIA_LAYER_GZIP_ENCRYPTED, "sha256:" + hashlib.sha256(TAR).hexdigest()
    return Layout.create(path, cipher, diff_id, mediaType=kind, annotations=annotations)


async def with_more(annotations: dict[str, str], key: Pair, more: Sequence[ocicrypt.Recipient]) -> dict[str, str]:
    private = await FileKeys([key.private]).unwrap(annotations, LIMITS)
    return recipients.added(annotations, ocicrypt.wrap(private.pack(), more), LIMITS)


async def test_the_list_names_what_the_packets_say(pairs: dict[str, Pair]) -> None:
    _, annotations = encrypted(pairs, "rsa-2048", "p-384")
    both = await with_more(annotations, pairs["p-384"], [KEK, pairs["p-521"].spki])
    assert recipients.listed(both, LIMITS) == [
        Listed(1, "jwe", "RSA-OAEP", ""),
        Listed(2, "jwe", "ECDH-ES+A256KW", ""),
        Listed(3, "jwe", "ECDH-ES+A256KW", ""),
        Listed(4, "provider.attestation-agent", "A256GCM", str(URI)),
    ]
    assert recipients.listed(both, LIMITS)[3].is_for(URI)
    assert not recipients.listed(both, LIMITS)[0].is_for(URI)


async def test_an_added_recipient_opens_and_the_others_do_still(pairs: dict[str, Pair]) -> None:
    cipher, annotations = encrypted(pairs, "rsa-2048", "p-384")
    more = await with_more(annotations, pairs["p-384"], [pairs["p-521"].spki, pairs["rsa-4096"].spki, KEK])
    assert more[labels.ENC_PUBOPTS] == annotations[labels.ENC_PUBOPTS]
    assert more[labels.ENC_KEYS_JWE].startswith(annotations[labels.ENC_KEYS_JWE] + ",")
    for kind in ("rsa-2048", "p-384", "p-521", "rsa-4096"):
        assert await opens(cipher, more, pairs[kind])
    assert await ocicrypt.decrypt_layer(cipher, more, AnyOf([PacketKeys(Held())]), LIMITS) == PLAIN
    assert not await opens(cipher, more, pairs["stranger"])


@pytest.mark.real
@pytest.mark.parametrize("gone", [[1], [2], [3], [1, 2], [1, 3], [2, 3], [4], [1, 2, 3]], ids=str)
async def test_skopeo_reads_what_is_left(tmp_path: Path, pairs: dict[str, Pair], gone: list[int]) -> None:
    """Three in one packet and one in another: whoever was removed cannot, everybody else can."""
    kinds = ["rsa-2048", "p-384", "p-256", "p-521"]
    cipher, annotations = encrypted(pairs, *kinds[:3])
    annotations = await with_more(annotations, pairs["p-256"], [pairs["p-521"].spki])
    left = recipients.without(annotations, gone, LIMITS)
    assert len(recipients.listed(left, LIMITS)) == 4 - len(gone)
    made = layout(tmp_path / "left", cipher, left)
    for number, kind in enumerate(kinds, 1):
        result = skopeo("--decryption-key", pairs[kind].private, f"oci:{made.path}:t", f"oci:{tmp_path / kind}:t")
        assert (result.returncode != 0) == (number in gone), result.stderr
        assert await opens(cipher, left, pairs[kind]) == (number not in gone)


async def test_nothing_of_a_removed_recipient_is_left(pairs: dict[str, Pair]) -> None:
    _, annotations = encrypted(pairs, "rsa-2048", "p-384")
    first = json.loads(base64.b64decode(annotations[labels.ENC_KEYS_JWE]))["recipients"][0]["encrypted_key"]
    left = recipients.without(annotations, [1], LIMITS)
    assert first not in base64.b64decode(left[labels.ENC_KEYS_JWE]).decode()
    more = await with_more(left, pairs["p-384"], [KEK])
    [named] = [entry.number for entry in recipients.listed(more, LIMITS) if entry.is_for(URI)]
    assert recipients.without(more, [named], LIMITS) == left
    only = recipients.without(more, [1], LIMITS)
    assert set(only) == {packet.ANNOTATION, labels.ENC_PUBOPTS}


async def test_what_cannot_be_removed_or_added(pairs: dict[str, Pair]) -> None:
    _, annotations = encrypted(pairs, "p-256", "p-384")
    with pytest.raises(InvalidArgument, match="last recipient"):
        recipients.without(annotations, [1, 2], LIMITS)
    for number in (0, 3, -1):
        with pytest.raises(InvalidArgument, match=f"recipient {number}: there are 2"):
            recipients.without(annotations, [1, number], LIMITS)
    with pytest.raises(LimitExceeded):
        recipients.added(annotations, {labels.ENC_KEYS_JWE: [b"{}"] * 3}, Limits(recipients=3))
    with pytest.raises(LimitExceeded):
        recipients.added(annotations, {labels.ENC_KEYS_JWE: [bytes(70_000)]}, LIMITS)


@pytest.mark.parametrize("text", ["", "{}", '{"protected":"e30","recipients":[1]}', '{"protected":"!"}'])
def test_packets_that_are_none(text: str) -> None:
    annotations = {labels.ENC_KEYS_JWE: base64.b64encode(text.encode()).decode() or "="}
    with pytest.raises(MalformedImage):
        recipients.listed(annotations, LIMITS)
