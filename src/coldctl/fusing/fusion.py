"""One fuse: accept contributions, compute weights and the length of the step, write the model and its manifest.

The stage decides where inputs come from and where the result goes. The passes read and write the weights.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coldctl.artifacts import layout, manifest
from coldctl.artifacts.lineage import signers_within
from coldctl.artifacts.manifest import ContributionRecord, Manifest
from coldctl.artifacts.model_ref import Model
from coldctl.artifacts.signatures import TrustedKey
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.checkpoint import (
    Checkpoint,
    body_digest,
    open_checkpoint,
    open_companion,
    outside_body,
    with_common_rows,
)
from coldctl.checkpoints.decoded import RelativeCheckpoint
from coldctl.checkpoints.describe import bare_config
from coldctl.checkpoints.header import DTYPE_NAMES
from coldctl.common.errors import CheckpointError, ColdctlError, ConfigError, DeclinedError
from coldctl.common.parsing import JSON_LIMIT, find_mismatch, json_value, toml_table
from coldctl.common.progress import Progress
from coldctl.config.loading import as_record, identity
from coldctl.config.settings import FuseConfig
from coldctl.config.values import Scale
from coldctl.fusing import methods
from coldctl.fusing.compatibility import compare, other_base
from coldctl.fusing.contributions import Candidate
from coldctl.fusing.methods import Array
from coldctl.fusing.passes import (
    Inputs,
    Proof,
    Prover,
    Spread,
    distance,
    measure_updates,
    tensor_weights,
    thresholds,
)
from coldctl.fusing.recipe import OUTER_STATES, PER_TENSOR, UNWEIGHTED, WEIGHTED, Recipe
from coldctl.fusing.sinks import Written, output_dtype
from coldctl.fusing.staleness import rebase, staleness_weight
from coldctl.fusing.statistics import UpdateStatistics, names_of, outliers
from coldctl.fusing.writer import write
from coldctl.storage.location import Location
from coldctl.storage.remote import open_folder

# Keys of a contribution's config and environment that the fused model's manifest repeats.
_TRAINING = ("epochs", "batch_size", "learning_rate", "max_length", "lora_rank", "send", "seed")
_HARDWARE = ("device", "machine", "threads", "training_seconds")
_EXAMPLES_SHARE = 2.0  # with --weights examples no contribution gets more than this many equal shares


DrawChart = Callable[[Sequence[ContributionRecord], Location], None]  # norms and angles of the updates, into a file


def check_config(config: FuseConfig) -> Scale:
    """Return the scale. Raises ConfigError for settings that exclude each other, before anything is read."""
    scale = config.scale
    if config.outer_optimizer != "none" and scale != Scale():
        raise ConfigError("--scale and --outer-optimizer exclude each other: --outer-lr is the length of the step")
    if scale.automatic and config.method in PER_TENSOR:
        raise ConfigError(f"--scale auto does not go with {config.method}, which finds its own length: give a number")
    if config.weights != "equal" and config.method in UNWEIGHTED:
        raise ConfigError(f"{config.method} takes no --weights: leave them out, or take --method mean")
    if config.trusted_keys is not None and not config.verify:
        raise ConfigError(
            "--no-verify and --trusted-keys exclude each other: a signature says nothing of files not looked at"
        )
    return scale


def judge(item: Candidate, base: Checkpoint, base_digest: str | None, config: FuseConfig) -> None:
    """Check a candidate by its headers and add its problems and notes; with --common-rows leave out other rows first."""
    if item.checkpoint is None:
        return
    if config.common_rows:
        item.checkpoint = with_common_rows(base, item.checkpoint)
    verdict = compare(
        base, item.checkpoint, None if item.age else base_digest, allow_other_base=config.allow_other_base
    )
    item.problems += verdict.problems
    item.notes += verdict.notes
    if item.original_base is not None and not item.problems:
        try:
            item.checkpoint = rebase(item.checkpoint, base, item.original_base, item.age)
        except CheckpointError as error:
            item.problems.append(error.message)
    if config.method == "fisher":
        try:
            open_companion(item.checkpoint, layout.FISHER)
        except ColdctlError as error:
            item.problems.append(f"{error.message}: --method fisher needs it")


def stated_digest(checkpoint: Checkpoint) -> str | None:
    """Return the body digest that a checkpoint's manifest states, None without a manifest."""
    return checkpoint.manifest["body_digest"] if checkpoint.manifest else None


def presumed_base(candidates: Sequence[Candidate], config: FuseConfig) -> str | None:
    """Return the body digest of the base that all manifests agree on, None if they do not agree.

    It stands in for the digest of a base without a manifest. The digest that is taken while reading confirms it later.
    """
    if config.allow_other_base:
        return None
    manifests = [item.checkpoint.manifest for item in candidates if item.checkpoint and item.checkpoint.manifest]
    digests = {document.get("base", {}).get("body_digest") for document in manifests}
    return digests.pop() if len(digests) == 1 else None


@dataclass(frozen=True)
class FuseRequest:
    """The settings and the contributions of one fuse, as they were before any weights were read.

    The identity is computed from this object alone, so nothing that a pass finds out can change it.
    """

    config: FuseConfig
    candidates: Sequence[Candidate]
    trusted: Sequence[TrustedKey] | None
    weights: Mapping[str, float] | None  # what the file of weights holds, if there is one
    stated: Sequence[Any]  # what identifies each candidate; None where only its body's digest does
    signers: Sequence[str | None]

    @classmethod
    def of(
        cls, config: FuseConfig, candidates: Sequence[Candidate], trusted: Sequence[TrustedKey] | None
    ) -> "FuseRequest":
        """Record what is asked for. Raises ConfigError if the file of weights cannot be read."""
        weights = _weights_file(Path(config.weights)) if config.weights not in ("equal", "examples") else None
        stated = [_stated_identity(item, verify=config.verify) for item in candidates]
        signers = [item.signed.key.fingerprint if item.signed else None for item in candidates]
        return cls(config, candidates, trusted, weights, stated, signers)

    def identity(self, base_digest: str) -> str:
        """Return the digest of the config and of all that was offered, whether it was then fused or not.

        Reads each body whose digest is neither stated nor computed yet.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            contributions = list(pool.map(_identity_of, self.candidates, self.stated))
        settings = replace(
            self.config, weights="file" if self.weights is not None else self.config.weights, trusted_keys=None
        )
        keys = {} if self.trusted is None else {"trusted": _fingerprints(self.trusted), "signers": self.signers}
        return identity("fuse", settings, base=base_digest, contributions=contributions, weights=self.weights, **keys)


def _stated_identity(item: Candidate, *, verify: bool) -> Any:
    """Return what identifies a candidate without reading its weights, None if only its body's digest does."""
    if item.checkpoint is None:
        return [item.name, *item.problems]
    if digest := item.stated_digest or item.digest:
        return digest
    return None if verify else [item.name, item.checkpoint.files]


def _identity_of(item: Candidate, stated: Any) -> Any:
    if stated is not None or item.checkpoint is None:
        return stated
    return item.digest or body_digest(item.checkpoint)


@dataclass(frozen=True)
class Fusion:
    """One fuse: its request, its base and destination, and where its passes run."""

    base: Model
    base_checkpoint: Checkpoint
    request: FuseRequest
    scale: Scale
    destination: Location
    progress: Progress
    spread: Spread | None = None  # where the passes run, if not here
    draw_chart: DrawChart | None = None

    @property
    def config(self) -> FuseConfig:
        """Return the settings as they were given."""
        return self.request.config

    @property
    def candidates(self) -> Sequence[Candidate]:
        """Return all contributions that were offered."""
        return self.request.candidates

    def run(self, folder: Location) -> Manifest:
        """Select, measure where something must be known before writing, write, verify, and describe the fused model.

        Returns the manifest. Raises CheckpointError, DeclinedError or ConfigError before the manifest is written.
        """
        self._verify_late()
        accepted = [item for item in self.candidates if not item.problems]
        if not accepted:
            self._accepted()  # raises
        statistics: UpdateStatistics | None = None
        base_digest: str | None = None
        if self._measures_first:
            accepted, statistics, base_digest = self._select(accepted)
        recipe = self._recipe(accepted, statistics)
        written, statistics, base_digest = self._write(folder, accepted, recipe, statistics, base_digest)
        if statistics is not None:
            self._note_statistics(accepted, statistics)
        self._write_config(folder)
        return self._describe(folder, written, accepted, recipe, base_digest)

    @property
    def _needs_gram(self) -> bool:
        return self.config.method in ("multi-krum", "geometric-median")

    @property
    def _measures_first(self) -> bool:
        """Return whether the updates are measured in a pass of its own, before the one that writes."""
        # Where one is refused already, the others are looked at, too, so that all findings are listed at once.
        refused = any(item.problems and not item.late for item in self.candidates)
        automatic = self.scale.automatic and self.config.method in WEIGHTED
        return refused or automatic or self._needs_gram or self.config.screen == "reject"

    def _select(self, accepted: Sequence[Candidate]) -> tuple[list[Candidate], UpdateStatistics, str]:
        """Verify and measure the contributions, and drop those that screening rejects.

        Returns the rest, the statistics of the rest, and the base's body digest. Raises as `_accepted` does.
        """
        prover = Prover(self._inputs(accepted), verify=self.config.verify, whole=self.spread is None)
        statistics = self._measure(accepted, prover)
        proof = prover.prove(self.spread)
        self._learn(accepted, proof)
        sound = [item for item in accepted if not item.problems]
        if len(sound) < len(accepted) and sound:  # what was refused must not hide who else stands out
            statistics = self._measure(sound)
        if self.config.screen == "reject" and sound:
            for index, reason in outliers(statistics, [item.name for item in sound], _discounts(sound)).items():
                sound[index].problems.append(f"outlier: {reason}")
                sound[index].attacking = True
        kept = self._accepted()
        if len(kept) < len(sound):
            statistics = self._measure(kept)
        return kept, statistics, proof.base_digest

    def _measure(self, accepted: Sequence[Candidate], prover: Prover | None = None) -> UpdateStatistics:
        """Read the contributions once, for the statistics of their updates and for `prover`, if there is one."""
        inputs = self._inputs(accepted)
        return measure_updates(
            inputs,
            self._weights(accepted),
            prover or Prover(inputs, verify=False, whole=False),
            gram=self._needs_gram,
            pairs=self.config.screen != "off",
            progress=self.progress,
            spread=self.spread,
        )

    def _write(
        self,
        folder: Location,
        accepted: Sequence[Candidate],
        recipe: Recipe,
        statistics: UpdateStatistics | None,
        base_digest: str | None,
    ) -> tuple[Written, UpdateStatistics | None, str]:
        """Write the fused weights, and verify and measure the contributions on the way if no pass before did.

        Returns what was written, the statistics and the base's body digest. Raises as `_accepted` does.
        """
        inputs = self._inputs(accepted)
        whole = self._in_name_order() and self.spread is None  # then digests are taken while the pass reads
        prover = Prover(inputs, verify=self.config.verify, whole=whole) if base_digest is None else None
        fresh = statistics is None and self.config.screen != "off"
        measured = UpdateStatistics(len(accepted), pairs=True) if fresh else None
        written = write(
            inputs,
            recipe,
            folder,
            prover=prover,
            statistics=measured,
            states=self._states(),
            progress=self.progress,
            spread=self.spread,
        )
        if prover is not None:
            proof = prover.prove(self.spread)
            self._learn(accepted, proof)
            self._accepted()
            base_digest = proof.base_digest
        assert base_digest is not None
        return written, statistics or measured, base_digest

    def _verify_late(self) -> None:
        """Read late contributions by themselves first, so that an unsound one does not stop the fuse."""
        late = [item for item in self.candidates if item.late and not item.problems]
        if late:
            inputs = self._inputs(late)
            prover = Prover(inputs, verify=self.config.verify, whole=True)
            equal = np.full(len(late), 1 / len(late))
            measure_updates(inputs, equal, prover, gram=False, pairs=False, progress=self.progress)
            self._learn(late, prover.prove())
        for item in self.candidates:
            if item.late and item.problems:
                self.progress.note(f"{item.name} came late and is left out: {'; '.join(item.problems)}")

    @property
    def _dropped_attackers(self) -> int:
        """Return how many of the attackers that multi-krum expects were dropped by screening."""
        return sum(item.attacking and not item.late for item in self.candidates)

    @property
    def _byzantine(self) -> int:
        """Return the number of attackers that multi-krum still expects among the accepted contributions."""
        expected = self.config.byzantine
        return max(0, expected - self._dropped_attackers) if self.config.method == "multi-krum" else expected

    def _accepted(self) -> list[Candidate]:
        """Return the candidates without problems.

        Raises DeclinedError if --strict forbids to drop the others, CheckpointError if screening does not drop them or
        too few would be left.
        """
        config, candidates = self.config, self.candidates
        good = [item for item in candidates if not item.problems]
        stopping = [item for item in candidates if item.problems and not item.late]  # late ones are only left out
        late = [item for item in candidates if item.problems and item.late]
        if good and not stopping and not (late and config.strict):
            return good
        details = [f"{item.place}: {problem}" for item in (*stopping, *late) for problem in item.problems]
        bad, total = len(candidates) - len(good), len(candidates)
        if config.strict:
            raise DeclinedError(f"{bad} of {total} contributions would be dropped, and --strict forbids that", details)
        if config.screen != "reject":
            remedy = "mend or remove them, or drop them with --screen reject"
            raise CheckpointError(f"{bad} of {total} contributions cannot be fused: {remedy}", details)
        total -= len(late)
        least = config.min_contributions or total // 2 + 1
        if len(good) < least:
            remedy = "mend the others, or lower --min-contributions"
            raise CheckpointError(
                f"only {len(good)} of {total} contributions can be fused, {least} are needed: {remedy}", details
            )
        return good

    def _in_name_order(self) -> bool:
        dtypes = {output_dtype(tensor, self.config) for tensor in self.base_checkpoint.body.values() if tensor.floating}
        return len(dtypes) == 1

    def _inputs(self, accepted: Sequence[Candidate]) -> Inputs:
        checkpoints = [item.checkpoint for item in accepted if item.checkpoint is not None]
        fisher = [open_companion(item, layout.FISHER) for item in checkpoints] if self.config.method == "fisher" else []
        return Inputs(self.base_checkpoint, checkpoints, fisher)

    def _weights(self, accepted: Sequence[Candidate]) -> Array:
        """Return the nominal weights: float64 [N], which sum to one. Raises ConfigError."""
        config, count = self.config, len(accepted)
        cap = config.max_share or None
        if config.weights == "examples":
            cap = max(config.max_share or min(1.0, _EXAMPLES_SHARE / count), 1 / count)
        return (
            np.full(count, 1 / count) if config.weights == "equal" else methods.normalised(self._shares(accepted), cap)
        )

    def _shares(self, accepted: Sequence[Candidate]) -> list[float]:
        """Return the weights before they are normalised. Raises ConfigError."""
        config = self.config
        if config.weights == "equal":
            return [1.0] * len(accepted)
        if config.weights == "examples":
            return [_examples(item) for item in accepted]
        table = self.request.weights or {}
        names = [item.name if item.name in table else item.contributor for item in accepted]
        if missing := [name for name in names if name not in table]:
            raise ConfigError(f"{config.weights} gives no weight for {missing[0]!r}: add it (0 leaves it out)")
        return [table[name] for name in names]

    def _recipe(self, accepted: Sequence[Candidate], statistics: UpdateStatistics | None) -> Recipe:
        """Compute the method's parameters, in a pass over the inputs if the method needs one. Raises ConfigError."""
        config, inputs = self.config, self._inputs(accepted)
        weights = self._weights(accepted)
        shares = np.asarray(self._shares(accepted), np.float64)
        gram = statistics.gram if statistics is not None else None
        if config.method == "multi-krum" and gram is not None:
            if self._byzantine < config.byzantine:
                self.progress.note(
                    f"screening dropped {self._dropped_attackers}, who count among the attackers of --byzantine "
                    f"{config.byzantine}: {self._byzantine} are left for multi-krum"
                )
            weights = methods.krum_weights(gram, self._byzantine)
        elif config.method == "geometric-median" and gram is not None:
            weights = methods.geometric_median_weights(gram, weights)
        elif config.method == "slerp" and len(accepted) != 2:
            raise ConfigError(f"slerp takes two contributions, there are {len(accepted)}: take --method mean")
        elif config.method == "trimmed-mean":
            methods.trimmed_mean([np.zeros(1)] * len(accepted), config.trim)  # refuses a trim that leaves nothing
        if config.method == "dare":  # its draws are seeded by the body digest
            for item in accepted:
                if item.checkpoint is not None and item.digest is None:
                    item.digest = body_digest(item.checkpoint)
        keys = [item.digest or item.name for item in accepted]
        plain = np.array_equal(weights, shares / shares.sum())  # neither capped nor computed by a method
        recipe = Recipe(config, weights, keys, shares if plain else None)
        if config.method in PER_TENSOR:
            recipe.tensor_weights = tensor_weights(inputs, config, self.progress, self.spread)
        elif config.method == "ties":
            recipe.thresholds = thresholds(inputs, recipe.density, self.progress, self.spread)
        recipe.scale = self.scale.value
        if self.scale.automatic:
            recipe.scale *= self._automatic_scale(recipe, inputs, statistics)
            self.progress.note(f"scale {config.scale}: {recipe.scale:.4g}")
        return recipe

    def _automatic_scale(self, recipe: Recipe, inputs: Inputs, statistics: UpdateStatistics | None) -> float:
        """Return λ = Σ wᵢ‖dᵢ‖ / ‖merged − base‖, which gives the fused update the mean norm; 1 if its norm is zero."""
        if statistics is None:
            statistics = measure_updates(
                inputs, recipe.weights, Prover(inputs, verify=False, whole=False), gram=False, pairs=False,
                progress=self.progress, spread=self.spread,
            )  # fmt: skip
        mean_of_norms = float(recipe.weights @ statistics.norms)
        if recipe.config.method in ("mean", "task-arithmetic"):
            length = statistics.mean_norm
        elif statistics.gram is not None:
            length = float(np.sqrt(abs(float(recipe.weights @ statistics.gram @ recipe.weights))))
        else:
            length = distance(inputs, recipe, self.progress, self.spread)
        return mean_of_norms / length if length > 0 else 1.0

    def _learn(self, accepted: Sequence[Candidate], proof: Proof) -> None:
        """Add the digests and problems that a pass proved to the candidates. Raises CheckpointError for an unsound base."""
        label = self.base_checkpoint.label
        if tensors := names_of(proof.findings, -1):
            raise CheckpointError(f"{label}: {tensors[0]} holds a not-a-number or infinity: take a sound base model")
        if proof.base_problems:
            raise CheckpointError(f"{label}: {proof.base_problems[0]}: make or fetch the base model again")
        for index, item in enumerate(accepted):
            if item.checkpoint is not None and not item.age and not self.config.allow_other_base:
                finding = other_base(item.checkpoint, proof.base_digest)  # so far the base was only presumed
                item.problems += [f"{finding}: give that base as --base"] if finding else []
                if finding and isinstance(item.checkpoint, RelativeCheckpoint):
                    continue  # decoded from another base, its values mean nothing
            item.digest = proof.digests[index] or None
            item.problems += proof.problems[index]
            has_manifest = item.checkpoint is not None and item.checkpoint.manifest is not None
            item.verified = self.config.verify and has_manifest and not item.problems
            if tensors := names_of(proof.findings, index):
                more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
                item.problems.append(f"{tensors[0]}{more} holds a not-a-number or infinity")
                item.attacking = True

    def _note_statistics(self, accepted: Sequence[Candidate], statistics: UpdateStatistics) -> None:
        norms, cosines = statistics.norms, statistics.cosines
        names = [item.name for item in accepted]
        reasons = outliers(statistics, names, _discounts(accepted)) if self.config.screen == "report" else {}
        for index, item in enumerate(accepted):
            item.update_norm, item.cosine_to_mean = float(norms[index]), float(cosines[index])
            item.update_share = statistics.shares(index)
            if index in reasons:
                item.notes.append(f"outlier: {reasons[index]}")
                self.progress.note(f"{item.name} stands out: {reasons[index]}; --screen reject would drop it")

    def _states(self) -> list[Checkpoint]:
        """Return the outer optimiser's states from the base, an empty list if another optimiser or none made the base.

        Raises CheckpointError if only some of them are there.
        """
        kinds = OUTER_STATES.get(self.config.outer_optimizer, ())
        before = self.base_checkpoint.manifest
        earlier = before["config"].get("outer_optimizer", "none") if before and "config" in before else "none"
        if not kinds or earlier != self.config.outer_optimizer:
            if kinds and earlier != "none":
                self.progress.note(f"the base was made with {earlier}: {self.config.outer_optimizer} starts anew")
            return []
        return [open_companion(self.base_checkpoint, layout.outer_state(kind)) for kind in kinds]

    def _reported_weights(self, recipe: Recipe) -> Array:
        """Return the effective weights: float64 [N]. Weights per tensor are averaged over all elements."""
        if not recipe.tensor_weights:
            return recipe.weights
        body = self.base_checkpoint.body
        sizes = np.asarray([body[name].size for name in recipe.tensor_weights], np.float64)
        rows = np.stack([item.contributions for item in recipe.tensor_weights.values()])
        return np.asarray(sizes @ rows / sizes.sum())

    def _write_config(self, folder: Location) -> None:
        names = {name: key for key, name in DTYPE_NAMES.items()}
        first = next((tensor.dtype for tensor in self.base_checkpoint.body.values() if tensor.floating), "F32")
        document = bare_config(self.base_checkpoint.config, self.config.dtype or names.get(first))
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        (folder / layout.MODEL_CONFIG).write_text(text, encoding="utf-8")

    def _describe(
        self,
        folder: Location,
        written: Written,
        fused: Sequence[Candidate],
        recipe: Recipe,
        base_digest: str,
    ) -> Manifest:
        """Copy the base's tokenizer, draw the chart and write the manifest: the last file."""
        name = model_name(self.destination)
        model = open_checkpoint(open_folder(folder), name)
        weights = self._reported_weights(recipe)
        shares = {id(item): float(weight) for item, weight in zip(fused, weights, strict=True)}
        records = [_record(item, shares.get(id(item))) for item in self.candidates]
        sanitize.copy_tokenizer(self.base_checkpoint.folder, folder)
        if self.draw_chart is not None:
            self.draw_chart(records, folder / layout.FUSE_CHART)
        before = self.base_checkpoint.manifest
        ancestor = (
            manifest.shortened(before)
            if before
            else {"kind": "pretrained", "name": self.base.name, "body_digest": base_digest}
        )
        document: Manifest = {
            "kind": "fused",
            "name": name,
            "iteration": ((before.get("iteration") or 0) if before else 0) + 1,
            "encoding": "full",
            "identity": self.request.identity(base_digest),
            "body_digest": written.body_digest or body_digest(model),  # mixed dtypes are not written in name order
            "outside_body": outside_body(model),
            "base": {"name": ancestor["name"], "body_digest": base_digest},
            "config": {
                **_public_record(self.config, self.request.trusted),
                "byzantine": self._byzantine,
                "effective_scale": recipe.scale,
            },
            "environment": manifest.environment(["numpy", "ml-dtypes"]),
            "license": before.get("license") if before else None,
            "contributions": records,
            "ancestors": [*(before.get("ancestors", []) if before else []), ancestor],
        }
        return manifest.write(folder, document, written.digests)


def model_name(destination: Location) -> str:
    """Return the name of a directory, or that of its iteration inside a RUN."""
    whole = destination.resolve()
    return whole.parent.name if whole.name == "fused" and whole.parent.name.startswith("iteration-") else whole.name


def _record(item: Candidate, weight: float | None) -> ContributionRecord:
    source = item.checkpoint.manifest if item.checkpoint else None
    data = source.get("dataset", {}) if source else {}
    fused = weight is not None
    return {
        "name": item.name,
        "dataset": data.get("name"),
        "num_train": data.get("num_train"),
        "source": data.get("source"),
        "license": source.get("license") if source else None,
        "training": _chosen(source.get("config"), _TRAINING) if source else {},
        "environment": _chosen(source.get("environment"), _HARDWARE) if source else {},
        "body_digest": item.digest or item.stated_digest or "",
        "weight": weight or 0.0,
        "status": "fused" if fused else "rejected",
        "reason": _without_place("; ".join(item.problems), item) or None,
        "verified": item.verified,
        "age": item.age,
        "discount": staleness_weight(item.age),
        "iteration": source.get("iteration") if source else None,
        "signer": item.signed.key.name if item.signed else None,
        "signer_key": item.signed.key.fingerprint if item.signed else None,
        "signers_within": signers_within(source) if source else {},
        "update_norm": item.update_norm if fused else None,
        "cosine_to_mean": item.cosine_to_mean if fused else None,
        "update_share": item.update_share if fused else None,
        "notes": [_without_place(note, item) for note in item.notes],
    }


def _discounts(items: Sequence[Candidate]) -> Array:
    return np.asarray([staleness_weight(item.age) for item in items], np.float64)


def _chosen(record: Any, keys: Sequence[str]) -> dict[str, Any]:
    """Return these keys of a contribution's own record, if they hold a number or text."""
    values = record if isinstance(record, dict) else {}
    return {key: values[key] for key in keys if isinstance(values.get(key), int | float | str)}


def _without_place(text: str, item: Candidate) -> str:
    """Replace the place of a candidate by its name, since a manifest is published and must not tell local paths."""
    return text.replace(f"{item.place}/", "").replace(item.place, item.name)


def _examples(item: Candidate) -> float:
    source = item.checkpoint.manifest if item.checkpoint else None
    count = source.get("dataset", {}).get("num_train") if source else None
    if not isinstance(count, int) or count <= 0:
        raise ConfigError(
            f"--weights examples: {item.name} does not say how many training examples it had: give a FILE"
        )
    return float(count)


def _weights_file(path: Path) -> dict[str, float]:
    """Load names and weights from a JSON or TOML file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(JSON_LIMIT + 1)
        table = json_value(data) if path.suffix == ".json" else toml_table(data)
    except FileNotFoundError:
        raise ConfigError(f"--weights {path}: give equal, examples, or a file that exists") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--weights {path} cannot be read: {error}") from None
    if find_mismatch(table, dict[str, float]):
        raise ConfigError(f"--weights {path}: write one `name = weight` per contribution (JSON or TOML)")
    return {str(key): float(value) for key, value in table.items()}


def _public_record(config: FuseConfig, trusted: Sequence[TrustedKey] | None) -> dict[str, Any]:
    """Return the config as the manifest stores it: a file of weights by its name alone, keys by their fingerprints."""
    record = as_record(config)
    record["trusted_keys"] = _fingerprints(trusted)
    if config.weights not in ("equal", "examples"):
        record["weights"] = Path(config.weights).name
    return record


def _fingerprints(trusted: Sequence[TrustedKey] | None) -> dict[str, str] | None:
    return None if trusted is None else {key.name: key.fingerprint for key in trusted}
