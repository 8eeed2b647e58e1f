"""Pull secrets of a cluster, from an API server on loopback with TLS: pages, selectors, tokens, outages."""

import base64
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web

from snapshotter.config import KubeSecrets
from snapshotter.credentials import kubeconfig
from snapshotter.credentials.kubesecrets import KubernetesSecrets
from snapshotter.errors import ConfigError, Unavailable
from tests.harness.sim_registry import docker_config


class Api:
    """The part of an API server that lists secrets."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.secrets: dict[str, list[dict[str, Any]]] = {}
        self.token = "api-token"
        self.status = 200
        self.page = 500
        self.asked: list[dict[str, str]] = []
        self.authority, self.people = trustme.CA(), trustme.CA()
        self.port = 0

    def add(self, namespace: str, registry: str, password: str, kind: str = "kubernetes.io/dockerconfigjson") -> None:
        data = base64.b64encode(docker_config(registry, "user", password).encode()).decode()
        self.secrets.setdefault(namespace, []).append({"type": kind, "data": {".dockerconfigjson": data}})

    async def answer(self, request: web.Request) -> web.Response:
        certificate = request.get_extra_info("peercert")
        if request.headers.get("Authorization") != f"Bearer {self.token}" and not certificate:
            return web.json_response({"kind": "Status", "message": "hunter2"}, status=401)
        self.asked.append({"path": request.path, **request.query})
        namespace = request.match_info.get("namespace")
        found = [s for n, secrets in self.secrets.items() for s in secrets if namespace in (None, n)]
        start = int(request.query.get("continue", "0"))
        following = str(start + self.page) if start + self.page < len(found) else ""
        document = {"metadata": {"continue": following}, "items": found[start : start + self.page]}
        return web.json_response(document, status=self.status)

    def kubeconfig(self, **user: str) -> str:
        (self.directory / "ca.pem").write_bytes(self.authority.cert_pem.bytes())
        cluster = {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": "ca.pem"}
        document = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [
                {"name": "other", "cluster": {"server": "https://nowhere.example"}},
                {"name": "c", "cluster": cluster},
            ],
            "users": [{"name": "u", "user": user or {"token": self.token}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        }  # fmt: skip
        path = self.directory / "kubeconfig"
        path.write_text(json.dumps(document))
        return str(path)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    api = Api(tmp_path)
    app = web.Application()
    app.router.add_get("/api/v1/secrets", api.answer)
    app.router.add_get("/api/v1/namespaces/{namespace}/secrets", api.answer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    api.authority.issue_cert("127.0.0.1").configure_cert(context)
    api.people.configure_trust(context)
    context.verify_mode = ssl.CERT_OPTIONAL
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    api.port = runner.addresses[0][1]
    api.add("default", "registry.example", "word")
    yield api
    await runner.cleanup()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def passwords(secrets: KubernetesSecrets, host: str = "registry.example", *, fresh: bool = False) -> list[bytes]:
    return [login.secret.expose() for login in await secrets.find(host, "team/app", fresh=fresh)]


async def test_secrets_of_all_namespaces_are_found_page_by_page(api: Api) -> None:
    api.page = 2
    for index in range(4):
        api.add(f"n{index}", f"r{index}.example", f"word{index}")
    api.add("n9", "registry.example", "opaque", kind="Opaque")
    api.secrets["n9"].append({"type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": "broken"}})
    api.add("n9", "registry.example/team", "closer")
    api.add("n9", "*.example", "any")
    secrets = KubernetesSecrets(KubeSecrets(api.kubeconfig()), 1 << 20)
    assert await passwords(secrets) == [b"closer", b"word", b"any"]
    assert await passwords(secrets, "r3.example") == [b"word3", b"any"]
    assert await passwords(secrets, "other") == []
    assert len(api.asked) == 5
    assert api.asked[0] == {
        "path": "/api/v1/secrets", "fieldSelector": "type=kubernetes.io/dockerconfigjson", "limit": "500"
    }  # fmt: skip


async def test_namespaces_and_labels_can_be_chosen(api: Api) -> None:
    api.add("team", "registry.example", "ours")
    api.add("others", "registry.example", "theirs")
    config = KubeSecrets(api.kubeconfig(), namespaces=("team", "empty"), label_selector="a=b")
    assert await passwords(KubernetesSecrets(config, 1 << 20)) == [b"ours"]
    assert [asked["path"] for asked in api.asked] == [
        "/api/v1/namespaces/team/secrets", "/api/v1/namespaces/empty/secrets"
    ]  # fmt: skip
    assert api.asked[0]["labelSelector"] == "a=b"


@pytest.mark.allow_warnings
async def test_the_list_is_renewed_and_survives_an_outage(api: Api) -> None:
    clock = Clock()
    secrets = KubernetesSecrets(KubeSecrets(api.kubeconfig()), 1 << 20, clock)
    assert await passwords(secrets) == [b"word"]
    api.secrets.clear()
    api.add("default", "registry.example", "rotated")
    clock.now += 59
    assert await passwords(secrets) == [b"word"]
    assert await passwords(secrets, fresh=True) == [b"rotated"]
    assert await passwords(secrets, fresh=True) == [b"rotated"]
    assert len(api.asked) == 2
    api.status = 500
    clock.now += 61
    assert await passwords(secrets) == [b"rotated"]
    assert await passwords(secrets) == [b"rotated"]
    assert len(api.asked) == 3
    with pytest.raises(Unavailable, match="the API answers 500"):
        await passwords(KubernetesSecrets(KubeSecrets(api.kubeconfig()), 1 << 20))


async def test_a_token_file_is_read_anew_and_a_certificate_opens_too(api: Api) -> None:
    clock = Clock()
    (api.directory / "token").write_text("api-token\n")
    secrets = KubernetesSecrets(KubeSecrets(api.kubeconfig(tokenFile="token")), 1 << 20, clock)
    assert await passwords(secrets) == [b"word"]
    api.token = "rotated"
    (api.directory / "token").write_text("rotated\n")
    clock.now += 61
    assert await passwords(secrets) == [b"word"]
    issued = api.people.issue_cert("me@example")
    encoded = [base64.b64encode(pem.bytes()).decode() for pem in (issued.cert_chain_pems[0], issued.private_key_pem)]
    config = api.kubeconfig(**{"client-certificate-data": encoded[0], "client-key-data": encoded[1]})
    assert await passwords(KubernetesSecrets(KubeSecrets(config), 1 << 20)) == [b"word"]


async def test_failures_show_no_secret(api: Api) -> None:
    config = api.kubeconfig(token="hunter2")
    with pytest.raises(Unavailable, match="the API answers 401") as caught:
        await passwords(KubernetesSecrets(KubeSecrets(config), 1 << 20))
    assert "hunter2" not in repr(caught.value)
    with pytest.raises(Unavailable, match="kube_secrets_bytes"):
        await passwords(KubernetesSecrets(KubeSecrets(api.kubeconfig()), 100))
    api.port = 1
    with pytest.raises(Unavailable, match="ClientConnectorError"):
        await passwords(KubernetesSecrets(KubeSecrets(api.kubeconfig()), 1 << 20))


@pytest.mark.parametrize(
    "text", ["apiVersion: v1\nkind: Config\n", "{}", '{"current-context":"x","clusters":[],"users":[],"contexts":[]}']
)
def test_a_kubeconfig_that_is_none_is_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(ConfigError, match="kubeconfig"):
        kubeconfig.load(str(path))


def test_in_cluster_needs_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="no pod"):
        kubeconfig.load("in-cluster")


def test_plain_http_and_exec_plugins_are_refused(tmp_path: Path) -> None:
    api = Api(tmp_path)
    text = Path(api.kubeconfig()).read_text()
    for before, after in (("https://127", "http://127"), ('"token": "api-token"', '"exec": {"command": "x"}')):
        path = api.directory / "other"
        path.write_text(text.replace(before, after))
        with pytest.raises(ConfigError):
            kubeconfig.load(str(path))
