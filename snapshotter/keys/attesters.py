"""Evidence about this machine, for a KBS: from the attestation agent of the guest, or made up for tests."""

from typing import Any, Final, Protocol

from snapshotter.crypto import encoding
from snapshotter.errors import ConfigError, KeyDenied, Unavailable
from snapshotter.keys import ttrpc
from snapshotter.keys.http import KeyService
from snapshotter.keys.resource import denying
from snapshotter.registry.retry import Clock, Transient

EVIDENCE_BYTES: Final = 1 << 20
# Not `se`: its challenge is no nonce but a request for the firmware.
TEES: Final = frozenset(
    "az-snp-vtpm az-tdx-vtpm nvidia sgx snp tdx cca csv hygondcu tpm sample sampledevice".split()  # noqa: SIM905
)
_SAMPLES: Final = frozenset(("sample", "sampledevice"))
_AGENT: Final = "attestation_agent.AttestationAgentService"


class Attester(Protocol):
    """Somebody who can prove what this machine is. All raise KeyDenied and Unavailable."""

    async def tee(self) -> str:
        """The kind of evidence, a name of the KBS protocol."""
        ...

    async def evidence(self, report_data: bytes) -> dict[str, Any]:
        """Primary evidence bound to `report_data` (32 to 64 bytes)."""
        ...

    async def additional_evidence(self, report_data: bytes) -> str:
        """JSON about devices; "" when there is none."""
        ...


class SampleAttester:
    """Evidence that anybody can make up. For development and tests; a KBS refuses it unless told otherwise."""

    async def tee(self) -> str:
        return "sample"

    async def evidence(self, report_data: bytes) -> dict[str, Any]:
        return {"svn": "1", "report_data": encoding.b64_encode(report_data)}

    async def additional_evidence(self, report_data: bytes) -> str:  # noqa: ARG002 - there is no device
        return ""


class AgentAttester:
    """The attestation agent, over ttrpc on its Unix socket."""

    def __init__(self, socket: str) -> None:
        self._client = ttrpc.Client(socket)
        self._who = f"attestation agent {socket}"

    async def tee(self) -> str:
        with denying(self._who):
            answer = ttrpc.parse(await self._client.call(_AGENT, "GetTeeType", b""))
            return _known(_text(ttrpc.last_bytes(answer, 1), self._who), self._who)

    async def evidence(self, report_data: bytes) -> dict[str, Any]:
        raw = await self._evidence("GetEvidence", report_data)
        with denying(self._who):
            return encoding.json_object(raw, "evidence", EVIDENCE_BYTES)

    async def additional_evidence(self, report_data: bytes) -> str:
        try:
            answer = await self._client.call(_AGENT, "GetAdditionalTees", b"")
        except ttrpc.Refused as refusal:
            if refusal.code == ttrpc.UNIMPLEMENTED:  # an agent from before devices
                return ""
            raise
        with denying(self._who):
            if not ttrpc.parse(answer):
                return ""
        return _text(await self._evidence("GetAdditionalEvidence", report_data), self._who)

    async def _evidence(self, method: str, report_data: bytes) -> bytes:
        answer = await self._client.call(_AGENT, method, ttrpc.bytes_field(1, report_data))
        with denying(self._who):
            return ttrpc.last_bytes(ttrpc.parse(answer), 1)


class RestAttester:
    """The guest's REST endpoint (api-server-rest with feature `attestation`). It does not say the kind of TEE."""

    def __init__(self, url: str, tee: str, clock: Clock, timeout_seconds: float) -> None:
        """Raises ConfigError for a URL that is not loopback, or a TEE that no KBS knows."""
        if tee not in TEES - _SAMPLES:
            raise ConfigError(
                f"config: keys.kbs.tee: must be one of {', '.join(sorted(TEES - _SAMPLES))}",
                hint="the REST endpoint does not say it",
            )
        self._service = KeyService(url, clock, option="keys.kbs.rest_url", loopback_only=True)
        self._tee = tee
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._who = f"attestation endpoint {self._service.name}"

    async def tee(self) -> str:
        return self._tee

    async def evidence(self, report_data: bytes) -> dict[str, Any]:
        status, raw = await self._get("/aa/evidence", report_data)
        if status != 200:
            raise KeyDenied(f"{self._who}: answers {status}")
        with denying(self._who):
            return encoding.json_object(raw, "evidence", EVIDENCE_BYTES)

    async def additional_evidence(self, report_data: bytes) -> str:
        status, raw = await self._get("/aa/additional-evidence", report_data)
        if status not in (200, 404):  # 404: an endpoint from before devices
            raise KeyDenied(f"{self._who}: answers {status}")
        return _text(raw, self._who) if status == 200 else ""

    async def _get(self, path: str, report_data: bytes) -> tuple[int, bytes]:
        query = {"runtime_data": encoding.b64url_encode(report_data), "encoding": "base64"}
        deadline = self._clock.monotonic() + self._timeout_seconds
        try:
            reply = await self._service.call("GET", path, query=query, deadline=deadline, limit=EVIDENCE_BYTES)
        except Transient as error:
            raise Unavailable(str(error)) from None
        return reply.status, reply.body


def _known(tee: str, who: str) -> str:
    if tee in _SAMPLES:
        raise KeyDenied(
            f"{who}: this machine has no TEE, its evidence would be made up", hint="keys.kbs.insecure_sample_attester"
        )
    if tee not in TEES:
        raise KeyDenied(f"{who}: reports a TEE that is not supported")
    return tee


def _text(raw: bytes, who: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise KeyDenied(f"{who}: answer is not UTF-8") from None
