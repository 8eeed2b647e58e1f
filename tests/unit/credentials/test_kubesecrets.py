"""Pull secrets of a cluster, from an API server on loopback with TLS: pages, selectors, tokens, outages."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from snapshotter.config import KubeSecrets
from snapshotter.credentials import kubeconfig
from snapshotter.credentials.kubesecrets import KubernetesSecrets
from snapshotter.errors import ConfigError, Unavailable
from tests.harness.kube_api import KubeApi


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[KubeApi]:
    async with KubeApi(tmp_path) as api:
        api.add("default", "registry.example", "word")
        yield api


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def passwords(secrets: KubernetesSecrets, host: str = "registry.example", *, fresh: bool = False) -> list[bytes]:
    return [login.secret.expose() for login in await secrets.find(host, "team/app", fresh=fresh)]


async def test_secrets_of_all_namespaces_are_found_page_by_page(api: KubeApi) -> None:
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


async def test_namespaces_and_labels_can_be_chosen(api: KubeApi) -> None:
    api.add("team", "registry.example", "ours")
    api.add("others", "registry.example", "theirs")
    config = KubeSecrets(api.kubeconfig(), namespaces=("team", "empty"), label_selector="a=b")
    assert await passwords(KubernetesSecrets(config, 1 << 20)) == [b"ours"]
    assert [asked["path"] for asked in api.asked] == [
        "/api/v1/namespaces/team/secrets", "/api/v1/namespaces/empty/secrets"
    ]  # fmt: skip
    assert api.asked[0]["labelSelector"] == "a=b"


@pytest.mark.allow_warnings
async def test_the_list_is_renewed_and_survives_an_outage(api: KubeApi) -> None:
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


async def test_a_token_file_is_read_anew_and_a_certificate_opens_too(api: KubeApi) -> None:
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


async def test_failures_show_no_secret(api: KubeApi) -> None:
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


async def test_the_service_account_of_a_pod_is_used(api: KubeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    (api.directory / "ca.crt").write_bytes(api.authority.cert_pem.bytes())
    (api.directory / "token").write_text("api-token")
    monkeypatch.setattr(kubeconfig, "_ACCOUNT", api.directory)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    assert await passwords(KubernetesSecrets(KubeSecrets("in-cluster"), 1 << 20)) == [b"word"]


def test_in_cluster_needs_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="no pod"):
        kubeconfig.load("in-cluster")


def test_plain_http_and_exec_plugins_are_refused(tmp_path: Path) -> None:
    api = KubeApi(tmp_path)
    text = Path(api.kubeconfig()).read_text()
    for before, after in (("https://127", "http://127"), ('"token": "api-token"', '"exec": {"command": "x"}')):
        path = api.directory / "other"
        path.write_text(text.replace(before, after))
        with pytest.raises(ConfigError):
            kubeconfig.load(str(path))
