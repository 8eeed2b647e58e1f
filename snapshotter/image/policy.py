"""Who wrote an image, and may it run here: step 0 and 2 of the order of trust (docs/architecture.md).

ocicrypt says who may *read* an image, never who *wrote* it: anyone who has the public key can make a valid sealed
image. So an image is authentic only if its manifest digest is pinned: by the reference it was asked for, or by
`[policy] pins`. This module is pure: it sees references and digests, and decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from snapshotter.config import Policy
from snapshotter.digest import Digest
from snapshotter.errors import ConfigError, PolicyDenied
from snapshotter.image.claim import SEND_LABELS
from snapshotter.registry.reference import Reference


@dataclass(frozen=True, slots=True)
class Admission:
    """An image that passed: `rule` names what made it authentic and goes into the log."""

    authentic: bool
    rule: Literal["reference-digest", "pin", "open"]


class ImagePolicy:
    """`[policy]` and `mode`, applied to one image at a time."""

    def __init__(self, mode: Literal["open", "confidential"], require: str, pins: dict[str, frozenset[Digest]]) -> None:
        self._must_be_authentic = mode == "confidential" or require == "pinned"
        self.must_be_sealed = mode == "confidential" or require == "sealed"
        self.only_verified = mode == "confidential"
        self.restricts_ordinary = self._must_be_authentic or self.must_be_sealed or bool(pins)
        self._pins = pins

    @classmethod
    def of(cls, mode: Literal["open", "confidential"], policy: Policy) -> Self:
        """Raises ConfigError for a pin that is not `host/repo@sha256:…`."""
        pins: dict[str, set[Digest]] = {}
        for text in policy.pins:
            reference = Reference.parse(text)
            if reference.digest is None:
                raise ConfigError(f"config: policy.pins: {text!r} has no digest")
            pins.setdefault(_repository(reference), set()).add(reference.digest)
        return cls(mode, policy.require, {name: frozenset(digests) for name, digests in pins.items()})

    def needs_index(self, reference: Reference, manifest: Digest) -> bool:
        """Whether only an index that the tag leads to could still make this manifest a pinned one."""
        pinned = self._pins.get(_repository(reference))
        return reference.digest is None and pinned is not None and manifest not in pinned

    def admit(self, reference: Reference, digests: Sequence[Digest]) -> Admission:
        """Decide on the image that `reference` led to.

        `digests` are the verified digests on the way from the reference to the platform's manifest: the manifest's
        own, and before it its index's if there was one. Raises PolicyDenied(unauthentic-image).
        """
        pinned = self._pins.get(_repository(reference))
        if pinned is not None and pinned.isdisjoint(digests):
            raise PolicyDenied(f"image {reference}: manifest {digests[-1]} is not one of the pins of its repository")
        if reference.digest is not None and reference.digest not in digests:
            raise PolicyDenied(f"image {reference}: got manifest {digests[-1]}, which the reference does not name")
        if pinned is not None:
            return Admission(True, "pin")
        if reference.digest is not None:
            return Admission(True, "reference-digest")
        if self._must_be_authentic:
            raise PolicyDenied(
                f"image {reference}: neither the reference nor policy.pins pins a manifest digest",
                hint="pull by digest, or pin the repository",
            )
        return Admission(False, "open")

    def require_reference(self, layer: str) -> None:
        """Raises PolicyDenied where an image must be the right one, for a client that does not say which it runs.

        What the layers are can be proven without; the config, with the command and the environment, cannot.
        """
        if self._must_be_authentic or self._pins:
            raise PolicyDenied(
                f"{layer}: the client did not say which image it belongs to, so nothing shows that it is a pinned one",
                hint=SEND_LABELS,
            )

    def require_sealed(self, reference: Reference, sealed: bool, what: str) -> None:
        """Raises PolicyDenied(not-sealed) where only sealed images may run."""
        if self.must_be_sealed and not sealed:
            raise PolicyDenied(f"image {reference}: {what}, but only sealed images are allowed", reason="not-sealed")


def _repository(reference: Reference) -> str:
    return f"{reference.host}/{reference.repository}"
