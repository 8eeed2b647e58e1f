"""How Kubernetes says for which images a credential is: patterns of hosts, with a port and the start of a path. Pure.

Source: kubernetes pkg/credentialprovider keyring.go (URLsMatch, BasicDockerKeyring).
"""

from fnmatch import fnmatchcase

from snapshotter.credentials.login import DOCKER_HUB

_HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io")


def matches(pattern: str, host: str, repository: str) -> bool:
    """Whether `pattern` is about a repository of `host`.

    Each label of the host is matched on its own, so `*.io` is not about `a.b.io`; ports must be equal.
    """
    authority, slash, path = _bare(pattern).partition("/")
    labels, port = _split(authority.lower())
    wanted, wanted_port = _split(host)
    return (
        port == wanted_port
        and len(labels) == len(wanted)
        and f"/{repository}".startswith(slash + path)
        and all(fnmatchcase(label, glob.replace("[^", "[!")) for glob, label in zip(labels, wanted, strict=True))
    )


def key_matches(key: str, host: str, repository: str) -> bool:
    """Whether a key of `auths` is about the repository: also a URL, or a name of Docker Hub with or without /v1/."""
    authority, _, path = _bare(key).partition("/")
    for prefix in ("v1", "v2"):
        if path == prefix or path.startswith(f"{prefix}/"):
            path = path[3:]
    if authority in _HUB_NAMES and host == DOCKER_HUB:
        authority = host
    return matches(f"{authority}/{path}" if path else authority, host, repository)


def _bare(name: str) -> str:
    return name.removeprefix("https://").removeprefix("http://")


def _split(authority: str) -> tuple[list[str], str]:
    name, colon, port = authority.rpartition(":")
    if not colon or not port.isdigit():
        name, port = authority, ""
    return name.split("."), port
