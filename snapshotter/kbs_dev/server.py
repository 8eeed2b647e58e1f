"""The HTTP side: sessions, attestation, resources from a directory. Version 0.4.0 of the protocol, loopback only.

Errors are what a KBS answers: 404 for a path that cannot be right, 401 for everything else, with the kind in `type`.
"""

import asyncio
import secrets
import ssl
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import structlog
from aiohttp import web

from snapshotter.crypto import encoding
from snapshotter.errors import ConfigError, KeyDenied, LimitExceeded, MalformedImage
from snapshotter.files import read_regular
from snapshotter.kbs_dev import jwe
from snapshotter.kbs_dev.appraisal import Policy, TokenSigner, appraise, init_data_claims
from snapshotter.keys import rcar
from snapshotter.keys.attesters import TEES
from snapshotter.keys.http import is_loopback
from snapshotter.keys.resource import RESOURCE_BYTES, ResourceUri

log = structlog.get_logger(__name__)

WARNING_HEADER: Final = ("X-Kbs-Dev", "development only; sample evidence proves nothing")
_SESSIONS: Final = 1024
_REQUEST_BYTES: Final = 2 << 20
_EVIDENCE: Final = ("primary_evidence", "additional_evidence")
_TEES: Final = TEES | {"se"}
_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refusal(Exception):
    """An error answer; `variant` is its kind."""

    def __init__(self, variant: str, detail: str) -> None:
        super().__init__(detail)
        self.variant = variant

    @property
    def status(self) -> int:
        return 404 if self.variant in ("InvalidRequestPath", "PluginNotFound") else 401


@dataclass(slots=True)
class _Session:
    tee: str
    expires: float
    nonce: str = field(default_factory=lambda: encoding.b64_encode(secrets.token_bytes(32)), repr=False)
    token: str = field(default="", repr=False)


class KbsDev:
    """Serves the files DIRECTORY/repository/type/tag to whoever attests as the policy wants."""

    def __init__(
        self,
        directory: Path,
        policy: Policy,
        *,
        token_seconds: int = 300,
        session_seconds: int = 300,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._policy = policy
        self._session_seconds = session_seconds
        self._clock = clock
        self._sessions: dict[str, _Session] = {}  # by cookie, oldest first
        self.signer = TokenSigner(token_seconds)
        app = web.Application(client_max_size=_REQUEST_BYTES, middlewares=[_marked, _refusing])
        app.add_routes(
            [
                web.post(f"{rcar.PREFIX}/auth", self._auth),
                web.post(f"{rcar.PREFIX}/attest", self._attest),
                web.get("/healthz", self._healthz),
                web.route("*", "/{anything:.*}", self._plugin),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        self.url = ""

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> Self:
        """Listen; `url` says where (`port` 0: any free one). Raises ConfigError for what is not loopback."""
        if not is_loopback(host):
            raise ConfigError(f"kbs-dev: {host!r} is not loopback; it is no key broker for anybody else")
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port, ssl_context=tls).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(f"kbs-dev: cannot listen on {host}:{port}: {error.strerror}") from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http{'s' if tls else ''}://{shown}:{self._runner.addresses[0][1]}"
        return self

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _auth(self, request: web.Request) -> web.Response:
        value = await _body(request, "request", required=("version", "tee"), optional=("extra-params",))
        if value["version"] != rcar.VERSION:
            raise Refusal("ProtocolVersion", f"KBS client protocol version mismatch: expected {rcar.VERSION}")
        if not isinstance(value["tee"], str) or value["tee"] not in _TEES:
            raise MalformedImage("request: tee is none that there is")
        if not isinstance(value.get("extra-params", {}), dict) and value["extra-params"] != "":
            raise MalformedImage("request: extra-params is not an object")
        self._expire()
        session, cookie = _Session(value["tee"], self._clock() + self._session_seconds), uuid.uuid4().hex
        self._sessions[cookie] = session
        answer = web.json_response({"nonce": session.nonce, "extra-params": ""})
        answer.set_cookie(rcar.COOKIE, cookie, expires=formatdate(session.expires, usegmt=True), path="/")
        return answer

    async def _attest(self, request: web.Request) -> web.Response:
        session = self._session(request)
        if session is None:
            raise Refusal("AttestationError", "no session: unknown or expired cookie")
        value = await _body(request, "attestation", required=("runtime-data", "tee-evidence"), optional=("init-data",))
        if not session.token:
            session.token = await asyncio.to_thread(self._appraise, session, value)
            log.info("attested", tee=session.tee)
        return web.json_response({"token": session.token})

    def _appraise(self, session: _Session, value: dict[str, Any]) -> str:
        """The token for an attestation. Raises MalformedImage."""
        runtime, evidence = value["runtime-data"], value["tee-evidence"]
        if not isinstance(runtime, dict) or not isinstance(evidence, dict):
            raise MalformedImage("attestation: runtime-data or tee-evidence is not an object")
        encoding.members(runtime, "runtime-data", required=("nonce", "tee-pubkey"))
        encoding.members(evidence, "tee-evidence", required=_EVIDENCE)
        if runtime["nonce"] != session.nonce:
            raise MalformedImage("runtime-data: nonce is not the one of this session")
        if session.tee != "sample" or evidence["additional_evidence"] != "":
            raise MalformedImage("tee-evidence: only evidence of tee sample, without devices, can be appraised here")
        jwe.check_key(runtime["tee-pubkey"])
        expected = rcar.Challenge(session.nonce).report_data(runtime["tee-pubkey"], "")
        claims = appraise(evidence["primary_evidence"], expected)
        return self.signer.issue(
            claims, init_data_claims(value.get("init-data")), runtime | {"additional-evidence": ""}, self._clock()
        )

    async def _plugin(self, request: web.Request) -> web.Response:
        parts = request.path.removeprefix(f"{rcar.PREFIX}/").split("/", 1)
        if not request.path.startswith(f"{rcar.PREFIX}/") or len(parts) != 2:
            raise Refusal("InvalidRequestPath", "no such path")
        if parts[0] != "resource":
            raise Refusal("PluginNotFound", "only plugin resource is here")
        if request.method != "GET":
            raise Refusal("AdminAuthAccess", "there is no administration: put files into the directory")
        try:
            uri = ResourceUri.parse(f"kbs:///{parts[1]}")
        except MalformedImage as error:
            raise Refusal("InvalidRequestPath", str(error)) from None
        claims = self._claims(request)
        if why := self._policy.denies(claims):
            log.info("resource refused", resource=str(uri), why=why)
            raise Refusal("PolicyDeny", why)
        content = await asyncio.to_thread(read_regular, self._directory / uri.path, RESOURCE_BYTES)
        if content is None:
            raise Refusal("PluginInternalError", "no such resource")
        key = claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["runtime_data_claims"]["tee-pubkey"]
        answer = await asyncio.to_thread(jwe.encrypt, key, content)
        log.info("resource released", resource=str(uri))
        return web.Response(body=answer, content_type="application/json")

    def _claims(self, request: web.Request) -> dict[str, Any]:
        """Of the session's token, else of the bearer's."""
        session = self._session(request)
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        token = session.token if session and session.token else bearer if scheme == "Bearer" else ""
        if not token:
            raise Refusal("TokenNotFound", "neither an attested session nor a bearer token")
        try:
            return self.signer.verify(token, self._clock())
        except (MalformedImage, KeyDenied, LimitExceeded) as error:
            raise Refusal("TokenVerifierError", str(error)) from None

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    def _session(self, request: web.Request) -> _Session | None:
        self._expire()
        return self._sessions.get(request.cookies.get(rcar.COOKIE, ""))

    def _expire(self) -> None:
        now = self._clock()
        surplus = max(0, len(self._sessions) - _SESSIONS + 1)
        for number, (cookie, session) in enumerate(list(self._sessions.items())):
            if session.expires <= now or number < surplus:
                del self._sessions[cookie]


@web.middleware
async def _marked(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Nobody shall mistake an answer for one of a real KBS."""
    answer = await handler(request)
    answer.headers[WARNING_HEADER[0]] = WARNING_HEADER[1]
    answer.headers["Server"] = "coco-snapshotter kbs-dev"
    return answer


@web.middleware
async def _refusing(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as refusal:
        variant, detail, status = refusal.variant, str(refusal), refusal.status
    except (MalformedImage, LimitExceeded) as error:
        variant, detail, status = "AttestationError", str(error), 401
    except web.HTTPException as error:
        return web.Response(status=error.status, text=error.reason)
    log.info("request refused", method=request.method, variant=variant, detail=detail)
    body = {"type": f"https://github.com/confidential-containers/kbs/errors/{variant}", "detail": detail}
    return web.json_response(body, status=status)


async def _body(
    request: web.Request, what: str, *, required: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, Any]:
    value = encoding.json_object(await request.read(), what, _REQUEST_BYTES)
    encoding.members(value, what, required=required, optional=optional)
    return value
