"""Who we are to a registry: a user with a password, or an identity token; and the seam where such logins come from."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import Unavailable

log = structlog.get_logger(__name__)

DOCKER_HUB = "docker.io"


@dataclass(frozen=True, slots=True)
class Login:
    """`username` is "" for an identity token, which is traded for access tokens."""

    username: str
    secret: SecretBytes

    def basic(self) -> str:
        """Value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(self.username.encode() + b":" + self.secret.expose()).decode()


class Logins(Protocol):
    """Where logins come from."""

    async def find(self, host: str, repository: str, *, fresh: bool) -> Sequence[Login]:
        """Logins for a repository of `host` (as in a reference: `docker.io` for Docker Hub), the best first.

        `fresh`: those found before were refused, so no cache may answer. Raises ConfigError, or Unavailable when
        somebody who would have to be asked does not answer.
        """


class AllLogins:
    """Several sources in order. One that does not answer does not keep the others from being heard."""

    def __init__(self, sources: Sequence[Logins]) -> None:
        self._sources = tuple(sources)

    async def find(self, host: str, repository: str, *, fresh: bool) -> Sequence[Login]:
        """See Logins. Raises Unavailable only when no source has a login."""
        found: list[Login] = []
        failure: Unavailable | None = None
        for source in self._sources:
            try:
                found += await source.find(host, repository, fresh=fresh)
            except Unavailable as error:
                log.warning("credentials cannot be asked for", registry=host, error=str(error))
                failure = failure or error
        if failure is not None and not found:
            raise failure
        return found
