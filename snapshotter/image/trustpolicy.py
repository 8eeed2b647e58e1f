"""containers-policy.json(5): which signatures an image needs, by scope. Parsing and lookup only; keys are names here.

Supported: reject, insecureAcceptAnything, sigstoreSigned with keys (cosign), signedBy with GPG keys; all signedIdentity
kinds. Whatever else the format knows (Fulcio, Rekor, PKI) is refused when the policy is read: half a check is none.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from snapshotter.crypto import encoding
from snapshotter.errors import BadReference, ConfigError, LimitExceeded, MalformedImage
from snapshotter.registry.reference import Reference

MAX_BYTES = 1 << 20
_WHAT = "policy.json"

_WILDCARD = re.compile(r"\*(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)+")

Key: TypeAlias = str | bytes  # a file, a kbs:/// resource, or the key itself


@dataclass(frozen=True, slots=True)
class Identity:
    """Which docker-reference a signature must state. `names`: those of the kinds that have some."""

    kind: Literal[
        "matchExact", "matchRepoDigestOrExact", "matchRepository", "exactReference", "exactRepository", "remapIdentity"
    ]
    names: tuple[str, ...] = ()

    def accepts(self, wanted: Reference, stated: str) -> bool:
        """Whether a signature for `stated` is one for the image that was asked for as `wanted`."""
        try:
            signed = Reference.parse(stated)
        except BadReference:
            return False
        name, signed_name = wanted.name, signed.name
        match self.kind:
            case "matchRepository":
                return signed_name == name
            case "exactRepository":
                return signed_name == Reference.parse(self.names[0]).name
            case "exactReference":
                return signed == Reference.parse(self.names[0])
            case "matchExact":
                return wanted.digest is None and signed == _tagged(wanted)
            case "remapIdentity":
                name = _remapped(name, *self.names)
        if wanted.digest is not None:  # the digest is checked against the signature's own
            return signed_name == name
        return signed_name == name and signed.digest is None and signed.tag == _tagged(wanted).tag


@dataclass(frozen=True, slots=True)
class Signed:
    """At least one signature by one of `keys` is needed."""

    kind: Literal["sigstoreSigned", "signedBy"]
    keys: tuple[Key, ...]
    identity: Identity


Requirement: TypeAlias = Literal["reject", "accept"] | Signed


@dataclass(frozen=True, slots=True)
class Rule:
    """The requirements of one scope; all must hold. `scope` is what the log shows: "default", or where it was found."""

    scope: str
    requirements: tuple[Requirement, ...]


class TrustPolicy:
    """A whole policy.json."""

    def __init__(self, default: Rule, docker: Mapping[str, Rule]) -> None:
        self._default = default
        self._docker = docker

    @classmethod
    def parse(cls, raw: bytes, name: str) -> "TrustPolicy":
        """Raises ConfigError naming `name` and what is wrong in it."""
        try:
            return cls._parse(raw)
        except (MalformedImage, LimitExceeded, BadReference) as error:
            raise ConfigError(f"policy {name}: {error}") from None

    @classmethod
    def _parse(cls, raw: bytes) -> "TrustPolicy":
        value = encoding.json_object(raw, _WHAT, MAX_BYTES)
        encoding.members(value, _WHAT, required=("default",), optional=("transports",))
        transports = value.get("transports", {})
        scopes = {
            transport: {scope: _rule(f"{transport}:{scope}", listed) for scope, listed in _object(found).items()}
            for transport, found in _object(transports).items()
        }
        docker = scopes.get("docker", {})
        for scope in docker:
            _check_scope(scope)
        return cls(_rule("default", value["default"]), docker)

    def rule(self, reference: Reference) -> Rule:
        """The most specific scope that covers `reference`."""
        for scope in _scopes(reference):
            if scope in self._docker:
                return self._docker[scope]
        return self._default


def _scopes(reference: Reference) -> Iterator[str]:
    """From the exact reference down to every image: tag or digest, repository, namespaces, host, domains, ""."""
    name = reference.name
    if reference.digest is not None:
        yield f"{name}@{reference.digest}"
    if reference.digest is None or reference.tag is not None:
        yield f"{name}:{reference.tag or 'latest'}"
    while name:
        yield name
        name = name.rpartition("/")[0]
    domain = reference.host.partition(":")[0].partition(".")[2]
    while domain:
        yield f"*.{domain}"
        domain = domain.partition(".")[2]
    yield ""


def _check_scope(scope: str) -> None:
    """A scope in a form that no reference has (`busybox`, `Registry.example/app`) would silently never match."""
    if not scope or _WILDCARD.fullmatch(scope):
        return
    host, slash, _ = scope.partition("/")
    whole = Reference.parse(scope if slash else f"{scope}/x")
    matched = [str(whole), whole.name.replace("/library/", "/", 1)]  # docker.io/x may be meant as a namespace
    if host != whole.host or (slash and scope not in matched):
        raise MalformedImage(
            f"{_WHAT}: docker:{scope[:100]}: matches no image; write the name in full and in lower case, as in "
            "docker.io/library/busybox"
        )


def _rule(scope: str, listed: Any) -> Rule:
    if not isinstance(listed, list) or not listed:
        raise MalformedImage(f"{_WHAT}: {scope[:100]}: not a list of requirements")
    return Rule(scope, tuple(_requirement(_object(item), f"{_WHAT}: {scope[:100]}") for item in listed))


def _requirement(value: dict[str, Any], where: str) -> Requirement:
    kind = value.get("type")
    if kind in ("reject", "insecureAcceptAnything"):
        encoding.members(value, where, required=("type",))
        return "reject" if kind == "reject" else "accept"
    if kind == "sigstoreSigned":
        optional = ("keyPath", "keyPaths", "keyData", "keyDatas", "signedIdentity")
        encoding.members(value, where, required=("type",), optional=optional)
        return Signed("sigstoreSigned", _keys(value, where), _identity(value, where))
    if kind == "signedBy":
        encoding.members(
            value, where, required=("type", "keyType"), optional=("keyPath", "keyPaths", "keyData", "signedIdentity")
        )
        if value["keyType"] != "GPGKeys":
            raise MalformedImage(f"{where}: keyType {str(value['keyType'])[:40]!r} is not supported, only GPGKeys")
        return Signed("signedBy", _keys(value, where), _identity(value, where))
    raise MalformedImage(f"{where}: requirement type {str(kind)[:40]!r} is not supported")


def _keys(value: dict[str, Any], where: str) -> tuple[Key, ...]:
    """Exactly one of the four members says which keys."""
    given = [name for name in ("keyPath", "keyPaths", "keyData", "keyDatas") if name in value]
    if len(given) != 1:
        raise MalformedImage(f"{where}: needs exactly one of keyPath, keyPaths, keyData and keyDatas")
    [name] = given
    listed = value[name] if name.endswith("s") else [value[name]]
    if not isinstance(listed, list) or not listed or not all(isinstance(item, str) and item for item in listed):
        raise MalformedImage(f"{where}: {name} is not a name or a list of names")
    if name.startswith("keyPath"):
        return tuple(listed)
    try:
        return tuple(base64.b64decode(item, validate=True) for item in listed)
    except ValueError:  # also for what is not ASCII
        raise MalformedImage(f"{where}: {name} is not base64") from None


def _identity(value: dict[str, Any], where: str) -> Identity:
    """Default as in containers/image: matchRepoDigestOrExact. (cosign states no tag; matchRepository fits it.)"""
    stated = _object(value.get("signedIdentity", {"type": "matchRepoDigestOrExact"}))
    kind = stated.get("type")
    members: dict[str, tuple[str, ...]] = {
        "matchExact": (),
        "matchRepoDigestOrExact": (),
        "matchRepository": (),
        "exactReference": ("dockerReference",),
        "exactRepository": ("dockerRepository",),
        "remapIdentity": ("prefix", "signedPrefix"),
    }
    if not isinstance(kind, str) or kind not in members:
        raise MalformedImage(f"{where}: signedIdentity type {str(kind)[:40]!r} is not supported")
    encoding.members(stated, f"{where}: signedIdentity", required=("type", *members[kind]))
    names = tuple(encoding.string(stated, member, f"{where}: signedIdentity") for member in members[kind])
    for name in names if kind.startswith("exact") else ():
        Reference.parse(name)
    return Identity(kind, names)  # type: ignore[arg-type]  # one of the members


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedImage(f"{_WHAT}: not an object where one is needed")
    return value


def _tagged(reference: Reference) -> Reference:
    return Reference(reference.host, reference.repository, reference.tag or "latest")


def _remapped(name: str, prefix: str, signed_prefix: str) -> str:
    """`prefix` itself or anything below it moves to `signed_prefix`; other names stay."""
    if name == prefix or name.startswith(f"{prefix.rstrip('/')}/"):
        return signed_prefix + name[len(prefix) :]
    return name
