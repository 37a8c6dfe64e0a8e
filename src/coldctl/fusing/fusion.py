"""One fuse as a whole: what is offered, what is accepted of it, the passes over it, and what is said of it.

The stage decides where inputs come from and where the result goes; the passes read and write. Here stands what
lies between: verdicts, weights, the length of the step, the manifest.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
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
from coldctl.common.parsing import JSON_LIMIT, NUMBER, json_value, misfit, toml_table
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
    survey,
    tensor_weights,
    thresholds,
)
from coldctl.fusing.recipe import OUTER_STATES, PER_TENSOR, UNWEIGHTED, WEIGHTED, Recipe
from coldctl.fusing.sinks import Written, output_dtype
from coldctl.fusing.staleness import discount, moved
from coldctl.fusing.statistics import UpdateStatistics, names_of, outliers
from coldctl.fusing.writer import Without, write
from coldctl.storage.files import open_folder
from coldctl.storage.location import Location

# What a fused model tells of its contributions' training.
_TRAINING = ("epochs", "batch_size", "learning_rate", "max_length", "lora_rank", "send", "seed")
_HARDWARE = ("device", "machine", "threads", "training_seconds")
_EXAMPLES_SHARE = 2.0  # with --weights examples nobody counts for more than this many equal shares


def check_config(config: FuseConfig) -> Scale:
    """Settings that do not go together are refused before anything is read. Raises ConfigError."""
    scale = config.scale
    if config.outer_optimizer != "none" and scale != Scale():
        raise ConfigError("--scale and --outer-optimizer exclude each other: --outer-lr is the length of the step")
    if scale.automatic and config.method in PER_TENSOR:
        raise ConfigError(f"--scale auto does not go with {config.method}, which finds its own length: give a number")
    if config.weights != "equal" and config.method in UNWEIGHTED:
        raise ConfigError(f"{config.method} takes no --weights: leave them out, or take --method mean")
    if config.leave_one_out and (
        config.method not in ("mean", "task-arithmetic") or scale.automatic or config.outer_optimizer != "none"
    ):
        raise ConfigError(
            "--leave-one-out goes with linear methods only: --method mean or task-arithmetic, a fixed --scale"
        )
    if config.trusted_keys is not None and not config.verify:
        raise ConfigError(
            "--no-verify and --trusted-keys exclude each other: a signature says nothing of files not looked at"
        )
    return scale


def judge(item: Candidate, base: Checkpoint, base_digest: str | None, config: FuseConfig) -> None:
    """Judge a candidate by its headers, after leaving out rows where that is asked for."""
    if item.checkpoint is None:
        return
    if config.common_rows:
        item.checkpoint = with_common_rows(base, item.checkpoint)
    verdict = compare(
        base, item.checkpoint, None if item.age else base_digest, allow_other_base=config.allow_other_base
    )
    item.problems += verdict.problems
    item.notes += verdict.notes
    if item.base_then is not None and not item.problems:
        try:
            item.checkpoint = moved(item.checkpoint, base, item.base_then, item.age)
        except CheckpointError as error:
            item.problems.append(error.message)
    if config.method == "fisher":
        try:
            open_companion(item.checkpoint, layout.FISHER)
        except ColdctlError as error:
            item.problems.append(f"{error.message}: --method fisher needs it")


def stated_digest(checkpoint: Checkpoint) -> str | None:
    """The body digest that a checkpoint's manifest states, None without one."""
    return checkpoint.manifest["body_digest"] if checkpoint.manifest else None


def presumed_base(candidates: Sequence[Candidate], config: FuseConfig) -> str | None:
    """The base that all manifests name alike, for a base that has no manifest itself.

    Every other verdict can be given on it at once; that it is the base, the digest taken while reading proves.
    """
    if config.allow_other_base:
        return None
    manifests = [item.checkpoint.manifest for item in candidates if item.checkpoint and item.checkpoint.manifest]
    named = {document.get("base", {}).get("body_digest") for document in manifests}
    return named.pop() if len(named) == 1 else None


@dataclass
class Fusion:
    """One fuse: what is offered, what is accepted of it, and the passes over it."""

    base: Model
    base_checkpoint: Checkpoint
    candidates: list[Candidate]
    config: FuseConfig
    scale: Scale
    destination: Location
    progress: Progress
    trusted: Sequence[TrustedKey] | None = None
    spread: Spread | None = None  # where the passes run, if not here
    draw_chart: Callable[[Sequence[ContributionRecord], Location], None] | None = (
        None  # of norms and angles, into a file
    )

    def run(self, partial: Location) -> Manifest:
        """Accept, survey if something must be known first, write, prove, describe."""
        config = self.config
        self._look_at_late()
        accepted = [item for item in self.candidates if not item.problems]
        suspicious = any(item.problems and not item.late for item in self.candidates)
        if not accepted:
            self._accepted()
        whole = self._in_name_order() and self.spread is None  # digests are taken by the way
        statistics: UpdateStatistics | None = None
        proof: Proof | None = None
        gram, pairs = config.method in ("multi-krum", "geometric-median"), config.screen != "off"
        # Where one is refused already, the others are looked at, too, so that all findings are listed at once.
        if suspicious or config.screen == "reject" or gram or (self.scale.automatic and config.method in WEIGHTED):
            prover = Prover(self._inputs(accepted), verify=config.verify, whole=self.spread is None)
            statistics = survey(
                self._inputs(accepted), self._weights(accepted), prover, gram=gram, pairs=pairs, progress=self.progress,
                spread=self.spread,
            )  # fmt: skip
            proof = prover.prove(self.spread)
            self._learn(accepted, proof)
            sound = [item for item in accepted if not item.problems]
            if len(sound) < len(accepted) and sound:  # what was refused must not hide who else stands out
                statistics = self._survey_again(sound, gram=gram)
            if config.screen == "reject" and sound:
                for index, reason in outliers(statistics, [item.name for item in sound], _discounts(sound)).items():
                    sound[index].problems.append(f"outlier: {reason}")
                    sound[index].attacking = True
            accepted = self._accepted()
            self._expect_fewer()
            if len(accepted) < len(sound):
                statistics = self._survey_again(accepted, gram=gram)
        inputs = self._inputs(accepted)
        recipe = self._recipe(accepted, inputs, statistics)
        writing_prover = Prover(inputs, verify=config.verify, whole=whole) if proof is None else None
        fresh = UpdateStatistics(len(recipe.weights), pairs=pairs) if statistics is None and pairs else None
        without = self._without(partial, accepted, recipe.weights)
        states = self._states()
        written, lacking = write(
            inputs,
            recipe,
            partial,
            prover=writing_prover,
            statistics=fresh,
            states=states,
            without=without,
            progress=self.progress,
            spread=self.spread,
        )
        if writing_prover is not None:
            proof = writing_prover.prove(self.spread)
            self._learn(accepted, proof)
            self._accepted()
        assert proof is not None
        statistics = statistics or fresh
        if statistics is not None:
            self._note_statistics(accepted, statistics)
        self._write_config(partial)
        if not written.body_digest:  # mixed dtypes are not written in name order
            written = replace(written, body_digest=body_digest(open_checkpoint(open_folder(partial), "fused")))
        for item in without:
            rest = [candidate for index, candidate in enumerate(accepted) if index != item.index]
            weights = np.delete(recipe.weights, item.index)
            self._describe(
                item.folder, lacking[item.index], rest, weights / weights.sum(), recipe.scale, proof.base_digest
            )
        return self._describe(
            partial, written, accepted, self._reported_weights(recipe), recipe.scale, proof.base_digest
        )

    def _look_at_late(self) -> None:
        """Read late contributions by themselves first, so that what is wrong with them stops nobody else."""
        late = [item for item in self.candidates if item.late and not item.problems]
        if late:
            inputs = self._inputs(late)
            prover = Prover(inputs, verify=self.config.verify, whole=True)
            equal = np.full(len(late), 1 / len(late))
            survey(inputs, equal, prover, gram=False, pairs=False, progress=self.progress)
            self._learn(late, prover.prove())
        for item in self.candidates:
            if item.late and item.problems:
                self.progress.note(f"{item.name} came late and is left out: {'; '.join(item.problems)}")

    def _expect_fewer(self) -> None:
        """Multi-Krum bears f attackers among all that are offered; those that screening found are no longer among them."""
        config, found = self.config, sum(item.attacking and not item.late for item in self.candidates)
        if config.method == "multi-krum" and min(found, config.byzantine):
            self.config = replace(config, byzantine=max(0, config.byzantine - found))
            self.progress.note(
                f"screening dropped {found}, who count among the attackers of --byzantine {config.byzantine}: "
                f"{self.config.byzantine} are left for multi-krum"
            )

    def _survey_again(self, accepted: Sequence[Candidate], *, gram: bool) -> UpdateStatistics:
        inputs = self._inputs(accepted)
        prover = Prover(inputs, verify=False, whole=False)
        pairs = self.config.screen != "off"
        return survey(
            inputs, self._weights(accepted), prover, gram=gram, pairs=pairs, progress=self.progress, spread=self.spread
        )

    def _accepted(self) -> list[Candidate]:
        """The candidates without problems. Raises if a problem must stop everything."""
        config, candidates = self.config, self.candidates
        good = [item for item in candidates if not item.problems]
        stopping = [item for item in candidates if item.problems and not item.late]  # late ones were looked at before
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
        """The nominal weights, normalised. Raises ConfigError."""
        config, count = self.config, len(accepted)
        cap = config.max_share or None
        if config.weights == "examples":
            cap = max(config.max_share or min(1.0, _EXAMPLES_SHARE / count), 1 / count)
        return (
            np.full(count, 1 / count) if config.weights == "equal" else methods.normalised(self._shares(accepted), cap)
        )

    def _shares(self, accepted: Sequence[Candidate]) -> list[float]:
        """The weights as they are given, before they are made to sum to one. Raises ConfigError."""
        config = self.config
        if config.weights == "equal":
            return [1.0] * len(accepted)
        if config.weights == "examples":
            return [_examples(item) for item in accepted]
        table = _weights_file(Path(config.weights))
        names = [item.name if item.name in table else item.contributor for item in accepted]
        if missing := [name for name in names if name not in table]:
            raise ConfigError(f"{config.weights} gives no weight for {missing[0]!r}: add it (0 leaves it out)")
        return [table[name] for name in names]

    def _recipe(self, accepted: Sequence[Candidate], inputs: Inputs, statistics: UpdateStatistics | None) -> Recipe:
        """Find the method's parameters, reading the inputs again where it must."""
        config = self.config
        weights = self._weights(accepted)
        shares = np.asarray(self._shares(accepted), np.float64)
        gram = statistics.gram if statistics is not None else None
        if config.method == "multi-krum" and gram is not None:
            weights = methods.krum_weights(gram, config.byzantine)
        elif config.method == "geometric-median" and gram is not None:
            weights = methods.geometric_median_weights(gram, weights)
        elif config.method == "slerp" and len(accepted) != 2:
            raise ConfigError(f"slerp takes two contributions, there are {len(accepted)}: take --method mean")
        elif config.method == "trimmed-mean":
            methods.trimmed_mean([np.zeros(1)] * len(accepted), config.trim)  # refuses a trim that leaves nothing
        if config.method == "dare":  # draws belong to a body, whatever it is called and however it was looked at before
            for item in accepted:
                if item.checkpoint is not None and item.digest is None:
                    item.digest = body_digest(item.checkpoint)
        keys = [item.digest or item.name for item in accepted]
        plain = np.array_equal(weights, shares / shares.sum())  # neither cut to a largest share nor found by a method
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
        """λ = Σ wᵢ‖dᵢ‖ / ‖merged − base‖: the fused update gets the contributions' mean norm; 1 where it is zero."""
        if statistics is None:
            statistics = survey(
                inputs, recipe.weights, Prover(inputs, verify=False, whole=False), gram=False, pairs=False,
                progress=self.progress, spread=self.spread,
            )  # fmt: skip
        wanted = float(recipe.weights @ statistics.norms)
        if recipe.config.method in ("mean", "task-arithmetic"):
            length = statistics.mean_norm
        elif statistics.gram is not None:
            length = float(np.sqrt(abs(float(recipe.weights @ statistics.gram @ recipe.weights))))
        else:
            length = distance(inputs, recipe, self.progress, self.spread)
        return wanted / length if length > 0 else 1.0

    def _learn(self, accepted: Sequence[Candidate], proof: Proof) -> None:
        """What a pass has proved becomes the candidates' digests and problems. Raises CheckpointError for the base."""
        label = self.base_checkpoint.label
        if tensors := names_of(proof.findings, -1):
            raise CheckpointError(f"{label}: {tensors[0]} holds a not-a-number or infinity: take a sound base model")
        if proof.base_problems:
            raise CheckpointError(f"{label}: {proof.base_problems[0]}: make or fetch the base model again")
        for index, item in enumerate(accepted):
            if item.checkpoint is not None and not item.age and not self.config.allow_other_base:
                finding = other_base(item.checkpoint, proof.base_digest)  # until now the base was only presumed
                item.problems += [f"{finding}: give that base as --base"] if finding else []
                if finding and isinstance(item.checkpoint, RelativeCheckpoint):
                    continue  # what was decoded from another base tells nothing more
            item.digest = proof.digests[index] or None
            changed = proof.problems[index]
            if changed and item.signed is not None:  # the signer's name stands for what was signed alone
                changed, item.signed = [f"is not as it was signed: {problem}" for problem in changed], None
            item.problems += changed
            has_manifest = item.checkpoint is not None and item.checkpoint.manifest is not None
            item.verified = self.config.verify and has_manifest and not item.problems
            if tensors := names_of(proof.findings, index):
                more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
                item.problems.append(f"{tensors[0]}{more} holds a not-a-number or infinity")
                item.attacking = True

    def _note_statistics(self, accepted: Sequence[Candidate], statistics: UpdateStatistics) -> None:
        norms, cosines = statistics.norms, statistics.cosines
        names = [item.name for item in accepted]
        found = outliers(statistics, names, _discounts(accepted)) if self.config.screen == "report" else {}
        for index, item in enumerate(accepted):
            item.update_norm, item.cosine_to_mean = float(norms[index]), float(cosines[index])
            item.update_share = statistics.shares(index)
            if index in found:
                item.notes.append(f"outlier: {found[index]}")
                self.progress.note(f"{item.name} stands out: {found[index]}; --screen reject would drop it")

    def _without(self, partial: Location, accepted: Sequence[Candidate], weights: Array) -> list[Without]:
        if not self.config.leave_one_out:
            return []
        if np.count_nonzero(weights) < 2:
            raise ConfigError("--leave-one-out needs two contributions or more that have a weight")
        made = []
        for index, item in enumerate(accepted):
            folder = partial / layout.LEAVE_ONE_OUT / re.sub(r"[/\\]", "-", item.name)
            folder.mkdir(parents=True)
            self._write_config(folder)
            made.append(Without(index, folder))
        return made

    def _states(self) -> list[Checkpoint]:
        """The outer optimiser's states beside the base; none where it has none yet, or another optimiser's.

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
        """The effective weights; for weights per tensor their mean over all elements."""
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
        weights: Array,
        scale: float,
        base_digest: str,
    ) -> Manifest:
        """Copy the base's tokenizer, draw the chart and write the manifest: the last file."""
        main = folder.parent.name != layout.LEAVE_ONE_OUT
        name = model_name(self.destination) if main else f"{model_name(self.destination)}-without-{folder.name}"
        shares = {id(item): float(weight) for item, weight in zip(fused, weights, strict=True)}
        offered = self.candidates if main else fused
        records = [_record(item, shares.get(id(item))) for item in offered]
        sanitize.copy_tokenizer(self.base_checkpoint.folder, folder)
        if main and self.draw_chart is not None:
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
            "identity": fuse_identity(self.config, base_digest, self.candidates, self.trusted),
            "body_digest": written.body_digest or body_digest(open_checkpoint(open_folder(folder), name)),
            "outside_body": outside_body(open_checkpoint(open_folder(folder), name)),
            "base": {"name": ancestor["name"], "body_digest": base_digest},
            "config": {**_public_record(self.config, self.trusted), "effective_scale": scale},
            "environment": manifest.environment(["numpy", "ml-dtypes"]),
            "license": before.get("license") if before else None,
            "contributions": records,
            "ancestors": [*(before.get("ancestors", []) if before else []), ancestor],
        }
        return manifest.write(folder, document, written.digests)


def model_name(destination: Location) -> str:
    """The directory's own name, or its iteration's inside a RUN."""
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
        "discount": discount(item.age),
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
    return np.asarray([discount(item.age) for item in items], np.float64)


def _chosen(record: Any, keys: Sequence[str]) -> dict[str, Any]:
    """These keys of what a contribution states about itself, where they hold what they should."""
    known = record if isinstance(record, dict) else {}
    return {key: known[key] for key in keys if isinstance(known.get(key), int | float | str)}


def _without_place(text: str, item: Candidate) -> str:
    """What is published must not tell where on this machine something lay."""
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
    """Names and weights from a JSON or TOML file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(JSON_LIMIT + 1)
        table = json_value(data) if path.suffix == ".json" else toml_table(data)
    except FileNotFoundError:
        raise ConfigError(f"--weights {path}: give equal, examples, or a file that exists") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--weights {path} cannot be read: {error}") from None
    if not isinstance(table, dict) or misfit(table, {...: NUMBER}):
        raise ConfigError(f"--weights {path}: write one `name = weight` per contribution (JSON or TOML)")
    return {str(key): float(value) for key, value in table.items()}


def _public_record(config: FuseConfig, trusted: Sequence[TrustedKey] | None) -> dict[str, Any]:
    """The config as the manifest stores it; a file of weights is named, its place is not told, keys by fingerprint."""
    record = as_record(config)
    record["trusted_keys"] = _fingerprints(trusted)
    if config.weights not in ("equal", "examples"):
        record["weights"] = Path(config.weights).name
    return record


def _fingerprints(trusted: Sequence[TrustedKey] | None) -> dict[str, str] | None:
    return None if trusted is None else {key.name: key.fingerprint for key in trusted}


def _offered(item: Candidate, *, verify: bool) -> Any:
    """What stands for one candidate in the identity: its body's digest, if that may cost reading it."""
    if item.checkpoint is None:
        return [item.name, *item.problems]
    known = item.stated_digest or item.digest
    if known or verify:
        return known or body_digest(item.checkpoint)
    return [item.name, item.checkpoint.files]


def fuse_identity(
    config: FuseConfig, base_digest: str, candidates: Sequence[Candidate], trusted: Sequence[TrustedKey] | None
) -> str:
    """The config and the digests of all that was offered, whether it was then fused or not."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(partial(_offered, verify=config.verify), candidates))
    table = _weights_file(Path(config.weights)) if config.weights not in ("equal", "examples") else None
    settings = replace(config, weights="file" if table is not None else config.weights, trusted_keys=None)
    signers = None if trusted is None else [item.signed.key.fingerprint if item.signed else None for item in candidates]
    keys = {"trusted": _fingerprints(trusted), "signers": signers} if trusted is not None else {}
    return identity("fuse", settings, base=base_digest, contributions=digests, weights=table, **keys)
