"""Which hosts serve a registry's images: the registry itself, or what containerd's `certs.d` directory says about it.

Files are read again whenever one has changed. One that is wrong fails the registry it is for, and no other.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import structlog
from yarl import URL

from snapshotter.errors import BadReference, ConfigError
from snapshotter.registry import hostsfile
from snapshotter.registry.endpoint import Endpoint, Version
from snapshotter.registry.reference import DOCKER_HUB, Reference
from snapshotter.registry.tls import TlsContexts

log = structlog.get_logger(__name__)

_MAX_KNOWN = 256  # registries that are remembered


class _Known(NamedTuple):
    """What a directory said, or what is wrong in it, while its files are the same."""

    directory: Path
    files: Mapping[str, Version | None]
    endpoints: tuple[Endpoint, ...] | ConfigError


class Hosts:
    """The hosts of every registry."""

    def __init__(self, directory: str, plain_http: tuple[str, ...], tls: TlsContexts) -> None:
        """`directory` "": every registry serves itself. `plain_http`: those without TLS, besides loopback."""
        self._directory = Path(directory) if directory else None
        self._plain_http = plain_http
        self._tls = tls
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def of(self, reference: Reference) -> tuple[Endpoint, ...]:
        """In the order in which they are tried, the registry itself last. Raises ConfigError, BadReference."""
        found = self._find(reference.host)
        if found is None:
            return (self._origin(reference),)
        known = self._known.get(reference.host)
        if (
            known is None
            or known.directory != found
            or any(hostsfile.version(path) != before for path, before in known.files.items())
        ):
            known = self._known[reference.host] = self._load(found, reference)
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        if isinstance(known.endpoints, ConfigError):
            raise ConfigError(str(known.endpoints))
        return known.endpoints

    def _find(self, host: str) -> Path | None:
        """The directory that is about `host`: `host_port_`, `host:port`, or else `_default`. Raises ConfigError."""
        if self._directory is None or not host:
            return None
        name, colon, port = host.rpartition(":")
        names = [f"{name}_{port}_"] if colon and port.isdigit() else []
        for candidate in (*names, host, "_default"):
            path = self._directory / candidate
            try:
                if path.is_dir():
                    return path
            except OSError as error:
                raise ConfigError(f"hosts_dir: {path}: {error.strerror}") from None
        return None

    def _load(self, directory: Path, reference: Reference) -> _Known:
        file = hostsfile.HostsFile(directory)
        try:
            endpoints = tuple(file.endpoints(self._origin(reference)))
            for endpoint in endpoints:
                self._tls.get(endpoint.tls)  # so that a bad certificate is a bad file, not a bad host
        except ConfigError as error:
            log.error("hosts of a registry cannot be used", registry=reference.host, error=str(error))
            return _Known(directory, file.used, error)
        log.info("hosts of a registry", registry=reference.host, hosts=[str(endpoint.url) for endpoint in endpoints])
        return _Known(directory, file.used, endpoints)

    def _origin(self, reference: Reference) -> Endpoint:
        """The registry itself, as it is spoken to when nothing is configured."""
        host = reference.host
        plain = reference.is_loopback or host in self._plain_http
        try:
            authority = hostsfile.HUB_HOST if host == DOCKER_HUB else host
            url = URL(f"{'http' if plain else 'https'}://{authority}/v2")
        except ValueError:
            url = URL()
        if not url.host:
            raise BadReference(f"image {reference}: not in a registry")
        return Endpoint(host, url)
