"""Key providers: the ocicrypt protocol over a program and over gRPC."""

import asyncio
import base64
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import trustme
from google.protobuf.wrappers_pb2 import BytesValue

from snapshotter import labels
from snapshotter.build.options import load_recipient
from snapshotter.config import Keys, Limits
from snapshotter.crypto import layer
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import (
    ConfigError,
    InvalidArgument,
    KeyDenied,
    LimitExceeded,
    MalformedImage,
    SnapshotterError,
    Unavailable,
)
from snapshotter.keys import annotations as enc
from snapshotter.keys import configured, ocicrypt, protocol
from snapshotter.keys.protocol import ProviderKeys
from snapshotter.keys.provider import AnyOf, FileKeys
from tests.harness.machine import alive, until
from tests.harness.ttrpc import TtrpcServer, field, first_field
from tests.unit.keys import wrapping_provider
from tests.unit.keys.conftest import Pair

PLAIN = b"layer content"
NAME = "tenant"


def program(mode: str) -> dict[str, Any]:
    return {"cmd": {"path": sys.executable, "args": [wrapping_provider.__file__, mode]}}


def configuration(directory: Path, entry: Mapping[str, Any]) -> Path:
    path = directory / "ocicrypt.json"
    path.write_text(json.dumps({"key-providers": {NAME: entry}}))
    return path


def encrypted() -> tuple[bytes, dict[str, str]]:
    cipher, public, private = layer.encrypt(PLAIN)
    options = base64.b64encode(private.pack().expose()).decode()
    reply = wrapping_provider.answer(json.dumps({"op": "keywrap", "keywrapparams": {"optsdata": options}}).encode())
    packet = base64.b64decode(json.loads(reply)["keywrapresults"]["annotation"])
    return cipher, enc.build(public, {protocol.ANNOTATION_PREFIX + NAME: [packet]})


class Server:
    """The wrapping provider as a gRPC service on a loopback port or a Unix socket."""

    def __init__(self) -> None:
        self.server = grpc.aio.server()
        self.mode = "base64"
        self.raw: bytes | None = None  # the whole message, instead of an answer

    async def start(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        methods = {
            name: grpc.unary_unary_rpc_method_handler(self.handle, BytesValue.FromString, self._serialize)
            for name in ("WrapKey", "UnWrapKey")
        }
        handler = grpc.method_handlers_generic_handler("keyprovider.KeyProviderService", methods)
        self.server.add_generic_rpc_handlers((handler,))
        add = self.server.add_secure_port if credentials else self.server.add_insecure_port
        port: int = add(address, credentials) if credentials else add(address)  # type: ignore[call-arg]
        await self.server.start()
        return port

    def _serialize(self, answer: BytesValue) -> bytes:
        return answer.SerializeToString() if self.raw is None else self.raw

    async def handle(self, request: BytesValue, context: grpc.aio.ServicerContext[Any, Any]) -> BytesValue:
        if self.mode == "unimplemented":
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "canary")
        if self.mode == "flood":
            return BytesValue(value=b"x" * (1 << 20))
        return BytesValue(value=wrapping_provider.answer(request.value, self.mode))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    running = Server()
    yield running
    await running.server.stop(None)


@pytest.mark.parametrize("mode", ["base64", "integers"])
async def test_a_program_unwraps_in_either_language(tmp_path: Path, mode: str) -> None:
    provider = ProviderKeys.load(configuration(tmp_path, program(mode)))
    assert await ocicrypt.decrypt_layer(*encrypted(), provider, Limits()) == PLAIN


@pytest.mark.parametrize("mode", ["base64", "integers"])
async def test_a_service_unwraps_in_either_language(tmp_path: Path, server: Server, mode: str) -> None:
    server.mode = mode
    port = await server.start("127.0.0.1:0")
    provider = ProviderKeys.load(configuration(tmp_path, {"grpc": f"127.0.0.1:{port}"}))
    assert await ocicrypt.decrypt_layer(*encrypted(), provider, Limits()) == PLAIN


async def test_a_service_on_a_unix_socket(tmp_path: Path, server: Server) -> None:
    await server.start(f"unix:{tmp_path}/kp.sock")
    provider = ProviderKeys.load(configuration(tmp_path, {"grpc": f"unix:{tmp_path}/kp.sock"}))
    assert await ocicrypt.decrypt_layer(*encrypted(), provider, Limits()) == PLAIN


class Ttrpc(TtrpcServer):
    """The same over ttrpc, as providers written in Rust speak it: results are arrays of integers."""

    def __init__(self, path: Path) -> None:
        methods = ("WrapKey", "UnWrapKey")
        super().__init__(path, {("keyprovider.KeyProviderService", name): self.handle for name in methods})

    async def handle(self, request: bytes) -> tuple[int, bytes]:
        return 0, field(1, wrapping_provider.answer(first_field(request, 1), "integers"))


@pytest.mark.parametrize("transport", ["program", "grpc", "ttrpc"])
async def test_a_provider_wraps_and_unwraps(tmp_path: Path, server: Server, transport: str) -> None:
    entry = program("integers")
    if transport == "grpc":
        entry = {"grpc": f"127.0.0.1:{await server.start('127.0.0.1:0')}"}
    elif transport == "ttrpc":
        entry = {"ttrpc": f"unix://{tmp_path}/kp.sock"}
    path = configuration(tmp_path, entry)
    async with Ttrpc(tmp_path / "kp.sock"):
        recipient = load_recipient(f"provider:{NAME}:some text", str(path))
        made = await asyncio.to_thread(ocicrypt.encrypt_layer, PLAIN, [recipient])
        assert set(made[1]) == {labels.ENC_PUBOPTS, protocol.ANNOTATION_PREFIX + NAME}
        assert await ocicrypt.decrypt_layer(*made, ProviderKeys.load(path), Limits()) == PLAIN


async def test_a_provider_that_cannot_wrap(tmp_path: Path) -> None:
    for entry, kind in (
        (program("fail"), KeyDenied),
        (program("garbage"), KeyDenied),
        ({"cmd": {"path": "/absent"}}, Unavailable),
    ):
        recipient = load_recipient(f"provider:{NAME}", str(configuration(tmp_path, entry)))
        with pytest.raises(kind) as caught:
            await asyncio.to_thread(ocicrypt.encrypt_layer, PLAIN, [recipient])
        assert "canary" not in str(caught.value)
    with pytest.raises(ConfigError, match="'other': not configured; there is tenant"):
        load_recipient("provider:other", str(configuration(tmp_path, program("base64"))))
    with pytest.raises(InvalidArgument, match="ocicrypt_config"):
        load_recipient("provider:tenant")


async def test_a_wrapping_request_is_the_one_that_ocicrypt_sends(tmp_path: Path) -> None:
    class Recorder:
        async def call(self, request: bytes, method: str = "") -> bytes:
            self.seen = method, json.loads(request)
            return b'{"keywrapresults":{"annotation":"AAAA"}}'

    recorder = Recorder()
    assert ProviderKeys({NAME: recorder}).recipient(NAME, "keyid=x").wrap(SecretBytes(b"{}")) == bytes(3)
    parameters = {"Parameters": {NAME: [base64.b64encode(b"keyid=x").decode()]}, "DecryptConfig": {"Parameters": {}}}
    wrap = {"ec": parameters, "optsdata": base64.b64encode(b"{}").decode()}
    wanted = {"op": "keywrap", "keywrapparams": wrap, "keyunwrapparams": {"dc": None, "annotation": None}}
    assert recorder.seen == ("/keyprovider.KeyProviderService/WrapKey", wanted)


async def test_a_service_is_authenticated_by_tls(tmp_path: Path, server: Server) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert("keys.test")
    chain = b"".join(part.bytes() for part in certificate.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
    port = await server.start("127.0.0.1:0", credentials)
    for number, (ca, opens) in enumerate(((authority, True), (stranger, False))):
        ca.cert_pem.write_to_path(str(tmp_path / f"{number}.pem"))
        tls = {"root-ca-file": str(tmp_path / f"{number}.pem"), "server-name": "keys.test"}
        provider = ProviderKeys.load(configuration(tmp_path, {"grpc": f"127.0.0.1:{port}", "grpc-tls": tls}))
        if opens:
            assert await ocicrypt.decrypt_layer(*encrypted(), provider, Limits()) == PLAIN
        else:
            with pytest.raises(Unavailable):
                await ocicrypt.decrypt_layer(*encrypted(), provider, Limits())


@pytest.mark.parametrize(("mode", "kind"), [("fail", KeyDenied), ("garbage", MalformedImage), ("flood", KeyDenied)])
async def test_a_program_that_fails_is_an_error_that_repeats_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, kind: type[SnapshotterError]
) -> None:
    provider = ProviderKeys.load(configuration(tmp_path, program(mode)))
    with caplog.at_level("DEBUG"), pytest.raises(kind) as caught:
        await ocicrypt.decrypt_layer(*encrypted(), provider, Limits())
    assert "canary" not in f"{caught.value!r}{caught.value.__cause__!r}"
    assert "canary" not in caplog.text


async def test_a_program_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_TIMEOUT_SECONDS", 0.3)
    provider = ProviderKeys.load(configuration(tmp_path, program("hang")))
    with pytest.raises(Unavailable, match="no answer"):
        await ocicrypt.decrypt_layer(*encrypted(), provider, Limits())


async def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_TIMEOUT_SECONDS", 0.3)
    script = f"sleep 1000 & echo $! >{tmp_path}/pid; echo '{{}}'"
    provider = ProviderKeys.load(configuration(tmp_path, {"cmd": {"path": "/bin/sh", "args": ["-c", script]}}))
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(Unavailable, match="no answer"):  # somebody still holds the pipe
        await ocicrypt.decrypt_layer(*encrypted(), provider, Limits())
    pid = int((tmp_path / "pid").read_text())
    await asyncio.to_thread(until, lambda: not alive(pid), "it is gone", 10)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


async def test_a_service_that_is_away_is_asked_once_for_all_packets() -> None:
    class Away:
        asked = 0

        async def call(self, request: bytes, method: str = "") -> bytes:
            self.asked += 1
            raise Unavailable("away")

    away = Away()
    cipher, annotations = encrypted()
    name = protocol.ANNOTATION_PREFIX + NAME
    many = annotations | {name: ",".join([annotations[name]] * 8)}
    with pytest.raises(Unavailable):
        await ocicrypt.decrypt_layer(cipher, many, ProviderKeys({NAME: away}), Limits())
    assert away.asked == 1


async def test_a_program_that_is_not_there_may_come_back(tmp_path: Path) -> None:
    provider = ProviderKeys.load(configuration(tmp_path, {"cmd": {"path": str(tmp_path / "absent")}}))
    with pytest.raises(Unavailable, match="absent"):
        await ocicrypt.decrypt_layer(*encrypted(), provider, Limits())


async def test_services_that_refuse_flood_or_are_away(tmp_path: Path, server: Server) -> None:
    port = await server.start("127.0.0.1:0")
    provider = ProviderKeys.load(configuration(tmp_path, {"grpc": f"127.0.0.1:{port}"}))
    for mode in ("unimplemented", "flood"):
        server.mode = mode
        with pytest.raises(KeyDenied) as caught:
            await ocicrypt.decrypt_layer(*encrypted(), provider, Limits())
        assert "canary" not in str(caught.value)
    await server.server.stop(None)
    with pytest.raises(Unavailable):
        await ocicrypt.decrypt_layer(*encrypted(), provider, Limits())


async def test_a_layer_wrapped_for_somebody_else(tmp_path: Path) -> None:
    provider = ProviderKeys.load(configuration(tmp_path, program("base64")))
    cipher, annotations = encrypted()
    moved = {labels.ENC_PUBOPTS: annotations[labels.ENC_PUBOPTS], protocol.ANNOTATION_PREFIX + "other": "e30="}
    with pytest.raises(KeyDenied, match=r"provider\.other; configured key providers: tenant"):
        await ocicrypt.decrypt_layer(cipher, moved, provider, Limits())
    with pytest.raises(LimitExceeded):
        await provider.unwrap({protocol.ANNOTATION_PREFIX + NAME: "e30=,e30=,e30="}, Limits(recipients=2))


async def test_file_keys_and_providers_together(tmp_path: Path, pairs: dict[str, Pair]) -> None:
    provider = ProviderKeys.load(configuration(tmp_path, program("base64")))
    both = AnyOf([FileKeys([pairs["p-256"].private]), provider])
    by_file = ocicrypt.encrypt_layer(PLAIN, [pairs["p-256"].spki])
    for cipher, annotations in (encrypted(), by_file):
        assert await ocicrypt.decrypt_layer(cipher, annotations, both, Limits()) == PLAIN
    strange = ocicrypt.encrypt_layer(PLAIN, [pairs["stranger"].spki])
    with pytest.raises(KeyDenied, match=r"none of 1 private keys.*configured key providers: tenant"):
        await ocicrypt.decrypt_layer(*strange, both, Limits())
    away = AnyOf([FileKeys([]), ProviderKeys.load(configuration(tmp_path, {"cmd": {"path": "/absent"}}))])
    with pytest.raises(Unavailable):
        await ocicrypt.decrypt_layer(*encrypted(), away, Limits())
    with pytest.raises(KeyDenied, match="no key provider"):
        await ocicrypt.decrypt_layer(*encrypted(), AnyOf([]), Limits())


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"keyunwrapresults": None},
        {"keyunwrapresults": []},
        {"keyunwrapresults": {}},
        *(
            {"keyunwrapresults": {"optsdata": data}}
            for data in (None, 1, True, {}, "=", "e30", [256], [-1], [True], ["1"], [1.0], [], "")
        ),
    ],
    ids=json.dumps,
)
async def test_replies_of_another_form_are_refused(reply: object) -> None:
    class Fixed:
        async def call(self, request: bytes) -> bytes:
            return json.dumps(reply).encode()

    with pytest.raises(MalformedImage):
        await ocicrypt.decrypt_layer(*encrypted(), ProviderKeys({NAME: Fixed()}), Limits())


async def test_a_reply_cut_anywhere_is_refused() -> None:
    class CutsShort:
        length: int | None = None

        async def call(self, request: bytes, method: str = "") -> bytes:
            return wrapping_provider.answer(request)[: self.length]

    provider = CutsShort()
    made, keys = encrypted(), ProviderKeys({NAME: provider})
    assert await ocicrypt.decrypt_layer(*made, keys, Limits()) == PLAIN
    for provider.length in range(len(await replying(made))):
        with pytest.raises(MalformedImage):
            await ocicrypt.decrypt_layer(*made, keys, Limits())


async def replying(made: tuple[bytes, dict[str, str]]) -> bytes:
    """What the wrapping provider would reply to the request for this layer."""
    request = protocol._request(base64.b64decode(made[1][protocol.ANNOTATION_PREFIX + NAME]))
    return wrapping_provider.answer(request)


async def test_a_message_of_a_service_cut_anywhere_is_refused(tmp_path: Path, server: Server) -> None:
    port = await server.start("127.0.0.1:0")
    made, keys = encrypted(), ProviderKeys.load(configuration(tmp_path, {"grpc": f"127.0.0.1:{port}"}))
    whole = BytesValue(value=await replying(made)).SerializeToString()
    server.raw = whole
    assert await ocicrypt.decrypt_layer(*made, keys, Limits()) == PLAIN
    for length in range(len(whole)):
        server.raw = whole[:length]
        check = r"127\.0\.0\.1.*protobuf: " if length else "reply of key provider tenant"  # an empty one is protobuf
        with pytest.raises((KeyDenied, MalformedImage), match=check) as caught:
            await ocicrypt.decrypt_layer(*made, keys, Limits())
        assert isinstance(caught.value, KeyDenied) == bool(length)


@pytest.mark.parametrize(
    ("raw", "check"),
    [
        (b"\xff", "protobuf: not a number"),
        (b"\x08\x01", "protobuf: field 1 is not bytes"),
        (b"\x0b", "protobuf: a field of no known type"),
        (b"\x02\x00", "protobuf: cut short"),
        (b"\x12\x02{}", "reply of key provider tenant: not a JSON object"),  # field 2
        (b"\x0a\x02[]", "reply of key provider tenant: not a JSON object"),
        (b"\x0a\x01\xff", "reply of key provider tenant: not a JSON object"),
    ],
    ids=str,
)
async def test_a_message_of_a_service_of_another_type_is_refused(
    tmp_path: Path, server: Server, raw: bytes, check: str
) -> None:
    port = await server.start("127.0.0.1:0")
    server.raw = raw
    keys = ProviderKeys.load(configuration(tmp_path, {"grpc": f"127.0.0.1:{port}"}))
    with pytest.raises((KeyDenied, MalformedImage), match=check):
        await ocicrypt.decrypt_layer(*encrypted(), keys, Limits())


async def test_what_a_program_writes_cut_short_is_refused(tmp_path: Path) -> None:
    made = encrypted()
    whole = await replying(made)
    (tmp_path / "reply").write_bytes(whole)
    for length in (*range(0, len(whole), 29), len(whole) - 1, len(whole)):
        head = {"path": "/usr/bin/head", "args": ["-c", str(length), str(tmp_path / "reply")]}
        keys = ProviderKeys.load(configuration(tmp_path, {"cmd": head}))
        if length == len(whole):
            assert await ocicrypt.decrypt_layer(*made, keys, Limits()) == PLAIN
            return
        with pytest.raises(MalformedImage, match="reply of key provider tenant: not a JSON object"):
            await ocicrypt.decrypt_layer(*made, keys, Limits())


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"cmd": {}},
        {"cmd": {"path": 1}},
        {"cmd": {"path": "/x", "args": "y"}},
        {"cmd": {"path": "/x", "args": [1]}},
        {"grpc": ""},
        {"grpc": 1},
        {"grpc": "a:1", "cmd": {"path": "/x"}},
        {"grpc": "keys.example:50000"},  # in plaintext, and not to this machine
        {"grpc": "dns:///127.0.0.1.keys.example:50000"},
        {"ttrpc": "tcp://x"},
        {"grpc": "a:1", "grpc-tls": []},
        {"grpc": "a:1", "grpc-tls": {"insecure-skip-verify": True}},
        {"grpc": "a:1", "grpc-tls": {"root-ca-file": "/absent"}},
        {"grpc": "a:1", "grpc-tls": {"root-ca-file": 1}},
    ],
    ids=json.dumps,
)
def test_configurations_that_cannot_work_are_refused_by_name(tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=NAME):
        ProviderKeys.load(configuration(tmp_path, entry))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"key-providers":[]}', '{"key-providers":{"a":1}}', "{" * 9000])
def test_files_that_are_no_configuration_are_refused_by_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ocicrypt.json"
    path.write_text(text)
    for wrong in (path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=str(wrong)):
            ProviderKeys.load(wrong)


async def test_a_layer_that_ocicrypt_encrypted_through_this_provider(tmp_path: Path) -> None:
    vector = json.loads((Path(__file__).parents[2] / "vectors" / "ocicrypt-provider.json").read_text())
    provider = ProviderKeys.load(configuration(tmp_path, program("base64")))
    cipher = base64.b64decode(vector["cipher"])
    opened = await ocicrypt.decrypt_layer(cipher, vector["annotations"], provider, Limits())
    assert opened == vector["plain"].encode()


async def test_the_request_is_the_one_that_ocicrypt_sends() -> None:
    seen: list[bytes] = []

    class Recording:
        async def call(self, request: bytes) -> bytes:
            seen.append(request)
            return wrapping_provider.answer(request)

    assert await ocicrypt.decrypt_layer(*encrypted(), ProviderKeys({NAME: Recording()}), Limits()) == PLAIN
    head, _, annotation = seen[0].partition(b'"annotation":"')
    assert head == (
        b'{"op":"keyunwrap","keywrapparams":{"ec":null,"optsdata":null},"keyunwrapparams":{"dc":{"Parameters":{}},'
    )
    assert annotation.endswith(b'"}}')


async def test_the_configuration_names_files_and_providers(tmp_path: Path, pairs: dict[str, Pair]) -> None:
    files = (str(pairs["p-256"].private),)
    path = configuration(tmp_path, program("base64"))
    by_file, by_provider = ocicrypt.encrypt_layer(PLAIN, [pairs["p-256"].spki]), encrypted()
    both = configured.provider(Keys(files=files, ocicrypt_config=str(path)))
    for made in (by_file, by_provider):
        assert await ocicrypt.decrypt_layer(*made, both, Limits()) == PLAIN
    with pytest.raises(KeyDenied):
        await ocicrypt.decrypt_layer(*by_provider, configured.provider(Keys(files=files)), Limits())
    with pytest.raises(ConfigError, match="absent"):
        configured.provider(Keys(ocicrypt_config=str(tmp_path / "absent")))


def test_private_options_of_a_provider_are_parsed_as_strictly_as_any() -> None:
    with pytest.raises(MalformedImage):
        LayerPrivate.parse(SecretBytes(b'{"symkey":"","cipheroptions":{}}'))


def test_a_program_does_not_inherit_our_place_before_the_memory_killer() -> None:
    own = Path("/proc/self/oom_score_adj")
    before = own.read_text()
    own.write_text("300")  # lower ones are not for everybody to set
    try:
        command = protocol.Command("/bin/sh", ("-c", "read request; cat /proc/self/oom_score_adj"))
        assert asyncio.run(command.call(b"{}\n")) == b"0\n"
    finally:
        own.write_text(before)
