"""Keys from a Confidential Data Hub, over ttrpc and REST."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from snapshotter.config import Cdh, Keys, Limits
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError, KeyDenied, LimitExceeded, MalformedImage, SnapshotterError, Unavailable
from snapshotter.keys import cdh, configured, ocicrypt, packet
from snapshotter.keys.cdh import CdhRestResources
from snapshotter.keys.packet import Kek, Packet, PacketKeys
from snapshotter.keys.provider import KeyProvider
from snapshotter.keys.resource import ResourceUri
from snapshotter.registry.retry import SystemClock
from tests.harness.cdh import Hub, Rest

URI = ResourceUri("default", "image-kek", "one")
KEY = b"canary-canary-canary-canary-can!"
PLAIN = b"layer content"


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    made = Hub(tmp_path / "cdh.sock", "default/image-kek/one", KEY)
    async with made.server:
        yield made


def provider(address: str, unwrap: Any = "here") -> KeyProvider:
    return cdh.provider(Cdh(address=address, unwrap=unwrap), accept_a256ctr=False)


def sealed(uri: ResourceUri = URI, key: bytes = KEY) -> tuple[bytes, dict[str, str]]:
    return ocicrypt.encrypt_layer(PLAIN, [Kek(uri, SecretBytes(key))])


@pytest.mark.parametrize(("unwrap", "method"), [("cdh", "UnWrapKey"), ("here", "GetResource")])
async def test_layers_open_over_ttrpc(hub: Hub, unwrap: str, method: str) -> None:
    keys = provider(f"unix://{hub.server.path}", unwrap)
    assert await ocicrypt.decrypt_layer(*sealed(), keys, Limits()) == PLAIN
    assert hub.server.calls == [method]


@pytest.mark.parametrize("unwrap", ["cdh", "here"])
async def test_what_cdh_refuses(hub: Hub, unwrap: str, caplog: pytest.LogCaptureFixture) -> None:
    keys = provider(f"unix://{hub.server.path}", unwrap)
    with caplog.at_level("DEBUG"):
        for made in (sealed(ResourceUri("a", "b", "c"), bytes(32)), sealed(key=bytes(32))):
            with pytest.raises(KeyDenied) as caught:
                await ocicrypt.decrypt_layer(*made, keys, Limits())
            assert "canary" not in repr(caught.value)
    assert "canary" not in caplog.text


@pytest.mark.parametrize("unwrap", ["cdh", "here"])
async def test_a_cdh_that_is_away(tmp_path: Path, unwrap: str) -> None:
    with pytest.raises(Unavailable):
        await ocicrypt.decrypt_layer(*sealed(), provider(f"unix://{tmp_path}/absent", unwrap), Limits())


@pytest.mark.parametrize("way", ["cdh", "ocicrypt_config"])
async def test_cdh_is_not_asked_to_open_what_is_not_authenticated(hub: Hub, tmp_path: Path, way: str) -> None:
    address = f"unix://{hub.server.path}"
    configuration = tmp_path / "ocicrypt.json"
    configuration.write_text(json.dumps({"key-providers": {"attestation-agent": {"ttrpc": address}}}))
    keys = Keys(cdh=Cdh(address=address)) if way == "cdh" else Keys(ocicrypt_config=str(configuration))
    cipher, annotations = sealed()
    good = annotations[packet.ANNOTATION]
    value = json.loads(base64.b64decode(annotations[packet.ANNOTATION]))
    for changes in ({"wrap_type": "A256CTR"}, {"wrap_type": "a256ctr"}, {"wrap_type": None}, {"wrap_type": [1]}):
        text = base64.b64encode(json.dumps(value | changes).encode()).decode()
        with pytest.raises(KeyDenied, match="not authenticated"):
            await ocicrypt.decrypt_layer(
                cipher, annotations | {packet.ANNOTATION: text}, configured.provider(keys), Limits()
            )
        assert not hub.server.calls
    both = annotations | {packet.ANNOTATION: f"{text},{good}"}
    assert await ocicrypt.decrypt_layer(cipher, both, configured.provider(keys), Limits()) == PLAIN


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"keyunwrapresults":{"optsdata":[256]}}', b"\xff"])
async def test_replies_to_unwrap_of_another_form(hub: Hub, raw: bytes) -> None:
    hub.reply = raw
    with pytest.raises(MalformedImage):
        await ocicrypt.decrypt_layer(*sealed(), provider(f"unix://{hub.server.path}", "cdh"), Limits())


@pytest.mark.parametrize("resource", [b"", b"x", bytes(33), bytes(3 << 20)], ids=len)
async def test_resources_that_are_no_key(hub: Hub, resource: bytes) -> None:
    hub.resource = resource
    with pytest.raises(KeyDenied):
        await ocicrypt.decrypt_layer(*sealed(), provider(f"unix://{hub.server.path}"), Limits())


@pytest.fixture
async def rest() -> AsyncIterator[Rest]:
    async with Rest(KEY) as made:
        yield made


async def test_layers_open_over_rest(rest: Rest) -> None:
    assert await ocicrypt.decrypt_layer(*sealed(), provider(rest.url), Limits()) == PLAIN
    assert rest.paths == ["/cdh/resource/default/image-kek/one"]


@pytest.mark.parametrize(
    ("status", "kind"), [(400, KeyDenied), (403, KeyDenied), (404, KeyDenied), (302, KeyDenied), (500, Unavailable)]
)
async def test_what_rest_answers(rest: Rest, status: int, kind: type[SnapshotterError]) -> None:
    rest.status = status
    with pytest.raises(kind, match=str(status)) as caught:
        await ocicrypt.decrypt_layer(*sealed(), provider(rest.url), Limits())
    assert "canary" not in str(caught.value)


async def test_a_rest_that_hangs(rest: Rest) -> None:
    rest.silent = asyncio.Event()
    resources = CdhRestResources(rest.url, SystemClock(), timeout_seconds=0.3)
    with pytest.raises(Unavailable):
        await ocicrypt.decrypt_layer(*sealed(), PacketKeys(resources), Limits())


async def test_a_reply_to_unwrap_cut_anywhere(hub: Hub) -> None:
    made, keys = sealed(), provider(f"unix://{hub.server.path}", "cdh")
    annotation = base64.b64decode(made[1][packet.ANNOTATION])
    with Packet.parse(annotation).open(SecretBytes(KEY)) as options:
        whole = json.dumps({"keyunwrapresults": {"optsdata": list(options.expose())}}).encode()
    hub.reply = whole
    assert await ocicrypt.decrypt_layer(*made, keys, Limits()) == PLAIN
    for length in range(len(whole)):
        hub.reply = whole[:length]
        with pytest.raises(MalformedImage):
            await ocicrypt.decrypt_layer(*made, keys, Limits())


async def test_a_reply_to_unwrap_without_end(hub: Hub) -> None:
    for size in (300 << 10, 5 << 20):  # above what a key provider may say, and above what ttrpc carries
        hub.reply = b" " * size
        with pytest.raises((LimitExceeded, KeyDenied, Unavailable)):
            await ocicrypt.decrypt_layer(*sealed(), provider(f"unix://{hub.server.path}", "cdh"), Limits())


@pytest.mark.parametrize("body", [b"", b"x" * 33, bytes(3 << 20)], ids=len)
async def test_rest_bodies_that_are_no_key(rest: Rest, body: bytes) -> None:
    rest.body = body
    with pytest.raises(KeyDenied):
        await ocicrypt.decrypt_layer(*sealed(), provider(rest.url), Limits())


@pytest.mark.parametrize(
    ("address", "unwrap"),
    [
        ("unix://relative", "cdh"),
        ("http://127.0.0.1:8006", "cdh"),
        ("http://192.0.2.1:8006", "here"),
        ("https://cdh.example", "here"),
        ("/run/cdh.sock", "here"),
        ("http://127.0.0.1:8006/cdh", "here"),
    ],
)
def test_addresses_that_are_not_this_guests(address: str, unwrap: str) -> None:
    with pytest.raises(ConfigError, match=r"keys\.cdh"):
        provider(address, unwrap)


async def test_the_configuration_names_a_hub(hub: Hub) -> None:
    keys = Keys(cdh=Cdh(address=f"unix://{hub.server.path}"))
    assert configured.any_configured(keys)
    assert await ocicrypt.decrypt_layer(*sealed(), configured.provider(keys), Limits()) == PLAIN
    assert not configured.any_configured(Keys())
