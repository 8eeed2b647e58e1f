"""Client of a key broker service (KBS): attest once, then fetch resources until the token expires.

A TEE key pair is made for each attestation and is gone with its token. Answers that mean "no" are final, except that a
refused token or a lost session is replaced twice: a KBS that was restarted knows neither. Only silence and 5xx are
tried again, all within one deadline.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate

from snapshotter import config
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError, KeyDenied, RegistryUnavailable, Unavailable
from snapshotter.keys import attesters, rcar, teekey
from snapshotter.keys.attesters import Attester
from snapshotter.keys.cache import ResourceCache
from snapshotter.keys.http import KeyService, Reply
from snapshotter.keys.resource import ResourceUri, denying
from snapshotter.keys.teekey import TeeKey
from snapshotter.registry.retry import Attempts, Clock, SystemClock

log = structlog.get_logger(__name__)

_ROUNDS: Final = 3
_SPARE_SECONDS: Final = 10.0  # a token that expires sooner is not used any more
_FILE_BYTES: Final = 512 << 10
_FINAL: Final = frozenset(("PolicyDeny", "PluginInternalError", "PluginNotFound", "InvalidRequestPath"))


class _Replace(Exception):
    """The KBS does not accept this session or token; another attestation may help."""


@dataclass(frozen=True, slots=True)
class _Attested:
    token: rcar.Token
    key: TeeKey = field(repr=False)


class KbsClient:
    """Resources of one KBS."""

    def __init__(self, settings: config.Kbs, attester: Attester, clock: Clock | None = None) -> None:
        """Raises ConfigError naming the option that cannot work."""
        self._settings = settings
        self._attester = attester
        self._clock = clock or SystemClock()
        self._service = KeyService(settings.url, self._clock, option="keys.kbs.url", ca_file=settings.ca_file)
        self._signer = _signer(settings.token_signer) if settings.token_signer else None
        self._init_data = _read(settings.init_data, "init_data").decode() if settings.init_data else ""
        self._cache = ResourceCache(settings.cache_seconds, self._clock)
        self._attested: _Attested | None = None
        self._lock = asyncio.Lock()
        self._who = f"KBS {self._service.name}"

    async def get(self, uri: ResourceUri) -> SecretBytes:
        """See Resources. Raises KeyDenied naming what was refused, Unavailable when there was no answer in time."""
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                async with self._lock:  # whoever waits finds the token, or the resource itself
                    found = self._cache.get(uri)
                    if found is None:
                        found = await self._fetch(uri)
                        self._cache.put(uri, found)
                    return found
        except TimeoutError:
            raise Unavailable(f"{self._who}: {uri}: no answer in time") from None
        except RegistryUnavailable as error:  # what Attempts gives up with
            raise Unavailable(f"{self._who}: {error}") from None

    async def _fetch(self, uri: ResourceUri) -> SecretBytes:
        deadline = self._clock.monotonic() + self._settings.timeout_seconds
        attempts = Attempts(self._clock, self._settings.retries, deadline)
        refusal = ""
        for _ in range(_ROUNDS):
            try:
                attested = await self._attest(attempts)
                secret = await self._resource(uri, attested, attempts)
            except _Replace as error:
                refusal = str(error)
                self._attested = None
                continue
            log.info("resource released", kbs=self._service.name, resource=str(uri))
            return secret
        raise KeyDenied(f"{self._who}: {uri}: {refusal}")

    async def _resource(self, uri: ResourceUri, attested: _Attested, attempts: Attempts) -> SecretBytes:
        reply = await self._call(
            attempts,
            "GET",
            f"{rcar.PREFIX}/resource/{uri.path}",
            headers={"Authorization": f"Bearer {attested.token.text}"},
            limit=teekey.ANSWER_BYTES,
        )
        self._accept(reply, str(uri))
        with denying(f"{self._who}: {uri}"):
            secret = await asyncio.to_thread(attested.key.open, reply.body)
        if not len(secret):
            raise KeyDenied(f"{self._who}: {uri}: is empty")
        return secret

    async def _attest(self, attempts: Attempts) -> _Attested:
        """What is in force, else the whole exchange."""
        held = self._attested
        if held is not None and held.token.expires - _SPARE_SECONDS > self._clock.time():
            return held
        self._attested = None
        tee = await self._attester.tee()
        key = await asyncio.to_thread(TeeKey.generate, self._settings.tee_key)
        reply = await self._call(attempts, "POST", f"{rcar.PREFIX}/auth", body=rcar.request(tee))
        self._accept(reply, "auth")
        with denying(self._who):
            challenge = rcar.Challenge.parse(reply.body)
        cookie = reply.cookies.get(rcar.COOKIE, "")
        if not (0 < len(cookie) <= 256 and cookie.isascii() and cookie.replace("-", "").isalnum()):
            raise KeyDenied(f"{self._who}: auth: no usable cookie {rcar.COOKIE}")
        reply = await self._call(
            attempts,
            "POST",
            f"{rcar.PREFIX}/attest",
            body=await self._attestation(challenge, key),
            headers={"Cookie": f"{rcar.COOKIE}={cookie}"},
        )
        self._accept(reply, "attest")
        with denying(self._who):
            token = rcar.Token.parse(reply.body, key.jwk, self._signer, self._clock.time())
        self._attested = _Attested(token, key)
        log.info("attested", kbs=self._service.name, tee=tee, seconds=round(token.expires - self._clock.time()))
        return self._attested

    async def _attestation(self, challenge: rcar.Challenge, key: TeeKey) -> bytes:
        additional = await self._attester.additional_evidence(challenge.device_report_data(key.jwk))
        evidence = await self._attester.evidence(challenge.report_data(key.jwk, additional))
        return rcar.attestation(challenge, key.jwk, evidence, additional, self._init_data)

    async def _call(
        self,
        attempts: Attempts,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        limit: int = rcar.MESSAGE_BYTES,
    ) -> Reply:
        async def once() -> Reply:
            return await self._service.call(
                method, path, deadline=attempts.deadline, limit=limit, body=body, headers=headers
            )

        return await attempts.run(once)

    def _accept(self, reply: Reply, what: str) -> None:
        """Raises _Replace for 401, which may mean an expired token or a lost session, KeyDenied for every other no."""
        if reply.status == 200:
            return
        variant = rcar.error_variant(reply.body)
        text = f"refused with {reply.status}{f' {variant}' if variant else ''}"
        if reply.status == 401 and variant not in _FINAL and what != "auth":
            raise _Replace(text if what != "attest" else f"attestation {text}")
        raise KeyDenied(f"{self._who}: {what}: {text}")


def client(settings: config.Kbs) -> KbsClient:
    """With the attester that is configured. Raises ConfigError."""
    clock = SystemClock()
    if settings.insecure_sample_attester:
        log.warning("keys.kbs.insecure_sample_attester: evidence is made up, only for development")
        return KbsClient(settings, attesters.SampleAttester(), clock)
    if settings.attester == "agent":
        return KbsClient(settings, attesters.AgentAttester(settings.agent_socket), clock)
    rest = attesters.RestAttester(settings.rest_url, settings.tee, clock, settings.timeout_seconds)
    return KbsClient(settings, rest, clock)


def _signer(path: str) -> ec.EllipticCurvePublicKey:
    pem = _read(path, "token_signer")
    try:
        key = load_pem_x509_certificate(pem).public_key() if b"CERTIFICATE" in pem else load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"config: keys.kbs.token_signer {path}: not a PEM certificate or public key of P-256")
    return key


def _read(path: str, option: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_FILE_BYTES + 1)
        if len(content) > _FILE_BYTES:
            raise ValueError
        content.decode()
    except OSError as error:
        raise ConfigError(f"config: keys.kbs.{option} {path}: {error.strerror}") from error
    except ValueError:
        raise ConfigError(f"config: keys.kbs.{option} {path}: longer than 512 KiB or not text") from None
    return content
