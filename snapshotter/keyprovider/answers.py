"""Requests of the key provider protocol and their answers, for the provider name `attestation-agent`.

Wrapped is what is the private options of a layer, under a KEK that is named as CoCo's own provider has it named:
`keyid=kbs:///repository/type/tag[::keypath=FILE][::algorithm=A256GCM]`. Results are arrays of integers, since Rust
reads nothing else and Go reads those, too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import structlog

from snapshotter.config import Limits
from snapshotter.crypto import encoding
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, KeyDenied, LimitExceeded, MalformedImage
from snapshotter.keys import packet
from snapshotter.keys.packet import Kek, PacketKeys
from snapshotter.keys.provider import AnyOf, KeyProvider
from snapshotter.keys.resource import ResourceUri

log = structlog.get_logger(__name__)

REQUEST_BYTES: Final = 256 << 10
NAME: Final = packet.ANNOTATION.rpartition(".")[2]
_WHAT = "key provider request"

Operation: TypeAlias = Literal["keywrap", "keyunwrap"]


class Answers:
    """Answers one request after the other; keeps nothing of them."""

    def __init__(self, keks: Sequence[Kek], broker: KeyProvider | None, limits: Limits, *, allow_paths: bool) -> None:
        """`broker` is asked for packets of other KEKs than `keks`. `allow_paths`: clients may name a file of a KEK."""
        self._given = _Given(keks)
        packets = PacketKeys(self._given)
        self._keys: KeyProvider = packets if broker is None else AnyOf([packets, broker])
        self._limits = limits
        self._allow_paths = allow_paths

    async def answer(self, request: bytes, wanted: Operation | None = None) -> bytes:
        """JSON in, JSON out. `wanted`: what the method says that the request must be.

        Raises InvalidArgument for a request that is none, KeyDenied for a KEK that is not known or an algorithm that is
        not allowed, and what unwrapping raises. No text quotes a secret.
        """
        value = _object(request)
        operation = value.get("op")
        if operation not in ("keywrap", "keyunwrap") or (wanted and operation != wanted):
            raise InvalidArgument(f"{_WHAT}: op is not {wanted or 'keywrap or keyunwrap'}")
        if operation == "keywrap":
            return _reply("keywrapresults", "annotation", self._wrap(_member(value, "keywrapparams")))
        with await self._unwrap(_member(value, "keyunwrapparams")) as options:
            return _reply("keyunwrapresults", "optsdata", options.expose())

    def _wrap(self, parameters: Mapping[str, Any]) -> bytes:
        kek = self._kek(_text(_member(parameters, "ec")))
        with kek.key, SecretBytes(_bytes(parameters, "optsdata")) as options:
            LayerPrivate.parse(options).symkey.wipe()  # nothing else is wrapped under a KEK
            wrapped = kek.wrap(options)
        log.info("layer key wrapped", kid=str(kek.uri))
        return wrapped

    async def _unwrap(self, parameters: Mapping[str, Any]) -> SecretBytes:
        raw = _bytes(parameters, "annotation")
        private = await self._keys.unwrap({packet.ANNOTATION: encoding.b64_encode(raw)}, self._limits)
        with private.symkey:
            return private.pack()

    def _kek(self, text: str) -> Kek:
        """The one that a client asks for, a copy that the caller wipes."""
        pairs = [pair.partition("=")[::2] for pair in text.split("::")]
        said = dict(pairs)
        if len(said) != len(pairs) or not said.keys() <= {"keyid", "keypath", "algorithm"} or "keyid" not in said:
            raise InvalidArgument(
                f"{NAME}: write keyid=kbs:///repository/type/tag[::keypath=FILE][::algorithm=A256GCM]"
            )
        if said.get("algorithm", "A256GCM") != "A256GCM":
            raise KeyDenied(f"{NAME}: algorithm {said['algorithm'][:20]!r} is not allowed, only A256GCM authenticates")
        try:
            uri = ResourceUri.parse(said["keyid"])
        except MalformedImage as error:
            raise InvalidArgument(f"{NAME}: keyid: {error}") from None
        if "keypath" not in said:
            return Kek(uri, self._given.copy(uri))
        if not self._allow_paths:
            raise KeyDenied(f"{NAME}: keypath: this provider reads no files for its clients", hint="--allow-paths")
        return Kek.load(uri, Path(said["keypath"]))


class _Given:
    """Resources that are at hand."""

    def __init__(self, keks: Sequence[Kek]) -> None:
        self._keks = {kek.uri: kek.key for kek in keks}

    async def get(self, uri: ResourceUri) -> SecretBytes:
        """See Resources."""
        return self.copy(uri)

    def copy(self, uri: ResourceUri) -> SecretBytes:
        """Raises KeyDenied."""
        if uri not in self._keks:
            raise KeyDenied(f"{uri}: is not one of the keys that this provider was given")
        return SecretBytes(self._keks[uri].expose())


def _object(request: bytes) -> dict[str, Any]:
    try:
        return encoding.json_object(request, _WHAT, REQUEST_BYTES)
    except (MalformedImage, LimitExceeded) as error:
        raise InvalidArgument(str(error)) from None


def _member(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    if not isinstance(found, dict):
        raise InvalidArgument(f"{_WHAT}: {name} is not an object")
    return found


def _bytes(value: Mapping[str, Any], name: str) -> bytes:
    text = value.get(name)
    try:
        return encoding.b64_decode(text if isinstance(text, str) else "=", _WHAT)
    except MalformedImage:
        raise InvalidArgument(f"{_WHAT}: {name} is not base64") from None


def _text(ec: Mapping[str, Any]) -> str:
    """What stands behind `provider:attestation-agent:`. One packet is one recipient."""
    texts = _member(ec, "Parameters").get(NAME)
    if not isinstance(texts, list) or len(texts) != 1:
        raise InvalidArgument(f"{_WHAT}: needs exactly one {NAME} recipient")
    try:
        return _bytes({NAME: texts[0]}, NAME).decode()
    except UnicodeDecodeError:
        raise InvalidArgument(f"{_WHAT}: {NAME} is not text") from None


def _reply(results: str, member: str, content: bytes) -> bytes:
    return encoding.json_bytes({results: {member: list(content)}})
