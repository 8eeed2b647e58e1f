"""The one configuration file: frozen structs, their defaults, and a strict load.

Every key is explained in deploy/config.toml, which a test holds equal to these defaults. Unknown keys are refused by
path. Sizes are written as integers of bytes or with a unit ("10GiB"); inside the program they are integers.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from snapshotter.errors import ConfigError

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {"": 1, "B": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": 1 << 40}
_SIZE = re.compile(r"(\d{1,15})\s*([KMGT]iB|B)?")
_SHARE = re.compile(r"(\d\d?)%")


class Size(int):
    """A number of bytes."""

    @classmethod
    def parse(cls, text: str) -> "Size":
        match = _SIZE.fullmatch(text.strip())
        if not match:
            raise ValueError(f"not a size: {text[:40]!r}; write bytes or a unit such as '10GiB'")
        return cls(int(match[1]) * _UNITS[match[2] or ""])


class Reserve(str):
    """Space that is to stay free: a size, or a share of the disk such as "5%"."""

    @classmethod
    def parse(cls, text: str) -> "Reserve":
        if not _SHARE.fullmatch(text):
            Size.parse(text)
        return cls(text)

    def of(self, total: int) -> int:
        """In bytes, on a disk of `total`."""
        share = _SHARE.fullmatch(self)
        return total * int(share[1]) // 100 if share else Size.parse(self)


Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Times = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]  # 0: never
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1 << 30)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: immutable, refuses unknown keys."""


class Kbs(Section, frozen=True):
    """A key broker service that is asked directly."""

    url: str = ""  # "" = none
    ca_file: str = ""  # PEM of the only authorities to trust; "" = the system's
    attester: Literal["agent", "rest"] = "agent"
    agent_socket: str = "/run/confidential-containers/attestation-agent/attestation-agent.sock"
    rest_url: str = "http://127.0.0.1:8006"
    tee: str = ""  # for attester "rest"
    insecure_sample_attester: bool = False
    tee_key: Literal["P-256", "P-521", "RSA"] = "P-256"
    init_data: str = ""  # path of the initdata TOML; "" = none is sent
    token_signer: str = ""  # path of a PEM certificate or public key (P-256); "" = not checked against one
    timeout_seconds: Seconds = 60.0  # of one key, with all retries
    retries: Times = 5
    cache_seconds: Annotated[float, msgspec.Meta(ge=0, le=1 << 30)] = 300.0  # a released key is kept in memory; 0 = not


class Cdh(Section, frozen=True):
    """A Confidential Data Hub in this guest."""

    address: str = ""  # "unix:///…" (ttrpc) or "http://127.0.0.1:8006" (REST); "" = none
    unwrap: Literal["cdh", "here"] = "cdh"  # who opens wrapped layer keys


class Keys(Section, frozen=True):
    """Where private keys come from."""

    files: tuple[str, ...] = ()  # PEM (PKCS#8, PKCS#1, SEC1), unencrypted
    ocicrypt_config: str = ""  # path of an ocicrypt key provider configuration; "" = none
    accept_a256ctr: bool = False
    kbs: Kbs = Kbs()
    cdh: Cdh = Cdh()


class RepositoryRule(Section, frozen=True):
    """What images of one host, namespace or repository must be; of several that fit, the longest name counts."""

    name: str = ""
    sealed: bool = False
    authentic: bool = False  # as in mode confidential
    ciphers: tuple[str, ...] = ()  # how layer keys may be wrapped: "A256GCM", "ECDH-ES+A256KW", "RSA-OAEP", "PKCS7", …
    recipients: tuple[str, ...] = ()  # kbs:///…: KEKs that the layer key must be wrapped for, all of them
    secret_kek: bool = False  # opened under one of `recipients` only, which makes the image authentic


class Policy(Section, frozen=True):
    """Which images may run. In mode confidential an image must be authentic whatever this says."""

    require: Literal["any", "sealed", "pinned"] = "any"
    pins: tuple[str, ...] = ()  # host/repo@sha256:…
    file: str = ""  # containers-policy.json: a path, or kbs:///…; "" = none
    lookaside: str = ""  # where simple signatures are: file:///… or https://…
    initdata: str = ""  # path of a measured initdata TOML with more of this section; "" = none
    repositories: tuple[RepositoryRule, ...] = ()


class CredentialProviders(Section, frozen=True):
    """The kubelet's programs for short-lived logins."""

    config: str = ""  # path of a CredentialProviderConfig in JSON; "" = none
    bin_dir: str = ""


class KubeSecrets(Section, frozen=True):
    """Pull secrets in a Kubernetes cluster."""

    kubeconfig: str = ""  # path of a kubeconfig in JSON, or "in-cluster"; "" = none
    namespaces: tuple[str, ...] = ()  # () = all
    label_selector: str = ""


class ImageService(Section, frozen=True):
    """A CRI image service for the kubelet, which passes everything on and remembers logins."""

    listen: str = ""  # path of its Unix socket; "" = none
    backend: str = "/run/containerd/containerd.sock"


class Registry(Section, frozen=True):
    """How registries are spoken to."""

    hosts_dir: str = "/etc/containerd/certs.d"  # hosts.toml files, as containerd reads them; "" = none
    docker_config: str = ""  # path of a docker config.json; "" = none
    plain_http: tuple[str, ...] = ()  # host:port besides loopback
    ca_file: str = ""  # PEM bundle in addition to the system's
    connections: Count = 8  # per host
    connect_timeout_seconds: Seconds = 10.0
    progress_timeout_seconds: Seconds = 30.0  # no byte for this long: abort the read and resume
    total_timeout_seconds: Seconds = 120.0  # then EIO
    retries: Times = 5
    credential_providers: CredentialProviders = CredentialProviders()
    kube_secrets: KubeSecrets = KubeSecrets()
    image_service: ImageService = ImageService()


class Cache(Section, frozen=True):
    """The untrusted ciphertext cache."""

    quota: Size = Size(10 * GiB)  # 0: nothing is kept
    min_free: Reserve = Reserve("5%")  # of the disk that cache_dir is on; with less, the cache shrinks


class Fetch(Section, frozen=True):
    """How much is asked from the registry at once."""

    window: Size = Size(1 * MiB)  # a miss also fetches absent neighbours up to this many stored bytes
    parallel: Count = 8  # ranges in flight per image
    decoded: Size = Size(8 * MiB)  # decoded chunks kept so that neighbouring small reads decode once


class Erofs(Section, frozen=True):
    """How the kernel mounts images."""

    driver: Literal["auto", "file", "loop"] = "auto"
    read_ahead: Size = Size(256 * KiB)


class Log(Section, frozen=True):
    """What is logged, to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class Monitor(Section, frozen=True):
    """Where the node tells about itself over HTTP."""

    listen: str = ""  # "host:port" or "unix:/path"; "" = nowhere


class Limits(Section, frozen=True):
    """Upper bounds on everything that comes from outside. One above is refused with reason=limit."""

    manifest_bytes: Size = Size(4 * MiB)  # manifest or index
    config_bytes: Size = Size(8 * MiB)  # image config
    index_entries: int = 256
    layers: int = 254  # RAFS v6: 8-bit device ids
    encrypted_layer_bytes: Size = Size(16 * GiB)  # one whole encrypted layer as stored
    unpacked_layer_bytes: Size = Size(64 * GiB)  # all files of it
    bootstrap_bytes: Size = Size(256 * MiB)  # bootstrap layer as stored
    bootstrap_unpacked_bytes: Size = Size(1 * GiB)  # all files of it, decompressed
    bootstrap_files: int = 512  # members of its archive
    identity_bytes: Size = Size(1 * MiB)
    blob_bytes: Size = Size(1 << 40)  # one data blob
    chunks: int = (1 << 24) - 1  # of one image
    chunk_bytes: Size = Size(8 * MiB)  # one chunk, decoded
    inodes: int = 10_000_000
    directory_depth: int = 1024
    directory_bytes: Size = Size(256 * MiB)  # dirents of one directory
    xattr_bytes: Size = Size(1 * MiB)  # of one inode
    symlink_bytes: int = 4095
    token_bytes: Size = Size(64 * KiB)  # an answer of a token server
    credential_bytes: Size = Size(64 * KiB)  # an answer of a credential helper or provider, a login sent with a pull
    kube_secrets_bytes: Size = Size(16 * MiB)  # a list of secrets
    annotation_bytes: Size = Size(64 * KiB)  # all annotations of one descriptor
    recipients: int = 64  # wrapped keys of one layer
    tar_entry_header_bytes: Size = Size(1 * MiB)  # PAX or GNU extension records of one tar entry (converter)
    label_bytes: int = 4096  # one label, key and value
    key_bytes: int = 16 * KiB  # a snapshot key or name


class Config(Section, frozen=True):
    """The whole file."""

    mode: Literal["open", "confidential"] = "open"
    root: str = "/var/lib/coco-snapshotter"
    cache_dir: str = "/var/cache/coco-snapshotter"
    address: str = "/run/coco-snapshotter/coco-snapshotter.sock"
    trusted_devices: tuple[str, ...] = ()
    keys: Keys = Keys()
    policy: Policy = Policy()
    registry: Registry = Registry()
    cache: Cache = Cache()
    fetch: Fetch = Fetch()
    erofs: Erofs = Erofs()
    log: Log = Log()
    monitor: Monitor = Monitor()
    limits: Limits = Limits()


def _decode(kind: type, value: Any) -> Any:
    if kind is Size:
        if isinstance(value, str):
            return Size.parse(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return Size(value)
        raise ValueError(f"not a size: {value!r}")
    if kind is Reserve:
        return Reserve.parse(value) if isinstance(value, str) else Reserve(int(_decode(Size, value)))
    raise NotImplementedError(kind)  # pragma: no cover - msgspec asks only for these two


def listen_address(text: str) -> tuple[str, int] | str:
    """Host and port, or the path of a unix socket. Raises ConfigError."""
    if text.startswith("unix:/"):
        return text.removeprefix("unix:")
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z.-]+)):(\d{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise ConfigError(f'config: monitor.listen must be "host:port" or "unix:/path", not {text[:100]!r}')
    return match[1] or match[2], int(match[3])


def load(path: Path | None, **overrides: str | None) -> Config:
    """Read `path` (None: all defaults) and lay the given flags over it. Raises ConfigError naming the key."""
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"config {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # also of UTF-8, and of numbers that Python does not convert
            raise ConfigError(f"config {path}: {error}") from error
    table.update({key: value for key, value in overrides.items() if value is not None})
    try:
        config = msgspec.convert(table, Config, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"config {path or 'flags'}: {error}") from error
    if config.monitor.listen:
        listen_address(config.monitor.listen)
    for name in ("root", "cache_dir", "address"):
        if not getattr(config, name).startswith("/"):
            raise ConfigError(f"config: {name} must be an absolute path, not {getattr(config, name)!r}")
    return config
