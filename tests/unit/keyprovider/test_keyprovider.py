"""The key provider for other people's tools: what it answers, and what it does not do."""

import base64
import json
import stat
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import layer
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import (
    InvalidArgument,
    KeyDenied,
    LimitExceeded,
    MalformedImage,
    SnapshotterError,
    Unavailable,
)
from snapshotter.keyprovider.answers import REQUEST_BYTES, Answers
from snapshotter.keyprovider.server import KeyProviderServer
from snapshotter.keys import ocicrypt, packet, protocol
from snapshotter.keys.packet import Kek, Packet, PacketKeys
from snapshotter.keys.protocol import ProviderKeys
from snapshotter.keys.provider import KeyProvider
from snapshotter.keys.resource import ResourceUri

URI = ResourceUri("default", "image-kek", "app")
KEY = b"canary-canary-canary-canary-can!"
PLAIN = b"layer content"
KEYID = f"keyid={URI}"


def kek(uri: ResourceUri = URI, key: bytes = KEY) -> Kek:
    return Kek(uri, SecretBytes(key))


def answers(*keks: Kek, broker: KeyProvider | None = None, allow_paths: bool = False) -> Answers:
    return Answers(keks or [kek()], broker, Limits(), allow_paths=allow_paths)


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def options() -> bytes:
    return layer.encrypt(PLAIN)[2].pack().expose()


def wrapping(text: str | Sequence[str], data: bytes | None = None) -> bytes:
    """As Go's ocicrypt asks."""
    texts = [text] if isinstance(text, str) else text
    ec = {
        "Parameters": {"attestation-agent": [b64(each.encode()) for each in texts]},
        "DecryptConfig": {"Parameters": {}},
    }
    parameters = {"ec": ec, "optsdata": b64(options() if data is None else data)}
    none = {"dc": None, "annotation": None}
    return json.dumps({"op": "keywrap", "keywrapparams": parameters, "keyunwrapparams": none}).encode()


def unwrapping(raw: bytes) -> bytes:
    parameters = {"dc": {"Parameters": {"attestation-agent": [b64(b"Enabled")]}}, "annotation": b64(raw)}
    none = {"ec": None, "optsdata": None}
    return json.dumps({"op": "keyunwrap", "keywrapparams": none, "keyunwrapparams": parameters}).encode()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[KeyProviderServer, str]]:
    running = KeyProviderServer(answers(allow_paths=True))
    yield running, await running.start(str(tmp_path / "kp.sock"))
    await running.stop()
    assert not (tmp_path / "kp.sock").exists()


async def test_a_broker_opens_what_the_given_keys_do_not() -> None:
    other = ResourceUri("default", "image-kek", "other")

    class Broker:
        async def get(self, uri: ResourceUri) -> SecretBytes:
            if uri != other:
                raise KeyDenied("denied by the broker")
            return SecretBytes(bytes(32))

    data = SecretBytes(options())
    served = answers(kek(), broker=PacketKeys(Broker()))
    for made in (kek(), kek(other, bytes(32))):
        reply = json.loads(await served.answer(unwrapping(made.wrap(data))))
        assert bytes(reply["keyunwrapresults"]["optsdata"]) == data.expose()
    with pytest.raises(KeyDenied, match=r"is not one of the keys.*denied by the broker"):
        await served.answer(unwrapping(kek(ResourceUri("a", "b", "c")).wrap(data)))
    with pytest.raises(KeyDenied, match="is not one of the keys"):
        await answers(kek()).answer(unwrapping(kek(other).wrap(data)))


async def test_results_are_arrays_of_integers() -> None:
    data = options()
    reply = json.loads(await answers().answer(wrapping(KEYID, data)))
    made = bytes(reply["keywrapresults"]["annotation"])
    assert Packet.parse(made).open(SecretBytes(KEY)).expose() == data
    assert json.loads(await answers().answer(unwrapping(made))) == {"keyunwrapresults": {"optsdata": list(data)}}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", InvalidArgument),
        ("Enabled", InvalidArgument),
        ("keyid=", InvalidArgument),
        ("keyid=kbs:///a/b", InvalidArgument),
        (f"{KEYID}::{KEYID}", InvalidArgument),
        (f"{KEYID}::sample=true", InvalidArgument),
        (f"{KEYID}::", InvalidArgument),
        ("keypath=/etc/hostname", InvalidArgument),
        ("keyid=kbs:///a/b/c", KeyDenied),
        (f"{KEYID}::algorithm=A256CTR", KeyDenied),
        (f"{KEYID}::algorithm=", KeyDenied),
        (f"{KEYID}::keypath=/etc/hostname", KeyDenied),
        ([], InvalidArgument),
        ([KEYID, KEYID], InvalidArgument),
    ],
)
async def test_what_is_not_wrapped(text: str | list[str], kind: type[SnapshotterError]) -> None:
    with pytest.raises(kind):
        await answers().answer(wrapping(text))


@pytest.mark.parametrize("path", ["/absent", "/dev/zero", "SHORT", "\0"], ids=repr)
async def test_files_that_hold_no_key(tmp_path: Path, path: str) -> None:
    (tmp_path / "short").write_bytes(bytes(31))
    path = path.replace("SHORT", str(tmp_path / "short"))
    with pytest.raises(InvalidArgument):
        await answers(allow_paths=True).answer(wrapping(f"{KEYID}::keypath={path}"))


@pytest.mark.parametrize("data", [b"", b"{}", b"x" * 100, b'{"symkey":"","digest":"","cipheroptions":{}}'])
async def test_only_layer_keys_are_wrapped(data: bytes) -> None:
    with pytest.raises(MalformedImage):
        await answers().answer(wrapping(KEYID, data))


@pytest.mark.parametrize(
    "change",
    [
        {"op": "keyunwrap"},
        {"op": "other"},
        {"op": None},
        {"keywrapparams": None},
        {"keywrapparams": []},
        {"keywrapparams": {}},
        {"keywrapparams": {"ec": None, "optsdata": ""}},
        {"keywrapparams": {"ec": {"Parameters": None}, "optsdata": ""}},
        {"keywrapparams": {"ec": {"Parameters": {"attestation-agent": [1]}}, "optsdata": ""}},
        {"keywrapparams": {"ec": {"Parameters": {"attestation-agent": ["_"]}}, "optsdata": ""}},
        {"keywrapparams": {"ec": {"Parameters": {"attestation-agent": ["/w=="]}}, "optsdata": ""}},
        {"keywrapparams": {"ec": {"Parameters": {"attestation-agent": [b64(KEYID.encode())]}}, "optsdata": "raw {}"}},
        {"keywrapparams": {"ec": {"Parameters": {"attestation-agent": [b64(KEYID.encode())]}}, "optsdata": [1]}},
    ],
    ids=json.dumps,
)
async def test_requests_of_another_form_are_refused(change: dict[str, Any]) -> None:
    request = json.dumps(json.loads(wrapping(KEYID)) | change).encode()
    with pytest.raises(InvalidArgument):
        await answers().answer(request, "keywrap")


async def test_requests_that_are_none_or_too_long() -> None:
    for request in (b"", b"[]", b"{", b'{"op":1,"op":2}', b" " * (REQUEST_BYTES + 1)):
        with pytest.raises(InvalidArgument):
            await answers().answer(request)
    with pytest.raises((KeyDenied, LimitExceeded, MalformedImage)):
        await answers().answer(unwrapping(b"x" * 100_000))


async def test_a_packet_that_does_not_authenticate_is_not_opened() -> None:
    raw = json.loads(kek().wrap(SecretBytes(options())))
    raw |= {"wrap_type": "A256CTR", "iv": b64(bytes(16))}
    with pytest.raises(KeyDenied, match="not authenticated"):
        await answers().answer(unwrapping(json.dumps(raw).encode()))


async def test_errors_and_logs_hold_no_secret(
    server: tuple[KeyProviderServer, str], caplog: pytest.LogCaptureFixture
) -> None:
    data = options()
    texts: list[str] = []
    codes: list[grpc.StatusCode] = []
    with caplog.at_level("DEBUG"):
        async with grpc.aio.insecure_channel(server[1].replace("unix://", "unix:")) as channel:
            for name, request in (
                (protocol.WRAP_METHOD, wrapping(KEYID, data)),
                (protocol.WRAP_METHOD, wrapping(KEYID, data[:-1])),
                (protocol.WRAP_METHOD, unwrapping(kek().wrap(SecretBytes(data)))),
                (protocol.UNWRAP_METHOD, unwrapping(kek().wrap(SecretBytes(data)))),
                (protocol.UNWRAP_METHOD, unwrapping(kek(key=KEY[::-1]).wrap(SecretBytes(data)))),
                (protocol.UNWRAP_METHOD, unwrapping(kek().wrap(SecretBytes(data[:-1])))),
                (protocol.UNWRAP_METHOD, b"x" * (REQUEST_BYTES + 1)),
            ):
                method = channel.unary_unary(name, BytesValue.SerializeToString, BytesValue.FromString)
                try:
                    await method(BytesValue(value=request))
                except grpc.aio.AioRpcError as error:
                    codes.append(error.code())
                    texts.append(str(error.details()))
    assert len(texts) == 5
    assert not {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN} & set(codes)
    symkey = json.loads(data)["symkey"]
    for form in (symkey, base64.b64decode(symkey).hex(), KEY.decode(), KEY[::-1].decode(), b64(KEY)):
        assert form not in caplog.text + "".join(texts)


async def test_where_it_does_not_listen(tmp_path: Path, server: tuple[KeyProviderServer, str]) -> None:
    for address in ("0.0.0.0", "192.0.2.1", "example.org"):
        with pytest.raises(InvalidArgument, match="loopback only"):
            await KeyProviderServer(answers()).start((address, 0))
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "absent" / "x", tmp_path / "kp.sock"):
        with pytest.raises(Unavailable, match=str(path)):
            await KeyProviderServer(answers()).start(str(path))
    assert (tmp_path / "file").read_text() == "mine"


async def test_our_own_client_and_this_provider(server: tuple[KeyProviderServer, str], tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "kp.sock").stat().st_mode) == 0o600
    path = tmp_path / "ocicrypt.json"
    path.write_text(json.dumps({"key-providers": {"attestation-agent": {"grpc": f"unix:{tmp_path}/kp.sock"}}}))
    cipher, annotations = ocicrypt.encrypt_layer(PLAIN, [kek()])
    assert await ocicrypt.decrypt_layer(cipher, annotations, ProviderKeys.load(path), Limits()) == PLAIN
    assert set(annotations) == {packet.ANNOTATION, labels.ENC_PUBOPTS}
