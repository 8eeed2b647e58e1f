"""Files and answers about hosts and credentials: whatever is in them, they are read or refused by a typed error."""

import json
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from snapshotter.api.cri_pb2 import AuthConfig, ImageSpec, PullImageRequest
from snapshotter.credentials import kubeconfig, providers
from snapshotter.credentials.matching import key_matches
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.errors import ConfigError, MalformedImage, SnapshotterError
from snapshotter.registry.endpoint import Endpoint
from snapshotter.registry.hostsfile import HostsFile
from snapshotter.service.image_service import read_login

texts = st.text(max_size=20)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
REGISTRY = Endpoint("r.example", URL("https://r.example/v2"))
HOSTS = """server = "https://r.example"
[host."http://m.example:5000/path"]
capabilities = ["pull", "resolve"]
ca = "ca.pem"
client = [["a", "b"]]
dial_timeout = "1s"
header = { x-a = ["b"] }
"""


def spoiled(data: st.DataObject, whole: bytes) -> bytes:
    """`whole` with a piece replaced."""
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 20)))
    return whole[:start] + data.draw(st.binary(max_size=8)) + whole[stop:]


@given(st.data())
def test_hosts_files(data: st.DataObject) -> None:
    with TemporaryDirectory() as directory:
        (Path(directory) / "hosts.toml").write_bytes(spoiled(data, HOSTS.encode()))
        with suppress(ConfigError):
            for host in HostsFile(Path(directory)).endpoints(REGISTRY):
                assert host.url.scheme in ("http", "https")
                assert host.url.host
                assert host.at("team/app/blobs/x").raw_path.endswith("/team/app/blobs/x")


KUBECONFIG = {
    "current-context": "c",
    "clusters": [{"name": "c", "cluster": {"server": "https://h", "certificate-authority-data": "AAAA"}}],
    "users": [{"name": "u", "user": {"token": "t", "client-certificate-data": "AAAA", "client-key-data": "AAAA"}}],
    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
}
PROVIDERS = {
    "kind": "CredentialProviderConfig",
    "providers": [
        {"name": "a", "matchImages": ["*.x"], "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
         "defaultCacheDuration": "1h", "args": ["x"], "env": [{"name": "A", "value": "b"}]}
    ],
}  # fmt: skip


@given(st.data(), st.sampled_from(["bytes", "values"]))
def test_configurations(data: st.DataObject, way: str) -> None:
    for load, document in ((kubeconfig.load, KUBECONFIG), (providers.load, PROVIDERS)):
        with TemporaryDirectory() as directory:
            path = Path(directory) / "config"
            if way == "bytes":
                path.write_bytes(spoiled(data, json.dumps(document).encode()))
            else:
                path.write_text(
                    json.dumps(document | {data.draw(st.sampled_from(sorted(document))): data.draw(values)})
                )
            with suppress(ConfigError):
                load(str(path))


@given(st.data(), texts, texts, texts)
def test_pulls(data: st.DataObject, image: str, word: str, other: str) -> None:
    whole = PullImageRequest(
        image=ImageSpec(image=image or "h.example/a"), auth=AuthConfig(username=word, password=other, auth=word)
    ).SerializeToString()
    for request in (whole, spoiled(data, whole), data.draw(st.binary(max_size=100))):
        with suppress(SnapshotterError):
            sent = read_login(request, 1 << 16)
            assert sent is None or sent.login.secret.expose()


@given(st.data())
def test_packed_logins(data: st.DataObject) -> None:
    whole = msgspec.msgpack.encode([["h", "r", "u", b"s"], ["h", "r", "", b"t"]])
    fd = os.memfd_create("x")
    try:
        os.write(fd, spoiled(data, whole))
        with suppress(MalformedImage):
            RememberedLogins().load(fd)
    finally:
        os.close(fd)


@given(texts, st.sampled_from(["docker.io", "r.example:5000", "[::1]:5000"]))
def test_patterns(pattern: str, host: str) -> None:
    key_matches(pattern, host, "team/app")
