"""The part of a Kubernetes API server that lists secrets, on loopback with TLS."""

import base64
import json
import ssl
from pathlib import Path
from typing import Any, Self

import trustme
from aiohttp import web

from tests.harness.sim_registry import docker_config


class KubeApi:
    """`asked`: the path and query of each request. People with a certificate of `people` need no token."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.secrets: dict[str, list[dict[str, Any]]] = {}
        self.token = "api-token"
        self.status = 200
        self.page = 500
        self.asked: list[dict[str, str]] = []
        self.authority, self.people = trustme.CA(), trustme.CA()
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/api/v1/secrets", self.answer)
        app.router.add_get("/api/v1/namespaces/{namespace}/secrets", self.answer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1").configure_cert(context)
        self.people.configure_trust(context)
        context.verify_mode = ssl.CERT_OPTIONAL
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

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
