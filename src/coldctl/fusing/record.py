"""The identity of a fuse, and what its manifest says of the contributions."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coldctl.artifacts.lineage import signers_within
from coldctl.artifacts.manifest import ContributionRecord
from coldctl.artifacts.signatures import TrustedKey
from coldctl.checkpoints.digests import body_digest
from coldctl.common.digests import digest_of
from coldctl.config.loading import as_record
from coldctl.config.settings import FuseConfig
from coldctl.fusing.contributions import Accepted, Contribution
from coldctl.fusing.late import staleness_weight
from coldctl.fusing.methods import find_method
from coldctl.fusing.recipe import load_weights
from coldctl.storage.location import Location

# Keys of a contribution's config and environment that the fused model's manifest repeats.
_TRAINING = ("epochs", "batch_size", "learning_rate", "max_length", "lora_rank", "send", "seed")
_HARDWARE = ("device", "machine", "threads", "training_seconds")


@dataclass(frozen=True)
class FuseRequest:
    """The settings and the contributions of one fuse, as they were before any weights were read.

    The identity is computed from this object alone, so nothing that is learned while reading can change it.
    """

    config: FuseConfig
    contributions: Sequence[Contribution]
    trusted: Sequence[TrustedKey] | None
    weights: Mapping[str, float] | None  # what the file of weights holds, if there is one
    stated: Sequence[Any]  # what identifies each contribution; None where only its body's digest does
    signers: Sequence[str | None]

    @classmethod
    def of(
        cls, config: FuseConfig, contributions: Sequence[Contribution], trusted: Sequence[TrustedKey] | None
    ) -> "FuseRequest":
        """Record what is asked for. Raises ConfigError if the file of weights cannot be read."""
        weights = load_weights(Path(config.weights)) if config.weights not in ("equal", "examples") else None
        stated = [_stated_identity(contribution, verify=config.verify) for contribution in contributions]
        signers = [
            contribution.signed.key.fingerprint if contribution.signed else None for contribution in contributions
        ]
        return cls(config, contributions, trusted, weights, stated, signers)

    def identity(self, base_digest: str, digests: Mapping[str, str | None] | None = None) -> str:
        """Return the digest of the config and of all that was offered, whether it was then fused or not.

        `digests` are those of the bodies that were read, by name of their contribution. Reads each other body whose
        digest is not stated.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            contributions = list(pool.map(partial(_identity_of, digests or {}), self.contributions, self.stated))
        settings = as_record(self.config)
        settings |= {"weights": self.config.weights if self.weights is None else "file", "trusted_keys": None}
        settings["leave_one_out"] = False  # a retired setting: models that were fused with it keep their identity
        inputs: dict[str, Any] = {"base": base_digest, "contributions": contributions, "weights": self.weights}
        if self.trusted is not None:
            inputs |= {"trusted": _fingerprints(self.trusted), "signers": self.signers}
        if code := find_method(self.config.method).code:
            inputs["method"] = code
        return digest_of({"stage": "fuse", "config": settings, "inputs": inputs})


def _stated_identity(contribution: Contribution, *, verify: bool) -> Any:
    """Return what identifies a contribution without reading its weights, None if only its body's digest does."""
    if contribution.checkpoint is None:
        return [contribution.name, *contribution.rejections]
    if digest := contribution.stated_digest or contribution.digest:
        return digest
    return None if verify else [contribution.name, contribution.checkpoint.files]


def _identity_of(digests: Mapping[str, str | None], contribution: Contribution, stated: Any) -> Any:
    if stated is not None or contribution.checkpoint is None:
        return stated
    return digests.get(contribution.name) or body_digest(contribution.checkpoint)


def model_name(destination: Location) -> str:
    """Return the name of a directory, or that of its iteration inside a RUN."""
    whole = destination.resolve()
    return whole.parent.name if whole.name == "fused" and whole.parent.name.startswith("iteration-") else whole.name


def contribution_record(offered: Contribution | Accepted) -> ContributionRecord:
    """Return what the manifest says of a contribution that was accepted, or else rejected."""
    accepted = offered if isinstance(offered, Accepted) else None
    contribution = offered.contribution if isinstance(offered, Accepted) else offered
    source = contribution.checkpoint.manifest if contribution.checkpoint else None
    data = source.get("dataset", {}) if source else {}
    return {
        "name": contribution.name,
        "dataset": data.get("name"),
        "num_train": data.get("num_train"),
        "source": data.get("source"),
        "license": source.get("license") if source else None,
        "training": _chosen(source.get("config"), _TRAINING) if source else {},
        "environment": _chosen(source.get("environment"), _HARDWARE) if source else {},
        "body_digest": contribution.digest or contribution.stated_digest or "",
        "weight": accepted.weight if accepted else 0.0,
        "status": "fused" if accepted else "rejected",
        "reason": _without_place("; ".join(contribution.rejections), contribution) or None,
        "verified": contribution.verified,
        "age": contribution.age,
        "discount": staleness_weight(contribution.age),
        "iteration": source.get("iteration") if source else None,
        "signer": contribution.signed.key.name if contribution.signed else None,
        "signer_key": contribution.signed.key.fingerprint if contribution.signed else None,
        "signers_within": signers_within(source) if source else {},
        "update_norm": accepted.update_norm if accepted else None,
        "cosine_to_mean": accepted.cosine_to_mean if accepted else None,
        "update_share": accepted.update_share if accepted else None,
        "notes": [_without_place(note, contribution) for note in contribution.notes],
    }


def _chosen(record: Any, keys: Sequence[str]) -> dict[str, Any]:
    """Return these keys of a contribution's own record, if they hold a number or text."""
    values = record if isinstance(record, dict) else {}
    return {key: values[key] for key in keys if isinstance(values.get(key), int | float | str)}


def _without_place(text: str, contribution: Contribution) -> str:
    """Replace the place of a contribution by its name, since a manifest is published and must not tell local paths."""
    return text.replace(f"{contribution.place}/", "").replace(contribution.place, contribution.name)


def public_record(config: FuseConfig, trusted: Sequence[TrustedKey] | None) -> dict[str, Any]:
    """Return the config as the manifest stores it: a file of weights by its name alone, keys by their fingerprints."""
    record = as_record(config)
    record["trusted_keys"] = _fingerprints(trusted)
    if config.weights not in ("equal", "examples"):
        record["weights"] = Path(config.weights).name
    return record


def _fingerprints(trusted: Sequence[TrustedKey] | None) -> dict[str, str] | None:
    return None if trusted is None else {key.name: key.fingerprint for key in trusted}
