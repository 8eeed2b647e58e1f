"""Evidence → claims → token → decision. Only `sample` evidence, which proves nothing, can be appraised here."""

import hashlib
import hmac
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from snapshotter.crypto import encoding
from snapshotter.crypto.encoding import b64url_encode
from snapshotter.errors import MalformedImage
from snapshotter.keys import eckey, rcar

ISSUER: Final = "coco-snapshotter kbs-dev: not for production"
_HASHES: Final = ("sha256", "sha384", "sha512")


def appraise(evidence: Any, report_data: bytes) -> dict[str, Any]:
    """Claims of sample evidence bound to `report_data`. Raises MalformedImage."""
    if not isinstance(evidence, dict):
        raise MalformedImage("sample evidence: not an object")
    encoding.members(evidence, "sample evidence", required=("svn", "report_data"))
    found = encoding.b64_decode(encoding.string(evidence, "report_data", "sample evidence"), "report_data")
    if not hmac.compare_digest(found, report_data):
        raise MalformedImage("sample evidence: report data is not bound to this nonce and key")
    return {
        "svn": encoding.string(evidence, "svn", "sample evidence"),
        "report_data": encoding.b64_encode(found),
        "launch_digest": "abcde",
        "platform_version": {"major": 1, "minor": 4},
        "debug": False,
    }


def init_data_claims(value: Any) -> dict[str, Any]:
    """Claims about the initdata of an attestation: its digest, by the algorithm it names itself, and what it holds."""
    if value is None:
        return {}
    if not isinstance(value, dict) or value.get("format") != "toml" or not isinstance(body := value.get("body"), str):
        raise MalformedImage("init-data: not TOML")
    try:
        table = tomllib.loads(body)
        algorithm, data = table.get("algorithm"), table.get("data", {})
        if algorithm not in _HASHES:
            raise MalformedImage(f"init-data: algorithm is not one of {', '.join(_HASHES)}")
        if not isinstance(data, dict) or not all(isinstance(text, str) for text in data.values()):
            raise MalformedImage("init-data: data is not a table of strings")
        claims = {name: tomllib.loads(text) for name, text in data.items() if name.endswith(".toml")}
        return {"init_data": hashlib.new(algorithm, body.encode()).hexdigest(), "init_data_claims": claims}
    except (ValueError, TypeError, RecursionError):
        raise MalformedImage("init-data: not TOML") from None


@dataclass(frozen=True, slots=True)
class Policy:
    """Whether a token opens resources: as a KBS by default refuses sample evidence, until it is allowed by name."""

    allow_sample: bool = False
    expect: Mapping[str, str] = field(default_factory=dict)  # claims by name: svn, init_data, launch_digest, debug

    def denies(self, claims: dict[str, Any]) -> str:
        """Why not, "" for yes."""
        if not self.allow_sample:
            return "evidence is only a sample"
        evidence = claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
        found = evidence["sample"] | {"init_data": evidence.get("init_data", "")}
        for name, wanted in self.expect.items():
            value = found.get(name, "")
            if (value if isinstance(value, str) else json.dumps(value)) != wanted:
                return f"claim {name} is not what is expected"
        return ""


class TokenSigner:
    """Makes and checks attestation tokens (EAR as JWT, ES256) under a key of this process."""

    def __init__(self, seconds: int) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._seconds = seconds

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._key.public_key()

    def issue(self, evidence: dict[str, Any], init_data: dict[str, Any], runtime: dict[str, Any], now: float) -> str:
        """`runtime` are the runtime data claims, which name the attested key."""
        status = {
            "ear.status": "none",
            "ear.trustworthiness-vector": {},
            "ear.appraisal-policy-id": "default",
            "ear.veraison.annotated-evidence": {
                "sample": evidence,
                "report_data": evidence["report_data"],
                "runtime_data_claims": runtime,
            }
            | init_data,
        }
        return self.sign(
            {
                "eat_profile": "tag:github.com,2024:confidential-containers/Trustee",
                "iat": int(now),
                "exp": int(now) + self._seconds,
                "iss": ISSUER,
                "ear.verifier-id": {"developer": ISSUER, "build": "kbs-dev"},
                "submods": {"cpu0": status},
            }
        )

    def sign(self, claims: dict[str, Any]) -> str:
        jwk = {"kty": "EC", "crv": "P-256", "alg": "ES256"} | eckey.coordinates(self.public_key)
        parts = [{"alg": "ES256", "typ": "JWT", "jwk": jwk}, claims]
        signed = ".".join(b64url_encode(encoding.json_bytes(part)) for part in parts)
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{b64url_encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def verify(self, token: str, now: float) -> dict[str, Any]:
        """The claims of a token of ours that is in force. Raises MalformedImage, KeyDenied."""
        claims = rcar.verified_claims(token, self.public_key)
        rcar.check_times(claims, now)
        return claims
