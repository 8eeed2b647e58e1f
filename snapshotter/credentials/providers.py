"""Credential providers of the kubelet: programs that hand out short-lived logins of a cloud's registry.

Configured by the file that `kubelet --image-credential-provider-config` reads, in JSON. Source: kubernetes
pkg/credentialprovider/plugin, kubelet.config.k8s.io/v1, credentialprovider.kubelet.k8s.io/v1.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import structlog

from snapshotter.credentials.executable import Executables
from snapshotter.credentials.login import Login
from snapshotter.credentials.matching import key_matches, matches
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError, Unavailable

log = structlog.get_logger(__name__)

_API = "credentialprovider.kubelet.k8s.io/v1"
_MAX_BYTES = 1 << 20
_MAX_KEPT = 256
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?(?:ms|s|m|h))+|0")
_DURATION_PART = re.compile(r"([0-9.]+)(ms|s|m|h)")
_UNIT_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_SECONDS = 24 * 3600.0


class _Variable(msgspec.Struct):
    name: str
    value: str


class _Provider(msgspec.Struct, rename="camel"):
    name: str
    match_images: list[str]
    api_version: str
    default_cache_duration: str = "0"
    args: list[str] = []
    env: list[_Variable] = []
    token_attributes: Any = None


class _Config(msgspec.Struct, rename="camel"):
    kind: Literal["CredentialProviderConfig"]
    providers: list[_Provider]


class _Auth(msgspec.Struct):
    username: str = ""
    password: str = ""


class _Response(msgspec.Struct, rename="camel"):
    kind: Literal["CredentialProviderResponse"]
    api_version: Literal["credentialprovider.kubelet.k8s.io/v1"]
    cache_key_type: Literal["Image", "Registry", "Global"]
    cache_duration: str | None = None
    auth: dict[str, _Auth] | None = None


class _Kept(NamedTuple):
    """An answer until it expires, with the patterns that it is for."""

    expires: float
    logins: tuple[tuple[str, Login], ...]


class CredentialProviders:
    """The providers of one configuration file, which is read anew each time."""

    def __init__(
        self, config: str, directory: str, executables: Executables, now: Callable[[], float] = time.monotonic
    ) -> None:
        """`directory` holds the programs."""
        self._config = config
        self._directory = Path(directory)
        self._executables = executables
        self._now = now
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    async def find(self, host: str, repository: str, *, fresh: bool) -> Sequence[Login]:
        """See Logins: the logins of all providers that are for this repository."""
        found: list[Login] = []
        failure: Unavailable | None = None
        for provider in load(self._config):
            if not any(matches(pattern, host, repository) for pattern in provider.match_images):
                continue
            try:
                logins = await self._of(provider, host, repository, fresh)
            except Unavailable as error:
                log.warning("credential provider failed", provider=provider.name, registry=host, error=str(error))
                failure = failure or error
                continue
            # Longer patterns say more; the kubelet sorts the same way.
            found += [
                login for key, login in sorted(logins, key=_key, reverse=True) if key_matches(key, host, repository)
            ]
        if failure is not None and not found:
            raise failure
        return found

    async def _of(self, provider: _Provider, host: str, repository: str, fresh: bool) -> tuple[tuple[str, Login], ...]:
        places = {"Image": f"{host}/{repository}", "Registry": host, "Global": ""}
        for place in places.values():
            kept = self._kept.get((provider.name, place))
            if kept is not None and not fresh and self._now() < kept.expires:
                return kept.logins
        response = await self._ask(provider, places["Image"])
        logins = tuple(
            (pattern, Login(auth.username, SecretBytes(auth.password.encode())))
            for pattern, auth in (response.auth or {}).items()
            if auth.username and auth.password
        )
        stated = response.cache_duration
        seconds = _seconds(provider.default_cache_duration if stated is None else stated)
        key = (provider.name, places[response.cache_key_type])
        self._kept.pop(key, None)
        if seconds:
            self._kept[key] = _Kept(self._now() + min(seconds, _LONGEST_SECONDS), logins)
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return logins

    async def _ask(self, provider: _Provider, image: str) -> _Response:
        program = str(self._directory / provider.name)
        question = {"kind": "CredentialProviderRequest", "apiVersion": _API, "image": image}
        environment = {variable.name: variable.value for variable in provider.env}
        status, output = await self._executables.ask(
            [program, *provider.args], msgspec.json.encode(question), environment
        )
        try:
            if status == 0:
                response = msgspec.json.decode(output, type=_Response)
                _seconds(response.cache_duration or "0")
                return response
        except (ValueError, RecursionError):  # also what msgspec raises
            pass
        raise Unavailable(f"credential program {program}: ends with {status} and no usable answer")


def _key(entry: tuple[str, Login]) -> str:
    return entry[0]


def load(path: str) -> list[_Provider]:
    """Raises ConfigError naming the file, never what it says about environments."""
    what = f"config: registry.credential_providers.config {path}"
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror}") from None
    try:
        providers = msgspec.json.decode(content[:_MAX_BYTES], type=_Config).providers
        for provider in providers:
            if provider.api_version != _API:
                raise ValueError(f"provider {provider.name[:60]!r}: apiVersion must be {_API}")
            if not _NAME.fullmatch(provider.name):
                raise ValueError("a provider's name is the name of a program in bin_dir")
            if provider.token_attributes is not None:
                raise ValueError(f"provider {provider.name}: tokens of pods are not known here (tokenAttributes)")
            _seconds(provider.default_cache_duration)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: {str(error)[:200]}", hint="it must be JSON, which the kubelet reads, too") from None
    return providers


def _seconds(text: str) -> float:
    """A duration as Kubernetes writes it. Raises ValueError."""
    if not _DURATION.fullmatch(text):
        raise ValueError("not a duration")
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in _DURATION_PART.findall(text))
