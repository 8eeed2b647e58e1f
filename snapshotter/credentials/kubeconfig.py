"""Where the Kubernetes API is and who we are to it: a kubeconfig in JSON, or the service account of our pod.

Source: kubernetes client-go tools/clientcmd, rest/config.go.
"""

import base64
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from yarl import URL

from snapshotter.errors import ConfigError
from snapshotter.files import seal_memfd

IN_CLUSTER = "in-cluster"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_MAX_BYTES = 1 << 20
_MAX_TOKEN = 64 << 10


class _Cluster(msgspec.Struct, rename="kebab"):
    server: str
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False


class _User(msgspec.Struct, rename="kebab"):
    token: str = ""
    token_file: str = msgspec.field(default="", name="tokenFile")
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    exec: Any = None


class _Context(msgspec.Struct):
    cluster: str
    user: str


class _NamedCluster(msgspec.Struct):
    name: str
    cluster: _Cluster


class _NamedUser(msgspec.Struct):
    name: str
    user: _User


class _NamedContext(msgspec.Struct):
    name: str
    context: _Context


class _Kubeconfig(msgspec.Struct, rename="kebab"):
    current_context: str
    clusters: list[_NamedCluster]
    users: list[_NamedUser]
    contexts: list[_NamedContext]


@dataclass(frozen=True, slots=True)
class Api:
    """An API server and our name there: a token, a client certificate in `tls`, or neither."""

    server: URL
    tls: ssl.SSLContext
    token_file: Path | None
    fixed_token: str

    def token(self) -> str:
        """Read anew each time: tokens of service accounts are short-lived. Raises OSError."""
        if self.token_file is None:
            return self.fixed_token
        with self.token_file.open("rb") as file:
            return file.read(_MAX_TOKEN).decode("ascii", "replace").strip()


def load(kubeconfig: str) -> Api:
    """Raises ConfigError, which shows nothing of the content. Read for each use: certificates in it are renewed."""
    if kubeconfig == IN_CLUSTER:
        return _in_cluster()
    what = f"config: registry.kube_secrets.kubeconfig {kubeconfig}"
    path = Path(kubeconfig)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES)
        config = msgspec.json.decode(content, type=_Kubeconfig)
        context = {item.name: item.context for item in config.contexts}[config.current_context]
        cluster = {item.name: item.cluster for item in config.clusters}[context.cluster]
        user = {item.name: item.user for item in config.users}[context.user]
        if user.exec is not None:
            raise ConfigError(f"{what}: users with exec plugins are not supported")
        token_file = path.parent / user.token_file if user.token_file else None
        return Api(_server(cluster.server), _tls(path.parent, cluster, user), token_file, user.token)
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror if not isinstance(error, ssl.SSLError) else 'not PEM'}") from None
    except (ValueError, KeyError, RecursionError):
        raise ConfigError(f"{what}: not a kubeconfig with a current context, in JSON") from None


def _in_cluster() -> Api:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    try:
        if not host:
            raise ValueError
        server = _server(f"https://{f'[{host}]' if ':' in host else host}:{port}")
        return Api(server, ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt")), _ACCOUNT / "token", "")
    except (ValueError, OSError):
        raise ConfigError("config: registry.kube_secrets.kubeconfig: this is no pod with a service account") from None


def _server(text: str) -> URL:
    url = URL(text)
    if url.scheme != "https" or not url.host or url.user is not None or url.raw_query_string:
        raise ValueError("server")
    return url


def _tls(directory: Path, cluster: _Cluster, user: _User) -> ssl.SSLContext:
    authorities = cluster.certificate_authority_data
    context = ssl.create_default_context(
        cafile=str(directory / cluster.certificate_authority) if cluster.certificate_authority else None,
        cadata=base64.b64decode(authorities).decode() if authorities else None,
    )
    if cluster.insecure_skip_tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    certificate = _content(directory, user.client_certificate, user.client_certificate_data)
    if certificate:
        key = _content(directory, user.client_key, user.client_key_data)
        fd = seal_memfd("client", [(0, certificate + b"\n" + key)])  # OpenSSL reads files only
        try:
            context.load_cert_chain(f"/proc/self/fd/{fd}", password=lambda: "")
        finally:
            os.close(fd)
    return context


def _content(directory: Path, path: str, data: str) -> bytes:
    """What is in the document itself counts more than what is in a file."""
    if data:
        return base64.b64decode(data)
    if not path:
        return b""
    with (directory / path).open("rb") as file:
        return file.read(_MAX_BYTES)
