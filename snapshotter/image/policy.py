"""Who wrote an image, and may it run here: steps 0 and 2 of the order of trust (docs/architecture.md).

ocicrypt says who may *read* an image, never who *wrote* it: anyone who has the public key can make a valid sealed
image. An image is authentic if its manifest digest is pinned (by the reference it was asked for, or by `[policy]
pins`), if a trusted key signed it, or if its layer key is wrapped under a secret KEK of its owner. This module is pure:
it sees references, digests and annotations, and decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from snapshotter import labels
from snapshotter.config import Limits, Policy, RepositoryRule
from snapshotter.digest import Digest
from snapshotter.errors import ConfigError, MalformedImage, PolicyDenied
from snapshotter.image.claim import SEND_LABELS
from snapshotter.image.sigstore import Found
from snapshotter.keys import packet, wrapping
from snapshotter.keys.resource import ResourceUri
from snapshotter.keys.wrapping import Wrapped
from snapshotter.registry.reference import Reference


@dataclass(frozen=True, slots=True)
class Evidence:
    """The signatures that satisfied the trust policy, each of a manifest or an index, and by which rule and key."""

    rule: str
    signatures: tuple[tuple[Digest, Found], ...]


@dataclass(frozen=True, slots=True)
class Admission:
    """An image that passed: `rule` names what made it authentic and goes into the log.

    `wrapping`: through which packets its layer key may be got; None for any.
    """

    authentic: bool
    rule: str
    evidence: Evidence | None = None
    wrapping: RepositoryRule | None = None

    def usable(self, annotations: Mapping[str, str], limits: Limits) -> Mapping[str, str]:
        """The annotations of an encrypted layer without the packets through which it may not be opened."""
        rule = self.wrapping
        return annotations if rule is None else wrapping.restrict(annotations, lambda it: _allowed(rule, it), limits)


class ImagePolicy:
    """`[policy]` and `mode`, applied to one image at a time."""

    def __init__(
        self,
        mode: Literal["open", "confidential"],
        require: str,
        pins: dict[str, frozenset[Digest]],
        repositories: Sequence[RepositoryRule] = (),
        *,
        signatures: bool = False,
    ) -> None:
        """`signatures`: a trust policy is configured, which may refuse any image."""
        self._must_be_authentic = mode == "confidential" or require == "pinned"
        self.must_be_sealed = mode == "confidential" or require == "sealed"
        self.only_verified = mode == "confidential"
        self._repositories = {rule.name: rule for rule in repositories}
        self.restricts_ordinary = (
            self._must_be_authentic or self.must_be_sealed or bool(pins) or bool(repositories) or signatures
        )
        self._pins = pins
        self._signatures = signatures

    @classmethod
    def of(cls, mode: Literal["open", "confidential"], policy: Policy) -> Self:
        """Raises ConfigError for a pin that is not `host/repo@sha256:…` and for a rule that cannot be kept."""
        pins: dict[str, set[Digest]] = {}
        for text in policy.pins:
            reference = Reference.parse(text)
            if reference.digest is None:
                raise ConfigError(f"config: policy.pins: {text!r} has no digest")
            pins.setdefault(reference.name, set()).add(reference.digest)
        for rule in policy.repositories:
            _check_rule(rule)
        if len({rule.name for rule in policy.repositories}) != len(policy.repositories):
            raise ConfigError("config: policy.repositories: a name appears twice")
        frozen = {name: frozenset(digests) for name, digests in pins.items()}
        return cls(mode, policy.require, frozen, policy.repositories, signatures=bool(policy.file))

    def rule(self, reference: Reference) -> RepositoryRule:
        """`[[policy.repositories]]`: the one for the longest of repository, namespaces above it, and host."""
        name = reference.name
        while name:
            if name in self._repositories:
                return self._repositories[name]
            name = name.rpartition("/")[0]
        return RepositoryRule()

    def is_pinned(self, reference: Reference) -> bool:
        """Whether only some manifests of this repository may run."""
        return reference.name in self._pins

    def admit(self, reference: Reference, digests: Sequence[Digest], evidence: Evidence | None = None) -> Admission:
        """Decide on the image that `reference` led to.

        `digests` are the verified digests on the way from the reference to the platform's manifest: the manifest's
        own, and before it its index's if there was one. Raises PolicyDenied(unauthentic-image).
        """
        pinned = self._pins.get(reference.name)
        if pinned is not None and pinned.isdisjoint(digests):
            raise PolicyDenied(f"image {reference}: manifest {digests[-1]} is not one of the pins of its repository")
        if reference.digest is not None and reference.digest not in digests:
            raise PolicyDenied(f"image {reference}: got manifest {digests[-1]}, which the reference does not name")
        if pinned is not None:
            return Admission(True, "pin", evidence)
        if evidence is not None:
            return Admission(True, evidence.rule, evidence)
        if reference.digest is not None:
            return Admission(True, "reference-digest")
        rule = self.rule(reference)
        if rule.secret_kek:
            return Admission(False, "secret-kek")  # decided by `check_wrapping`, which every such image must pass
        if self._must_be_authentic or rule.authentic:
            raise PolicyDenied(
                f"image {reference}: neither its reference, nor a pin, nor a signature says that it is authentic",
                hint="pull by digest, pin the repository, or have it signed (policy.file)",
            )
        return Admission(False, "open")

    def require_reference(self, layer: str) -> None:
        """Raises PolicyDenied where an image must be the right one, for a client that does not say which it runs.

        What the layers are can be proven without; the config, with the command and the environment, cannot.
        """
        if self._must_be_authentic or self._pins or self._repositories or self._signatures:
            raise PolicyDenied(
                f"{layer}: the client did not say which image it belongs to, so nothing shows that it is a pinned one",
                hint=SEND_LABELS,
            )

    def require_sealed(self, reference: Reference, sealed: bool, what: str) -> None:
        """Raises PolicyDenied(not-sealed) where only sealed images may run."""
        rule = self.rule(reference)
        if not sealed and (self.must_be_sealed or rule.sealed or rule.secret_kek):
            raise PolicyDenied(f"image {reference}: {what}, but only sealed images are allowed", reason="not-sealed")

    def check_wrapping(
        self, reference: Reference, admission: Admission, annotations: Mapping[str, str], limits: Limits
    ) -> Admission:
        """Apply the repository's rule to how the key of an encrypted layer is wrapped; before any key is asked for.

        Raises PolicyDenied(wrapping, or unauthentic-image for one that only its KEK can make authentic).
        """
        rule = self.rule(reference)
        if not (rule.ciphers or rule.recipients or rule.secret_kek):
            return admission
        packets = wrapping.describe(annotations, limits)
        missing = set(rule.recipients) - {_canonical(it.recipient) for it in packets}
        if missing:
            raise PolicyDenied(
                f"image {reference}: its key is not wrapped for {min(missing)}, which its repository requires",
                reason="unauthentic-image" if rule.secret_kek else "wrapping",
            )
        if not any(_allowed(rule, it) for it in packets):
            raise PolicyDenied(
                f"image {reference}: its key is wrapped in no way that its repository allows "
                f"({', '.join(sorted({cipher[:40] for it in packets for cipher in it.ciphers})) or 'not at all'})",
                reason="unauthentic-image" if rule.secret_kek else "wrapping",
            )
        return replace(admission, authentic=admission.authentic or rule.secret_kek, wrapping=rule)


def _allowed(rule: RepositoryRule, wrapped: Wrapped) -> bool:
    if rule.ciphers and not wrapped.ciphers <= set(rule.ciphers):
        return False
    if not rule.secret_kek:
        return True
    # A256CTR would let whoever learned one layer key make packets that seem to be wrapped under the KEK.
    named = labels.ENC_KEYS_PREFIX + wrapped.scheme == packet.ANNOTATION and wrapped.ciphers == {"A256GCM"}
    return named and _canonical(wrapped.recipient) in rule.recipients


def _canonical(recipient: str) -> str:
    """A KEK's name without the host that packets may state; "" for what is none."""
    try:
        return str(ResourceUri.parse(recipient))
    except MalformedImage:
        return ""


def _check_rule(rule: RepositoryRule) -> None:
    where = f"config: policy.repositories {rule.name!r}"
    if Reference.parse(f"{rule.name}/x").name != f"{rule.name}/x":
        raise ConfigError(f"{where}: write host or host/repository in full, as in docker.io/library")
    if any(_canonical(recipient) != recipient for recipient in rule.recipients):
        raise ConfigError(f"{where}: recipients: write kbs:///repository/type/tag")
    if rule.secret_kek and not rule.recipients:
        raise ConfigError(f"{where}: secret_kek: recipients must name the KEK")
    if rule.secret_kek and rule.ciphers and "A256GCM" not in rule.ciphers:
        raise ConfigError(f"{where}: ciphers: secret_kek needs A256GCM")
