"""Image references and locations: `host[:port]/repository[:tag][@digest]`, `docker://…` and `oci:DIR[:tag]`.

The grammar is that of the distribution project (reference/regexp.go), with Docker's short names normalised the way
containerd and Docker do. Parsing never touches a file or the network.
"""

import ipaddress
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

from snapshotter.digest import Digest
from snapshotter.errors import BadReference, InvalidArgument

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]{{2,45}}\])(?::([0-9]{{1,5}}))?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}")
_IMAGE_ID = re.compile(r"[0-9a-f]{64}")

_MAX_TEXT = 1024  # characters; the parts are bounded below
_MAX_HOST = 255 + 6
_MAX_REPOSITORY = 255  # distribution's NameTotalLengthMax

DOCKER_HUB = "docker.io"


@dataclass(frozen=True, slots=True)
class Reference:
    """A named image. `host` is "" for an image in a layout directory, whose path is then `repository`."""

    host: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises BadReference. `busybox` becomes `docker.io/library/busybox`; a tag is not made up."""
        if len(text) > _MAX_TEXT:
            raise BadReference(f"image reference of {len(text)} characters")
        name, at, digest_text = text.partition("@")
        digest = _digest(digest_text, text) if at else None
        name, tag = _cut_tag(name)
        if tag is not None and not _TAG.fullmatch(tag):
            raise BadReference(f"image reference {text!r}: bad tag")
        if _IMAGE_ID.fullmatch(name):
            raise BadReference(f"image reference {text!r}: an image id is not a name")
        host, repository = _split_host(name)
        port = _HOST.fullmatch(host)
        if not port or len(host) > _MAX_HOST or int(port[1] or 1) not in range(1, 65536) or not _address_ok(host):
            raise BadReference(f"image reference {text!r}: bad registry host")
        if not _REPOSITORY.fullmatch(repository) or len(repository) > _MAX_REPOSITORY:
            raise BadReference(f"image reference {text!r}: bad repository name")
        return cls(host, repository, tag, digest)

    def __str__(self) -> str:
        name = f"{self.host}/{self.repository}" if self.host else f"oci:{self.repository}"
        return name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    @property
    def name(self) -> str:
        """`host/repository`; "" for an image in a layout directory, which has no name elsewhere."""
        return f"{self.host}/{self.repository}" if self.host else ""

    @property
    def target(self) -> str:
        """What to ask a registry for: the digest if there is one, else the tag, else `latest`."""
        return self.digest or self.tag or "latest"

    def pinned(self, digest: Digest) -> "Reference":
        """The same repository, exactly this object."""
        return replace(self, tag=None, digest=digest)

    @property
    def is_loopback(self) -> bool:
        """True for `localhost` and loopback addresses, which are spoken to without TLS, as containerd does."""
        return _is_loopback(self.host)


@dataclass(frozen=True, slots=True)
class RegistryLocation:
    """`docker://host/repository…`"""

    reference: Reference

    def __str__(self) -> str:
        return f"docker://{self.reference}"


@dataclass(frozen=True, slots=True)
class LayoutLocation:
    """`oci:DIR[:tag][@digest]`: an OCI image layout directory."""

    path: Path
    tag: str | None = None
    digest: Digest | None = None

    @property
    def reference(self) -> Reference:
        """The image inside the directory, for the methods of `OciLayout`."""
        return Reference("", str(self.path), self.tag, self.digest)

    def __str__(self) -> str:
        slash = "/" if ":" in self.path.name else ""  # or the name's end would read as a tag
        return (
            f"oci:{self.path}{slash}"
            + (f":{self.tag}" if self.tag else "")
            + (f"@{self.digest}" if self.digest else "")
        )


def parse_location(text: str) -> RegistryLocation | LayoutLocation:
    """Read a command line's SRC, DST or REF (skopeo's transports). Raises BadReference."""
    if text.startswith("docker://"):
        return RegistryLocation(Reference.parse(text.removeprefix("docker://")))
    if text.startswith("oci:"):
        return _parse_layout(text.removeprefix("oci:"), text)
    raise BadReference(f"image location {text[:200]!r}: write docker://host/repository[:tag] or oci:DIR[:tag]")


def _parse_layout(rest: str, text: str) -> LayoutLocation:
    """The tag begins at the last colon behind the last slash, so a directory may hold colons but not end in one."""
    if len(rest) > 4096 or "\0" in rest:
        raise BadReference("image location: bad directory")
    path, at, digest_text = rest.rpartition("@")
    digest = None
    if at and digest_text.startswith("sha256:"):
        digest = _digest(digest_text, text)
    else:
        path = rest
    path, tag = _cut_tag(path)
    if not path or (tag is not None and not _TAG.fullmatch(tag)):
        raise BadReference(f"image location {text[:200]!r}: write oci:DIR[:tag]")
    return LayoutLocation(Path(path), tag, digest)


def _cut_tag(name: str) -> tuple[str, str | None]:
    """A colon behind the last slash begins the tag; before it, it belongs to the host's port."""
    colon = name.rfind(":")
    if colon > name.rfind("/"):
        return name[:colon], name[colon + 1 :]
    return name, None


def _digest(digest_text: str, text: str) -> Digest:
    try:
        return Digest.parse(digest_text)
    except InvalidArgument as error:
        raise BadReference(f"image reference {text!r}: {error}") from error


def _split_host(name: str) -> tuple[str, str]:
    """Docker's rule: the first component is a host if it looks like one; otherwise the image is on Docker Hub.

    Hosts are lower-cased so that one registry has one name in policies. (Docker also takes `UPPER/x` for a host; that
    could not be told from `upper/x` on Docker Hub afterwards, and is refused.)
    """
    first, slash, rest = name.partition("/")
    is_host = slash and (first == "localhost" or "." in first or ":" in first)
    host, repository = (first.lower(), rest) if is_host else (DOCKER_HUB, name)
    if host == "index.docker.io":
        host = DOCKER_HUB
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return host, repository


@lru_cache(maxsize=256)
def _is_loopback(host: str) -> bool:
    name = re.sub(r":[0-9]+\Z", "", host)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _address_ok(host: str) -> bool:
    if not host.startswith("["):
        return True
    try:
        ipaddress.IPv6Address(host[1 : host.index("]")])
    except ValueError:
        return False
    return True
