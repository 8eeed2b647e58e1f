"""Client of the ocicrypt key provider protocol: an external program or gRPC service unwraps the layer key.

The configuration is ocicrypt's own file (`{"key-providers": {NAME: {"cmd"|"grpc"|"ttrpc": …}}}`). For annotation
`enc.keys.provider.NAME` the packet goes to NAME as JSON, and the private options come back, as base64 (Go) or as an
array of integers (Rust).
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import grpc
import grpc.aio
import structlog

from snapshotter import labels, programs
from snapshotter.config import Limits
from snapshotter.crypto import encoding
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError, KeyDenied, MalformedImage, SnapshotterError, Unavailable
from snapshotter.keys import annotations as enc
from snapshotter.keys import packet, ttrpc, wrapping
from snapshotter.keys.http import is_loopback
from snapshotter.keys.resource import denying

log = structlog.get_logger(__name__)

ANNOTATION_PREFIX: Final = labels.ENC_KEYS_PREFIX + "provider."
WRAP_METHOD: Final = "/keyprovider.KeyProviderService/WrapKey"
UNWRAP_METHOD: Final = "/keyprovider.KeyProviderService/UnWrapKey"
_CONFIG_BYTES = 1 << 20
_REPLY_BYTES = 256 << 10  # an array of integers takes four characters a byte
_TIMEOUT_SECONDS = 50.0  # what the clients of this protocol use


class Endpoint(Protocol):
    """One configured provider."""

    async def call(self, request: bytes, method: str = UNWRAP_METHOD) -> bytes:
        """JSON in, JSON out (at most _REPLY_BYTES). Raises KeyDenied or Unavailable with a text for people."""
        ...


@dataclass(frozen=True, slots=True)
class Command:
    """A program: request on stdin, reply on stdout, exit status 0."""

    path: str
    arguments: tuple[str, ...] = ()

    async def call(self, request: bytes, _method: str = UNWRAP_METHOD) -> bytes:
        """See Endpoint. The request itself says what is wanted."""
        try:
            status, reply = await programs.ask(
                [self.path, *self.arguments], request, limit=_REPLY_BYTES, seconds=_TIMEOUT_SECONDS
            )
        except TimeoutError:
            raise Unavailable(f"{self.path}: no answer within {_TIMEOUT_SECONDS:.0f} s") from None
        except OSError as error:
            raise Unavailable(f"{self.path}: {error.strerror}") from error
        except programs.TooLong:
            raise KeyDenied(f"{self.path}: answers more than {_REPLY_BYTES} bytes") from None
        if status != 0:  # what it wrote is not repeated: it may quote the key
            raise KeyDenied(f"{self.path}: exit status {status}")
        return reply


@dataclass(frozen=True, slots=True)
class Service:
    """A gRPC service; `credentials` None is plaintext, for loopback and Unix sockets."""

    address: str
    credentials: grpc.ChannelCredentials | None = None
    server_name: str = ""

    async def call(self, request: bytes, method: str = UNWRAP_METHOD) -> bytes:
        """See Endpoint."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", _REPLY_BYTES),
            ("grpc.enable_http_proxy", 0),  # a key never passes through a proxy of the environment
        ]
        if self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        channel = (
            grpc.aio.secure_channel(self.address, self.credentials, options=options)
            if self.credentials
            else grpc.aio.insecure_channel(self.address, options=options)
        )
        async with channel:
            # Input and output are messages of one bytes field with number 1. What is none would become None in here.
            rpc: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
            try:
                reply: bytes = await rpc(ttrpc.bytes_field(1, request), timeout=_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError as error:
                text = f"{self.address}: {error.code().name}"  # details are the peer's words and may quote the key
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise Unavailable(text) from None
                raise KeyDenied(text) from None
        with denying(self.address):
            return ttrpc.last_bytes(ttrpc.parse(reply), 1)


@dataclass(frozen=True, slots=True)
class TtrpcService:
    """A ttrpc service, which only ocicrypt-rs knows; CDH is one."""

    client: ttrpc.Client
    who: str

    async def call(self, request: bytes, method: str = UNWRAP_METHOD) -> bytes:
        """See Endpoint."""
        service, _, name = method.strip("/").partition("/")
        answer = await self.client.call(service, name, ttrpc.bytes_field(1, request))
        with denying(self.who):
            return ttrpc.last_bytes(ttrpc.parse(answer), 1)


@dataclass(frozen=True, slots=True)
class ProviderRecipient:
    """A recipient whose packets a key provider makes: `provider:NAME[:TEXT]`, as skopeo writes it."""

    name: str
    text: str
    endpoint: Endpoint

    @property
    def annotation(self) -> str:
        return ANNOTATION_PREFIX + self.name

    def wrap(self, options: SecretBytes) -> bytes:
        """See ocicrypt.Wrapper; blocks until the provider answers. Raises KeyDenied, Unavailable."""
        request = _wrap_request(self.name, self.text, options)
        with ThreadPoolExecutor(1) as pool:  # the caller may have an event loop of its own
            reply = pool.submit(lambda: asyncio.run(self.endpoint.call(request, WRAP_METHOD))).result()
        with denying(f"key provider {self.name}"), _result(reply, self.name, "keywrapresults", "annotation") as made:
            return made.expose()


class ProviderKeys:
    """Layer keys from the providers of an ocicrypt configuration."""

    def __init__(self, endpoints: Mapping[str, Endpoint], *, accept_a256ctr: bool = False) -> None:
        self._endpoints = dict(endpoints)
        self._accept_a256ctr = accept_a256ctr

    @classmethod
    def load(cls, path: Path, *, accept_a256ctr: bool = False) -> "ProviderKeys":
        """Read the file that OCICRYPT_KEYPROVIDER_CONFIG names elsewhere. Raises ConfigError naming the provider."""
        what = f"key provider configuration {path}"
        try:
            with path.open("rb") as file:
                value = encoding.json_object(file.read(_CONFIG_BYTES + 1), what, _CONFIG_BYTES)
        except OSError as error:
            raise ConfigError(f"{what}: {error.strerror}") from error
        except SnapshotterError as error:
            raise ConfigError(str(error)) from None
        providers = value.get("key-providers")
        if not isinstance(providers, dict) or not all(isinstance(entry, dict) for entry in providers.values()):
            raise ConfigError(f"{what}: key-providers is not an object of objects")
        endpoints = {name: _endpoint(entry, f"{what}: {name}") for name, entry in providers.items()}
        return cls(endpoints, accept_a256ctr=accept_a256ctr)

    def recipient(self, name: str, text: str) -> ProviderRecipient:
        """For layers that provider `name` is to wrap, which is told `text`. Raises ConfigError for an unknown one."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            raise ConfigError(f"key provider {name!r}: not configured; there is {', '.join(self._endpoints) or 'none'}")
        return ProviderRecipient(name, text, endpoint)

    async def unwrap(self, annotations: Mapping[str, str], limits: Limits) -> LayerPrivate:
        """See KeyProvider. Asks every configured provider that the layer names, for every packet while it answers."""
        enc.check_size(annotations, limits)
        refusals: list[SnapshotterError] = []
        for name, endpoint in self._endpoints.items():
            for raw in enc.packets(annotations, ANNOTATION_PREFIX + name, limits):
                try:
                    return await self._ask(name, endpoint, raw)
                except SnapshotterError as error:
                    log.info("key provider refused", provider=name, error=str(error), reason=error.reason)
                    refusals.append(error)
                    if isinstance(error, Unavailable):
                        break
        if not refusals:
            present = ", ".join(scheme[:60] for scheme in enc.schemes(annotations)[:8]) or "nothing"
            configured = ", ".join(self._endpoints) or "none"
            raise KeyDenied(f"layer key: wrapped for {present}; configured key providers: {configured}")
        # One that may answer later decides: a retry can help.
        raise next((error for error in refusals if isinstance(error, Unavailable)), refusals[0])

    async def _ask(self, name: str, endpoint: Endpoint, raw: bytes) -> LayerPrivate:
        """A CDH would open an unauthenticated packet without a word, so it is not asked to."""
        if ANNOTATION_PREFIX + name == packet.ANNOTATION and not self._accept_a256ctr:
            packet.check_authenticated(raw)
        with _options(await endpoint.call(_request(raw)), name) as options:
            return LayerPrivate.parse(options, wrapping.recipient(f"provider.{name}", raw) or f"provider:{name}")


def _request(raw: bytes) -> bytes:
    """As Go's ocicrypt writes it; Parameters is an object because Rust peers accept nothing else."""
    unwrap = {"dc": {"Parameters": {}}, "annotation": encoding.b64_encode(raw)}
    wrap = {"ec": None, "optsdata": None}
    request = {"op": "keyunwrap", "keywrapparams": wrap, "keyunwrapparams": unwrap}
    return encoding.json_bytes(request)


def _wrap_request(name: str, text: str, options: SecretBytes) -> bytes:
    parameters = {name: [encoding.b64_encode((text or "Enabled").encode())]}
    wrap = {
        "ec": {"Parameters": parameters, "DecryptConfig": {"Parameters": {}}},
        "optsdata": encoding.b64_encode(options.expose()),
    }
    unwrap = {"dc": None, "annotation": None}
    request = {"op": "keywrap", "keywrapparams": wrap, "keyunwrapparams": unwrap}
    return encoding.json_bytes(request)


def _options(reply: bytes, name: str) -> SecretBytes:
    """The private options in a reply. Raises MalformedImage, which never repeats it."""
    return _result(reply, name, "keyunwrapresults", "optsdata")


def _result(reply: bytes, name: str, results_name: str, member: str) -> SecretBytes:
    what = f"reply of key provider {name}"
    results = encoding.json_object(reply, what, _REPLY_BYTES).get(results_name)
    data = results.get(member) if isinstance(results, dict) else None
    if isinstance(data, str):
        return SecretBytes(encoding.b64_decode(data, what))
    if isinstance(data, list) and all(type(value) is int and 0 <= value < 256 for value in data):
        return SecretBytes(bytes(data))
    raise MalformedImage(f"{what}: {member} is neither base64 nor an array of bytes")


def _endpoint(entry: dict[str, Any], what: str) -> Endpoint:
    command, address, socket = entry.get("cmd"), entry.get("grpc"), entry.get("ttrpc")
    if isinstance(socket, str) and socket.startswith("unix:///") and not (command or address):
        return TtrpcService(ttrpc.Client(socket.removeprefix("unix://")), what)
    if isinstance(command, dict) and isinstance(command.get("path"), str) and address in (None, ""):
        arguments = command.get("args") or []
        if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
            raise ConfigError(f"{what}: cmd.args is not a list of strings")
        return Command(command["path"], tuple(arguments))
    if isinstance(address, str) and address and not command:
        return _service(address, entry.get("grpc-tls"), what)
    raise ConfigError(f"{what}: needs one of cmd.path, grpc and ttrpc (unix:///…); other transports are not supported")


def _service(address: str, tls: Any, what: str) -> Service:
    if tls is None:
        if not (address.startswith("unix:") or is_loopback(address.rpartition(":")[0])):
            raise ConfigError(f"{what}: grpc without grpc-tls is for loopback and unix:, the answer holds a layer key")
        return Service(address)
    if not isinstance(tls, dict) or tls.get("insecure-skip-verify"):
        raise ConfigError(f"{what}: grpc-tls is not an object, or turns verification off, which is not supported")
    texts: Sequence[Any] = [tls.get(name) or "" for name in ("root-ca-file", "cert-file", "key-file", "server-name")]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{what}: grpc-tls has a member that is not a string")
    root, certificate, key, server_name = texts
    try:
        read = [Path(name).read_bytes() if name else None for name in (root, key, certificate)]
    except OSError as error:
        raise ConfigError(f"{what}: grpc-tls: {error.filename}: {error.strerror}") from error
    return Service(address, grpc.ssl_channel_credentials(*read), server_name)
