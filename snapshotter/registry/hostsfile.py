"""What one directory of `certs.d` says about a registry: a hosts.toml, or certificates as Docker lays them out.

Sources: containerd docs/hosts.md, and core/remotes/docker/config for what the document leaves open.
"""

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
from yarl import URL

from snapshotter.errors import ConfigError
from snapshotter.registry.endpoint import Endpoint, File, Tls, Version
from snapshotter.registry.reference import DOCKER_HUB

HUB_HOST = "registry-1.docker.io"

_MAX_FILE = 1 << 20
_MAX_HOSTS = 64
_MAX_CERTIFICATES = 64
_CAPABILITIES = frozenset({"pull", "resolve", "push", "referrers"})
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?(?:ns|us|µs|ms|s|m|h))+")
_DURATION_PART = re.compile(r"([0-9.]+)([a-zµ]+)")
_UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]{0,8192}")


class _Host(msgspec.Struct):
    """What may be said about one host. Unknown keys are for other readers."""

    capabilities: list[str] = []
    ca: str | list[str] = []
    client: str | list[str | list[str]] = []
    skip_verify: bool = False
    header: dict[str, str | list[str]] = {}
    override_path: bool = False
    dial_timeout: str = ""


class _Document(_Host):
    """A hosts.toml. What stands on its top level is about `server`."""

    server: str = ""
    host: dict[str, _Host] = {}


def version(path: str | Path) -> Version | None:
    """What changes when a file is replaced or written; None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class HostsFile:
    """`used`: every file that was looked at, with its version then."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.used: dict[str, Version | None] = {}

    def endpoints(self, registry: Endpoint) -> Iterator[Endpoint]:
        """The hosts for `registry`, in the order of the file, the registry last. Raises ConfigError."""
        path = self._directory / "hosts.toml"
        content = self._read(path)
        try:
            if content is None:
                yield from self._with_certificates(registry)
                return
            document = msgspec.convert(tomllib.loads(content.decode()), _Document)
            if len(document.host) > _MAX_HOSTS:
                raise ValueError(f"more than {_MAX_HOSTS} hosts")
            for url, host in document.host.items():
                yield from self._configured(_endpoint(url, host.override_path, registry), host)
            server = _endpoint(document.server, document.override_path, registry) if document.server else registry
            yield from self._configured(server, document)
        except (ValueError, msgspec.ValidationError, RecursionError) as error:  # also of TOML and UTF-8
            raise ConfigError(f"hosts_dir: {path}: {str(error)[:200]}") from None

    def _with_certificates(self, registry: Endpoint) -> Iterator[Endpoint]:
        """`*.crt` are authorities, `*.cert` with their `*.key` are client certificates."""
        try:
            self.used[str(self._directory)] = version(self._directory)
            names = sorted(os.listdir(self._directory))
        except OSError as error:
            raise ConfigError(f"hosts_dir: {self._directory}: {error.strerror}") from None
        authorities = [name for name in names if name.endswith(".crt")][:_MAX_CERTIFICATES]
        clients: list[str | list[str]] = []
        for name in [name for name in names if name.endswith(".cert")][:_MAX_CERTIFICATES]:
            key = name.removesuffix(".cert") + ".key"
            clients.append([name, key] if key in names else name)
        return self._configured(registry, _Host(ca=authorities, client=clients))

    def _configured(self, endpoint: Endpoint, host: _Host) -> Iterator[Endpoint]:
        """`endpoint` as `host` says. Plain HTTP with settings for TLS means HTTPS where that works, else HTTP."""
        capabilities = {capability.lower() for capability in host.capabilities} or _CAPABILITIES
        if unknown := capabilities - _CAPABILITIES:
            raise ValueError(f"unknown capability {min(unknown)[:40]!r}")
        endpoint = replace(
            endpoint,
            headers=tuple(_header(name, value) for name, value in host.header.items()),
            connect_seconds=_seconds(host.dial_timeout) if host.dial_timeout else None,
            pulls="pull" in capabilities,
            resolves="resolve" in capabilities,
            pushes="push" in capabilities,
        )
        tls = Tls(
            tuple(self._file(name) for name in ([host.ca] if isinstance(host.ca, str) else host.ca)),
            tuple(self._pair(both) for both in ([host.client] if isinstance(host.client, str) else host.client)),
            host.skip_verify,
        )
        if tls == Tls():
            yield endpoint
        elif endpoint.url.scheme == "https":
            yield replace(endpoint, tls=tls)
        else:
            if (port := endpoint.url.port) != 80:
                yield replace(endpoint, tls=tls, url=endpoint.url.with_scheme("https").with_port(port))
            yield endpoint

    def _pair(self, names: str | list[str]) -> tuple[File, File]:
        certificate, *key = [names] if isinstance(names, str) else names or [""]
        if len(key) > 1 or not certificate:
            raise ValueError("client: a pair is a certificate and a key")
        return self._file(certificate), self._file(key[0] if key else certificate)

    def _file(self, name: str) -> File:
        """Relative names are relative to the directory."""
        path = os.path.join(self._directory, name)
        self.used[path] = version(path)
        return File(path, self.used[path])

    def _read(self, path: Path) -> bytes | None:
        """None: there is no such file, or nothing in it."""
        self.used[str(path)] = version(path)
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_FILE + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"hosts_dir: {path}: {error.strerror}") from None
        if len(content) > _MAX_FILE:
            raise ConfigError(f"hosts_dir: {path}: longer than {_MAX_FILE} bytes")
        return content or None


def _endpoint(text: str, override_path: bool, registry: Endpoint) -> Endpoint:
    """A host by its URL. Raises ValueError, which does not show a password."""
    try:
        url = URL(text if "://" in text else f"https://{text}")
    except ValueError:
        raise ValueError("a host's name is not a URL") from None
    if url.raw_user is not None or url.raw_password is not None or url.raw_query_string or url.raw_fragment:
        raise ValueError("a host's URL must not hold a user, password, query or fragment")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{text[:100]!r} is not the URL of a host")
    path = url.raw_path.rstrip("/")
    if not override_path and not path.endswith("/v2"):
        path += "/v2"
    authority = url.raw_authority.lower()
    name = DOCKER_HUB if authority == HUB_HOST else authority
    namespace = "" if name == registry.host else registry.host
    return Endpoint(name, url.with_path(path or "/", encoded=True), namespace)


def _header(name: str, value: str | list[str]) -> tuple[str, str]:
    text = value if isinstance(value, str) else ", ".join(value)
    if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(text):
        raise ValueError("header: not a name and a value of HTTP")
    return "-".join(part.capitalize() for part in name.split("-")), text


def _seconds(text: str) -> float:
    """A duration as Go writes it."""
    if not _DURATION.fullmatch(text):
        raise ValueError("dial_timeout: write a duration such as '5s'")
    parts = _DURATION_PART.findall(text)
    return max(0.001, sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts))
