"""One host that can be asked for an image: the registry itself or a mirror, and how it is spoken to."""

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from yarl import URL

Version: TypeAlias = tuple[int, int, int]  # of a file: inode, size, time of modification


class File(NamedTuple):
    """A file with certificates or keys, and what tells that it was replaced."""

    path: str
    version: Version | None


@dataclass(frozen=True, slots=True)
class Tls:
    """How a host's TLS differs from the default."""

    authorities: tuple[File, ...] = ()  # in addition to the system's
    client: tuple[tuple[File, File], ...] = ()  # certificate, key
    skip_verify: bool = False


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`host` is the name that credentials use, `url` the root of the API with its path."""

    host: str
    url: URL
    namespace: str = ""  # the registry that a mirror is asked for; "": it is that registry
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # may hold secrets: to this origin only
    tls: Tls | None = None
    connect_seconds: float | None = None
    pulls: bool = True
    resolves: bool = True  # may say what a tag means
    pushes: bool = True

    def at(self, path: str) -> URL:
        """The URL of an object below the root of the API."""
        url = self.url.with_path(f"{self.url.raw_path.rstrip('/')}/{path}", encoded=True)
        return url.with_query(ns=self.namespace) if self.namespace else url

    @property
    def own_headers(self) -> dict[str, str]:
        """What every request to this origin carries."""
        return dict(self.headers)


class Scope(NamedTuple):
    """What a token is for (distribution docs/spec/auth/scope.md)."""

    repository: str
    actions: str

    def __str__(self) -> str:
        return f"repository:{self.repository}:{self.actions}"
