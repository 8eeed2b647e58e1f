"""Messages of the KBS attestation protocol (Request, Challenge, Attestation, Response), version 0.4.0. No I/O.

    POST /kbs/v0/auth     request()              → Challenge, cookie kbs-session-id
    POST /kbs/v0/attest   attestation()          → {"token": JWT}
    GET  /kbs/v0/resource/REPOSITORY/TYPE/TAG    → JWE to the attested key (teekey.TeeKey.open)

The evidence is bound to nonce and key: report data = H(JCS({"additional-evidence", "nonce", "tee-pubkey"})), and for
devices H(JCS({"nonce", "tee-pubkey"})). What is parsed here comes from the KBS; MalformedImage names the failed check.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from snapshotter.crypto import encoding
from snapshotter.errors import KeyDenied, LimitExceeded, MalformedImage
from snapshotter.keys import eckey

VERSION: Final = "0.4.0"
PREFIX: Final = "/kbs/v0"
COOKIE: Final = "kbs-session-id"
MESSAGE_BYTES: Final = 256 << 10
_HASHES: Final = ("sha256", "sha384", "sha512")
_DEFAULT_HASH: Final = "sha384"
_CLOCK_SECONDS: Final = 60  # how far ahead the signer's clock may be
_SIGNER_MEMBERS: Final = ("alg", "use", "kid", "key_ops", "x5c", "x5u", "x5t", "x5t#S256")
_JWT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_VARIANT = re.compile(r"https?://[^\s?#]{1,200}/([A-Za-z0-9]{1,40})")
_KEY_PATHS: Final = (
    ("submods", "cpu0", "ear.veraison.annotated-evidence", "runtime_data_claims", "tee-pubkey"),
    ("customized_claims", "runtime_data", "tee-pubkey"),
    ("tee-pubkey",),
)


def canonical(value: Any) -> bytes:
    """RFC 8785 for objects of strings, which is all that is hashed here."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def request(tee: str) -> bytes:
    """The body of auth."""
    return encoding.json_bytes(
        {"version": VERSION, "tee": tee, "extra-params": {"supported-hash-algorithms": list(_HASHES)}}
    )


@dataclass(frozen=True, slots=True)
class Challenge:
    """What the KBS wants to see in the evidence; `nonce` is repeated exactly as it was written."""

    nonce: str
    hash_algorithm: str = _DEFAULT_HASH

    @classmethod
    def parse(cls, raw: bytes) -> "Challenge":
        value = encoding.json_object(raw, "challenge", MESSAGE_BYTES)
        encoding.members(value, "challenge", required=("nonce",), optional=("extra-params",))
        nonce = encoding.string(value, "nonce", "challenge")
        if not 16 <= len(encoding.b64_decode(nonce, "challenge: nonce")) <= 64:
            raise MalformedImage("challenge: nonce is not 16 to 64 bytes")
        extra = value.get("extra-params") or {}
        algorithm = extra.get("selected-hash-algorithm", _DEFAULT_HASH) if isinstance(extra, dict) else None
        if not isinstance(algorithm, str) or algorithm.lower() not in _HASHES:
            raise MalformedImage(f"challenge: extra-params choose no hash algorithm of {', '.join(_HASHES)}")
        return cls(nonce, algorithm.lower())

    def device_report_data(self, jwk: dict[str, str]) -> bytes:
        """What additional evidence is bound to."""
        return self._hash({"nonce": self.nonce, "tee-pubkey": jwk})

    def report_data(self, jwk: dict[str, str], additional_evidence: str) -> bytes:
        """What the primary evidence is bound to."""
        return self._hash({"additional-evidence": additional_evidence, "nonce": self.nonce, "tee-pubkey": jwk})

    def _hash(self, value: dict[str, Any]) -> bytes:
        return hashlib.new(self.hash_algorithm, canonical(value)).digest()


def attestation(
    challenge: Challenge, jwk: dict[str, str], evidence: dict[str, Any], additional: str, init_data: str
) -> bytes:
    """The body of attest. `init_data` is the whole TOML text, "" = none."""
    return encoding.json_bytes(
        {
            "init-data": {"format": "toml", "body": init_data} if init_data else None,
            "runtime-data": {"nonce": challenge.nonce, "tee-pubkey": jwk},
            "tee-evidence": {"primary_evidence": evidence, "additional_evidence": additional},
        }
    )


@dataclass(frozen=True, slots=True)
class Token:
    """A checked attestation token; a bearer credential. `expires` in seconds since the epoch."""

    text: str = field(repr=False)
    expires: float

    @classmethod
    def parse(cls, raw: bytes, jwk: dict[str, str], signer: ec.EllipticCurvePublicKey | None, now: float) -> "Token":
        """The token in an answer to attest: signed (ES256), in force, and about our key.

        `signer` None: the key in the token's own header, which proves only that the token is whole. Raises
        MalformedImage, and KeyDenied for a token that is well-formed but forged, expired, or another's.
        """
        value = encoding.json_object(raw, "attestation answer", MESSAGE_BYTES)
        encoding.members(value, "attestation answer", required=("token",))
        text = encoding.string(value, "token", "attestation answer")
        claims = verified_claims(text, signer)
        expires = check_times(claims, now)
        if not any(_same_key(_at(claims, path), jwk) for path in _KEY_PATHS):
            raise KeyDenied("token: is not about this attestation's key")
        return cls(text, expires)


def verified_claims(text: str, signer: ec.EllipticCurvePublicKey | None) -> dict[str, Any]:
    """The claims of an ES256 JWT. Raises MalformedImage; KeyDenied if the signature is wrong."""
    if len(text) > MESSAGE_BYTES or not _JWT.fullmatch(text):
        raise MalformedImage("token: not a JWT")
    head, body, tail = text.split(".")
    header = encoding.json_object(encoding.b64url_decode(head, "token: header"), "token: header", MESSAGE_BYTES)
    optional = ("typ", "kid", "jwk", "x5c", "x5t", "x5t#S256", "cty")
    encoding.members(header, "token: header", required=("alg",), optional=optional)
    if header["alg"] != "ES256":
        raise MalformedImage("token: alg is not ES256")
    if signer is None:
        # Trustee writes its certificates in here, and the coordinates without leading zeros.
        signer = eckey.public_key(header.get("jwk"), "token: jwk", optional=_SIGNER_MEMBERS, padded=False)
    signature = encoding.b64url_decode(tail, "token: signature")
    if not eckey.is_signed(f"{head}.{body}".encode(), signature, signer, "token"):
        raise KeyDenied("token: its signature is not the attestation service's")
    return encoding.json_object(encoding.b64url_decode(body, "token: claims"), "token: claims", MESSAGE_BYTES)


def check_times(claims: dict[str, Any], now: float) -> float:
    """`exp` of a token that is in force now. Raises MalformedImage, KeyDenied."""
    times = {name: claims[name] for name in ("exp", "nbf", "iat") if name in claims}
    if "exp" not in times or not all(type(value) in (int, float) and 0 <= value < 1 << 40 for value in times.values()):
        raise MalformedImage("token: exp is missing, or a time is not one")
    if times["exp"] <= now:
        raise KeyDenied("token: has expired", hint="is the clock right?")
    if max(times.get("nbf", 0), times.get("iat", 0)) > now + _CLOCK_SECONDS:
        raise KeyDenied("token: is not in force yet", hint="is the clock right?")
    return float(times["exp"])


def error_variant(raw: bytes) -> str:
    """The kind of an error answer, such as PolicyDeny; "" if there is none. Its `detail` is never repeated."""
    try:
        value = encoding.json_object(raw, "error", MESSAGE_BYTES)
    except (MalformedImage, LimitExceeded):
        return ""
    match = _VARIANT.fullmatch(kind) if isinstance(kind := value.get("type"), str) else None
    return match[1] if match else ""


def _at(claims: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        claims = claims.get(name) if isinstance(claims, dict) else None
    return claims


def _same_key(found: Any, jwk: dict[str, str]) -> bool:
    """Compares what makes a key; `alg` is advice and may be left out."""
    names = [name for name in jwk if name != "alg"]
    return isinstance(found, dict) and all(found.get(name) == jwk[name] for name in names)
