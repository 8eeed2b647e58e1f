"""Annotation packets of CoCo's attestation agent."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import layer
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import DecryptError, KeyDenied, LimitExceeded, MalformedImage, SnapshotterError, Unavailable
from snapshotter.keys import annotations as enc
from snapshotter.keys import ocicrypt, packet
from snapshotter.keys.packet import Kek, Packet, PacketKeys
from snapshotter.keys.resource import ResourceUri
from tests.unit.keys.conftest import Pair

URI = ResourceUri("default", "image-kek", "one")
KEY = bytes(range(32))
PLAIN = b"layer content"


class Broker:
    """Resources in memory; names whom it was asked for."""

    def __init__(self, held: Mapping[str, bytes]) -> None:
        self.held = dict(held)
        self.asked: list[str] = []
        self.away = False

    async def get(self, uri: ResourceUri) -> SecretBytes:
        self.asked.append(str(uri))
        if self.away:
            raise Unavailable("broker is away")
        if str(uri) not in self.held:
            raise KeyDenied(f"{uri}: no such resource")
        return SecretBytes(self.held[str(uri)])


@pytest.fixture
def broker() -> Broker:
    return Broker({str(URI): KEY})


def kek(uri: ResourceUri = URI, key: bytes = KEY) -> Kek:
    return Kek(uri, SecretBytes(key))


def sealed(*keks: Kek) -> tuple[bytes, dict[str, str]]:
    return ocicrypt.encrypt_layer(PLAIN, keks or [kek()])


def packet_of(annotations: Mapping[str, str], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(annotations[packet.ANNOTATION].split(",")[number]))
    return found


def with_packets(annotations: dict[str, str], *packets: object) -> dict[str, str]:
    texts = [base64.b64encode(json.dumps(value).encode()).decode() for value in packets]
    return annotations | {packet.ANNOTATION: ",".join(texts)}


async def test_wrapped_for_a_broker_and_opened_with_its_key(broker: Broker) -> None:
    assert await ocicrypt.decrypt_layer(*sealed(), PacketKeys(broker), Limits()) == PLAIN
    assert broker.asked == [str(URI)]


async def test_both_versions_are_what_other_tools_write_and_read(broker: Broker) -> None:
    _, public, private = layer.encrypt(PLAIN)
    options, nonce = private.pack().expose(), bytes(12)
    version_1 = {
        "kid": str(URI),
        "wrapped_data": base64.b64encode(AESGCM(KEY).encrypt(nonce, options, None)).decode(),
        "iv": base64.b64encode(nonce).decode(),
        "wrap_type": "A256GCM",
    }
    version_2 = version_1 | {"version": "0.1.0", "provider": "kbs", "provider_settings": {}, "annotations": {}}
    for value in (version_1, version_2, version_1 | {"kid": "kbs://kbs.example:8080/default/image-kek/one"}):
        found = await PacketKeys(broker).unwrap(with_packets({}, value), Limits())
        assert found.symkey == private.symkey
    written = json.loads(kek().wrap(private.pack()))
    assert list(written) == list(version_1)
    iv, wrapped = base64.b64decode(written["iv"]), base64.b64decode(written["wrapped_data"])
    assert AESGCM(KEY).decrypt(iv, wrapped, None) == options
    assert public.pack()


async def test_public_keys_and_broker_keys_together(broker: Broker, pairs: dict[str, Pair]) -> None:
    _, annotations = made = ocicrypt.encrypt_layer(PLAIN, [pairs["p-256"].spki, kek()])
    assert enc.schemes(annotations) == ["jwe", "provider.attestation-agent"]
    assert await ocicrypt.decrypt_layer(*made, PacketKeys(broker), Limits()) == PLAIN


async def test_a_second_packet_opens_when_the_first_does_not(broker: Broker) -> None:
    other = ResourceUri("default", "image-kek", "absent")
    assert await ocicrypt.decrypt_layer(*sealed(kek(other), kek()), PacketKeys(broker), Limits()) == PLAIN
    cipher, annotations = sealed()
    broken = with_packets(annotations, {"kid": 1}, packet_of(annotations))
    assert await ocicrypt.decrypt_layer(cipher, broken, PacketKeys(broker), Limits()) == PLAIN


async def test_no_packet_asks_nobody(broker: Broker, pairs: dict[str, Pair]) -> None:
    with pytest.raises(KeyDenied, match="wrapped for jwe"):
        await ocicrypt.decrypt_layer(
            *ocicrypt.encrypt_layer(PLAIN, [pairs["p-256"].spki]), PacketKeys(broker), Limits()
        )
    assert not broker.asked


async def test_a_broker_that_is_away_counts_more_than_a_no(broker: Broker) -> None:
    broker.away = True
    cipher, annotations = sealed()
    with pytest.raises(Unavailable):
        await ocicrypt.decrypt_layer(
            cipher, with_packets(annotations, {"kid": 1}, *[packet_of(annotations)] * 8), PacketKeys(broker), Limits()
        )
    assert len(broker.asked) == 1, "each further packet would wait as long"


async def test_a_packet_that_names_another_key_does_not_open(broker: Broker) -> None:
    other = ResourceUri("default", "image-kek", "two")
    broker.held[str(other)] = bytes(32)
    cipher, annotations = sealed()
    renamed = packet_of(annotations) | {"kid": str(other)}
    with pytest.raises(KeyDenied, match="two: does not open"):
        await ocicrypt.decrypt_layer(cipher, with_packets(annotations, renamed), PacketKeys(broker), Limits())


async def test_a_packet_moved_from_another_image_opens_nothing(broker: Broker) -> None:
    cipher, annotations = sealed()
    moved = with_packets(annotations, packet_of(sealed()[1]))
    with pytest.raises(DecryptError) as caught:
        await ocicrypt.decrypt_layer(cipher, moved, PacketKeys(broker), Limits())
    assert caught.value.reason == "layer-hmac"


@pytest.mark.parametrize("size", [1, 16, 31, 33, 64])
async def test_a_key_of_another_length(broker: Broker, size: int) -> None:
    broker.held[str(URI)] = bytes(size)
    with pytest.raises(KeyDenied, match="instead of 32"):
        await ocicrypt.decrypt_layer(*sealed(), PacketKeys(broker), Limits())


def as_ctr(annotations: Mapping[str, str], known: bytes, wanted: bytes) -> dict[str, Any]:
    """The attack: a GCM packet of a known payload, relabelled as CTR and turned into one of a wanted payload."""
    found = packet_of(annotations)
    stream = base64.b64decode(found["wrapped_data"])[:-16]
    changed = bytes(c ^ k ^ w for c, k, w in zip(stream, known, wanted, strict=True))
    counter = base64.b64decode(found["iv"]) + (2).to_bytes(4, "big")
    return found | {
        "wrap_type": "A256CTR",
        "wrapped_data": base64.b64encode(changed).decode(),
        "iv": base64.b64encode(counter).decode(),
    }


async def test_a_gcm_packet_relabelled_as_ctr_is_not_opened_unless_asked_for(broker: Broker) -> None:
    cipher, public, private = layer.encrypt(PLAIN)
    annotations = enc.build(public, {packet.ANNOTATION: [kek().wrap(private.pack())]})
    forged = LayerPrivate(SecretBytes(b"k" * 32), private.nonce, private.digest)
    attack = with_packets(annotations, as_ctr(annotations, private.pack().expose(), forged.pack().expose()))
    with pytest.raises(KeyDenied, match="A256CTR is not authenticated"):
        await PacketKeys(broker).unwrap(attack, Limits())
    assert not broker.asked
    # Why: with the switch on, a former reader can make images that open with the tenant's secret key.
    assert (await PacketKeys(broker, accept_a256ctr=True).unwrap(attack, Limits())).symkey == forged.symkey
    assert cipher


async def test_an_old_ctr_packet_on_request(broker: Broker) -> None:
    cipher, public, private = layer.encrypt(PLAIN)
    iv = bytes(range(16))
    wrapped = Cipher(algorithms.AES(KEY), modes.CTR(iv)).encryptor().update(private.pack().expose())
    value = {"kid": str(URI), "wrapped_data": base64.b64encode(wrapped).decode(), "wrap_type": "A256CTR"}
    annotations = with_packets(enc.build(public, {}), value | {"iv": base64.b64encode(iv).decode()})
    keys = PacketKeys(broker, accept_a256ctr=True)
    assert await ocicrypt.decrypt_layer(cipher, annotations, keys, Limits()) == PLAIN
    broker.held[str(URI)] = bytes(32)  # nothing says that it is the wrong key, except that garbage is no options
    with pytest.raises(MalformedImage):
        await ocicrypt.decrypt_layer(cipher, annotations, keys, Limits())


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"kid": None}, "kid"),
        ({"kid": "kbs:///a/b"}, "resource"),
        ({"kid": "kbs:///a/b/c/d"}, "resource"),
        ({"kid": "kbs:///a/b/../c"}, "resource"),
        ({"kid": "kbs:///a/b/.c"}, "resource"),
        ({"kid": "kbs:///a/b/c?d=e"}, "resource"),
        ({"kid": "kbs+plugin:///a/b/c"}, "resource"),
        ({"kid": "kbs:///a/b/c\n"}, "resource"),
        ({"kid": "kbs:///a/b/" + "c" * 600}, "resource"),
        ({"wrapped_data": "="}, "wrapped_data"),
        ({"wrapped_data": 7}, "wrapped_data"),
        ({"iv": base64.b64encode(bytes(16)).decode()}, "iv: 16 bytes"),
        ({"iv": None}, "iv"),
        ({"wrap_type": "A128GCM"}, "wrap_type"),
        ({"wrap_type": "A256CTR"}, "iv: 12 bytes"),
        ({"wrap_type": None}, "wrap_type"),
        ({"version": "0.2.0"}, "version"),
        ({"version": None}, "version"),
        ({"provider": None}, "provider"),
        ({"provider_settings": []}, "provider_settings"),
        ({"annotations": None}, "annotations"),
        ({"aad": "AA=="}, "unknown member"),
    ],
)
def test_packets_of_another_form_are_refused_with_the_failed_check(changes: dict[str, Any], check: str) -> None:
    raw = json.dumps(packet_of(sealed()[1]) | changes).encode()
    with pytest.raises(MalformedImage, match=check):
        Packet.parse(raw)


@pytest.mark.parametrize("name", ["kid", "wrapped_data", "iv", "wrap_type"])
def test_packets_without_a_member_are_refused(name: str) -> None:
    value = packet_of(sealed()[1])
    del value[name]
    with pytest.raises(MalformedImage, match=name):
        Packet.parse(json.dumps(value).encode())


def test_packets_of_other_key_services_and_too_long_ones() -> None:
    value = packet_of(sealed()[1])
    with pytest.raises(KeyDenied, match="aliyun"):
        Packet.parse(json.dumps(value | {"provider": "aliyun"}).encode())
    with pytest.raises(LimitExceeded):
        Packet.parse(json.dumps(value | {"annotations": {"a": "x" * 70_000}}).encode())


async def test_every_bit_of_a_wrapped_key_counts(broker: Broker) -> None:
    cipher, annotations = sealed()
    value = packet_of(annotations)
    for name in ("wrapped_data", "iv"):
        raw = base64.b64decode(value[name])
        for at in range(0, len(raw), 7):
            flipped = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
            changed = with_packets(annotations, value | {name: base64.b64encode(flipped).decode()})
            with pytest.raises(KeyDenied):
                await ocicrypt.decrypt_layer(cipher, changed, PacketKeys(broker), Limits())


async def test_errors_and_logs_never_hold_a_key(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    canary = b"canary-canary-canary-canary-can!"
    broker.held[str(URI)] = canary
    texts = []
    with caplog.at_level("DEBUG"):
        assert await ocicrypt.decrypt_layer(*sealed(kek(key=canary)), PacketKeys(broker), Limits()) == PLAIN
        for made in (sealed(), sealed(kek(key=canary[::-1]))):
            with pytest.raises(SnapshotterError) as caught:
                await ocicrypt.decrypt_layer(*made, PacketKeys(broker), Limits())
            texts.append(repr(caught.value) + repr(caught.value.__context__))
    texts += [caplog.text, repr(kek(key=canary))]
    for form in (canary, canary[::-1], base64.b64encode(canary)):
        assert form.decode() not in "".join(texts)
    assert labels.ENC_KEYS_JWE not in "".join(texts)
