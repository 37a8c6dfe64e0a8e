"""One fuse: select, measure, write, describe.

The stage decides where inputs come from and where the result goes. The passes read and write the weights.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from coldctl.artifacts import layout, manifest
from coldctl.artifacts.manifest import ContributionRecord, Manifest
from coldctl.artifacts.model_ref import Model
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.body_export import bare_config
from coldctl.checkpoints.checkpoint import Checkpoint, open_checkpoint, open_companion
from coldctl.checkpoints.digests import body_digest, outside_body
from coldctl.checkpoints.header import DTYPE_NAMES
from coldctl.common.errors import CheckpointError, ConfigError, DeclinedError
from coldctl.common.progress import Progress
from coldctl.config.settings import FuseConfig
from coldctl.config.values import Scale
from coldctl.fusing.blocks import Array
from coldctl.fusing.compatibility import other_base
from coldctl.fusing.contributions import Contribution
from coldctl.fusing.late import staleness_weight
from coldctl.fusing.methods import find_method
from coldctl.fusing.passes import (
    Inputs,
    Spread,
    Verification,
    Verifier,
    distance,
    measure_updates,
    tensor_weights,
    thresholds,
)
from coldctl.fusing.recipe import OUTER_STATES, Method, Need, Recipe, shares_of, weights_of
from coldctl.fusing.record import FuseRequest, contribution_record, model_name, public_record
from coldctl.fusing.statistics import UpdateStatistics, names_of, outliers
from coldctl.fusing.writer import Written, output_dtype, write
from coldctl.storage.location import Location
from coldctl.storage.remote import open_folder

DrawChart = Callable[[Sequence[ContributionRecord], Location], None]  # norms and angles of the updates, into a file


def check_config(config: FuseConfig) -> Scale:
    """Return the scale. Raises ConfigError for settings that exclude each other, before anything is read."""
    scale, method = config.scale, find_method(config.method)
    if config.outer_optimizer != "none" and scale != Scale():
        raise ConfigError("--scale and --outer-optimizer exclude each other: --outer-lr is the length of the step")
    if scale.automatic and method.per_tensor:
        raise ConfigError(f"--scale auto does not go with {config.method}, which finds its own length: give a number")
    if config.weights != "equal" and not method.takes_weights:
        raise ConfigError(f"{config.method} takes no --weights: leave them out, or take --method mean")
    if config.trusted_keys is not None and not config.verify:
        raise ConfigError(
            "--no-verify and --trusted-keys exclude each other: a signature says nothing of files not looked at"
        )
    return scale


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
    def method(self) -> Method:
        """Return the merge method."""
        return find_method(self.config.method)

    @property
    def contributions(self) -> Sequence[Contribution]:
        """Return all contributions that were offered."""
        return self.request.contributions

    def run(self, folder: Location) -> Manifest:
        """Select, measure where something must be known before writing, write, verify, and describe the fused model.

        Returns the manifest. Raises CheckpointError, DeclinedError or ConfigError before the manifest is written.
        """
        self._verify_late()
        accepted = [contribution for contribution in self.contributions if not contribution.rejections]
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
    def _measures_first(self) -> bool:
        """Return whether the updates are measured in a pass of its own, before the one that writes."""
        # Where one is refused already, the others are looked at, too, so that all findings are listed at once.
        refused = any(contribution.rejections and not contribution.late for contribution in self.contributions)
        automatic = self.scale.automatic and self.method.linear
        return refused or automatic or self.method.needs is Need.GRAM or self.config.screen == "reject"

    def _select(self, accepted: Sequence[Contribution]) -> tuple[list[Contribution], UpdateStatistics, str]:
        """Verify and measure the contributions, and drop those that screening rejects.

        Returns the rest, the statistics of the rest, and the base's body digest. Raises as `_accepted` does.
        """
        verifier = Verifier(self._inputs(accepted), verify=self.config.verify, whole=self.spread is None)
        statistics = self._measure(accepted, verifier)
        verification = verifier.verification(self.spread)
        self._learn(accepted, verification)
        sound = [contribution for contribution in accepted if not contribution.rejections]
        if len(sound) < len(accepted) and sound:  # what was refused must not hide who else stands out
            statistics = self._measure(sound)
        if self.config.screen == "reject" and sound:
            for index, reason in outliers(
                statistics, [contribution.name for contribution in sound], _discounts(sound)
            ).items():
                sound[index].rejections.append(f"outlier: {reason}")
                sound[index].attacking = True
        kept = self._accepted()
        if len(kept) < len(sound):
            statistics = self._measure(kept)
        return kept, statistics, verification.base_digest

    def _measure(self, accepted: Sequence[Contribution], verifier: Verifier | None = None) -> UpdateStatistics:
        """Read the contributions once, for the statistics of their updates and for `verifier`, if there is one."""
        inputs = self._inputs(accepted)
        return measure_updates(
            inputs,
            weights_of(self._shares(accepted), self.config),
            verifier or Verifier(inputs, verify=False, whole=False),
            gram=self.method.needs is Need.GRAM,
            pairs=self.config.screen != "off",
            progress=self.progress,
            spread=self.spread,
        )

    def _write(
        self,
        folder: Location,
        accepted: Sequence[Contribution],
        recipe: Recipe,
        statistics: UpdateStatistics | None,
        base_digest: str | None,
    ) -> tuple[Written, UpdateStatistics | None, str]:
        """Write the fused weights, and verify and measure the contributions on the way if no pass before did.

        Returns what was written, the statistics and the base's body digest. Raises as `_accepted` does.
        """
        inputs = self._inputs(accepted)
        whole = self._in_name_order() and self.spread is None  # then digests are taken while the pass reads
        verifier = Verifier(inputs, verify=self.config.verify, whole=whole) if base_digest is None else None
        fresh = statistics is None and self.config.screen != "off"
        measured = UpdateStatistics(len(accepted), pairs=True) if fresh else None
        written = write(
            inputs,
            recipe,
            folder,
            verifier=verifier,
            statistics=measured,
            states=self._states(),
            progress=self.progress,
            spread=self.spread,
        )
        if verifier is not None:
            verification = verifier.verification(self.spread)
            self._learn(accepted, verification)
            self._accepted()
            base_digest = verification.base_digest
        assert base_digest is not None
        return written, statistics or measured, base_digest

    def _verify_late(self) -> None:
        """Read late contributions by themselves first, so that an unsound one does not stop the fuse."""
        late = [
            contribution for contribution in self.contributions if contribution.late and not contribution.rejections
        ]
        if late:
            inputs = self._inputs(late)
            verifier = Verifier(inputs, verify=self.config.verify, whole=True)
            equal = np.full(len(late), 1 / len(late))
            measure_updates(inputs, equal, verifier, gram=False, pairs=False, progress=self.progress)
            self._learn(late, verifier.verification())
        for contribution in self.contributions:
            if contribution.late and contribution.rejections:
                self.progress.note(
                    f"{contribution.name} came late and is left out: {'; '.join(contribution.rejections)}"
                )

    @property
    def _dropped_attackers(self) -> int:
        """Return how many of the attackers that multi-krum expects were dropped by screening."""
        return sum(contribution.attacking and not contribution.late for contribution in self.contributions)

    @property
    def _byzantine(self) -> int:
        """Return the number of attackers that multi-krum still expects among the accepted contributions."""
        expected = self.config.byzantine
        return max(0, expected - self._dropped_attackers) if "byzantine" in self.method.settings else expected

    def _accepted(self) -> list[Contribution]:
        """Return the contributions that are not rejected.

        Raises DeclinedError if --strict forbids to drop the others, CheckpointError if screening does not drop them or
        too few would be left.
        """
        config, contributions = self.config, self.contributions
        good = [contribution for contribution in contributions if not contribution.rejections]
        stopping = [
            contribution for contribution in contributions if contribution.rejections and not contribution.late
        ]  # late ones are only left out
        late = [contribution for contribution in contributions if contribution.rejections and contribution.late]
        if good and not stopping and not (late and config.strict):
            return good
        details = [
            f"{contribution.place}: {problem}"
            for contribution in (*stopping, *late)
            for problem in contribution.rejections
        ]
        bad, total = len(contributions) - len(good), len(contributions)
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

    def _inputs(self, accepted: Sequence[Contribution]) -> Inputs:
        checkpoints = [contribution.checkpoint for contribution in accepted if contribution.checkpoint is not None]
        fisher = (
            [open_companion(contribution, layout.FISHER) for contribution in checkpoints]
            if self.method.needs is Need.FISHER
            else []
        )
        return Inputs(self.base_checkpoint, checkpoints, fisher)

    def _shares(self, accepted: Sequence[Contribution]) -> list[float]:
        return shares_of(accepted, self.config, self.request.weights)

    def _recipe(self, accepted: Sequence[Contribution], statistics: UpdateStatistics | None) -> Recipe:
        """Compute the method's parameters, in a pass over the inputs if the method needs one. Raises ConfigError."""
        config, method, inputs = self.config, self.method, self._inputs(accepted)
        shares = np.asarray(self._shares(accepted), np.float64)
        weights = weights_of(shares, config)
        if method.check is not None:
            method.check(config, len(accepted))
        if method.needs is Need.GRAM:
            weights = self._weights_from_gram(weights, statistics)
        if method.needs is Need.DIGESTS:
            for contribution in accepted:
                if contribution.checkpoint is not None and contribution.digest is None:
                    contribution.digest = body_digest(contribution.checkpoint)
        keys = [contribution.digest or contribution.name for contribution in accepted]
        plain = np.array_equal(weights, shares / shares.sum())  # neither capped nor computed by a method
        recipe = Recipe(config, method, weights, keys, shares if plain else None)
        if method.per_tensor:
            recipe = replace(recipe, tensor_weights=tensor_weights(inputs, recipe, self.progress, self.spread))
        elif method.needs is Need.RANKS:
            recipe = replace(recipe, thresholds=thresholds(inputs, recipe.density, self.progress, self.spread))
        scale = self.scale.value
        if self.scale.automatic:
            scale *= self._automatic_scale(recipe, inputs, statistics)
            self.progress.note(f"scale {config.scale}: {scale:.4g}")
        return replace(recipe, scale=scale)

    def _weights_from_gram(self, weights: Array, statistics: UpdateStatistics | None) -> Array:
        """Return the method's weights, float64 [N], from the nominal ones and the updates' inner products."""
        config = replace(self.config, byzantine=self._byzantine)
        assert self.method.solve is not None
        assert statistics is not None
        assert statistics.gram is not None
        if config.byzantine < self.config.byzantine:
            self.progress.note(
                f"screening dropped {self._dropped_attackers}, who count among the attackers of --byzantine "
                f"{self.config.byzantine}: {config.byzantine} are left for {self.method.name}"
            )
        return self.method.solve(statistics.gram, weights, config)

    def _automatic_scale(self, recipe: Recipe, inputs: Inputs, statistics: UpdateStatistics | None) -> float:
        """Return λ = Σ wᵢ‖dᵢ‖ / ‖merged − base‖, which gives the fused update the mean norm; 1 if its norm is zero."""
        if statistics is None:
            statistics = measure_updates(
                inputs, recipe.weights, Verifier(inputs, verify=False, whole=False), gram=False, pairs=False,
                progress=self.progress, spread=self.spread,
            )  # fmt: skip
        mean_of_norms = float(recipe.weights @ statistics.norms)
        if recipe.method.linear and recipe.method.needs is not Need.GRAM:
            length = statistics.mean_norm
        elif statistics.gram is not None:
            length = float(np.sqrt(abs(float(recipe.weights @ statistics.gram @ recipe.weights))))
        else:
            length = distance(inputs, recipe, self.progress, self.spread)
        return mean_of_norms / length if length > 0 else 1.0

    def _learn(self, accepted: Sequence[Contribution], verification: Verification) -> None:
        """Add the digests and mismatches that a pass found to the contributions. Raises CheckpointError for an unsound base."""
        label = self.base_checkpoint.label
        if tensors := names_of(verification.findings, -1):
            raise CheckpointError(f"{label}: {tensors[0]} holds a not-a-number or infinity: take a sound base model")
        if verification.base_mismatches:
            raise CheckpointError(f"{label}: {verification.base_mismatches[0]}: make or fetch the base model again")
        for index, contribution in enumerate(accepted):
            if contribution.checkpoint is not None and not contribution.age and not self.config.allow_other_base:
                finding = other_base(
                    contribution.checkpoint, verification.base_digest
                )  # so far the base was only presumed
                contribution.rejections += [f"{finding}: give that base as --base"] if finding else []
                if finding and contribution.checkpoint.relative:
                    continue  # decoded from another base, its values mean nothing
            contribution.digest = verification.digests[index] or None
            contribution.rejections += verification.mismatches[index]
            has_manifest = contribution.checkpoint is not None and contribution.checkpoint.manifest is not None
            contribution.verified = self.config.verify and has_manifest and not contribution.rejections
            if tensors := names_of(verification.findings, index):
                more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
                contribution.rejections.append(f"{tensors[0]}{more} holds a not-a-number or infinity")
                contribution.attacking = True

    def _note_statistics(self, accepted: Sequence[Contribution], statistics: UpdateStatistics) -> None:
        norms, cosines = statistics.norms, statistics.cosines
        names = [contribution.name for contribution in accepted]
        reasons = outliers(statistics, names, _discounts(accepted)) if self.config.screen == "report" else {}
        for index, contribution in enumerate(accepted):
            contribution.update_norm, contribution.cosine_to_mean = float(norms[index]), float(cosines[index])
            contribution.update_share = statistics.shares(index)
            if index in reasons:
                contribution.notes.append(f"outlier: {reasons[index]}")
                self.progress.note(f"{contribution.name} stands out: {reasons[index]}; --screen reject would drop it")

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
        rows = np.stack([weights[:-1] for weights in recipe.tensor_weights.values()])
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
        fused: Sequence[Contribution],
        recipe: Recipe,
        base_digest: str,
    ) -> Manifest:
        """Copy the base's tokenizer, draw the chart and write the manifest: the last file."""
        name = model_name(self.destination)
        model = open_checkpoint(open_folder(folder), name)
        weights = self._reported_weights(recipe)
        shares = {id(contribution): float(weight) for contribution, weight in zip(fused, weights, strict=True)}
        records = [
            contribution_record(contribution, shares.get(id(contribution))) for contribution in self.contributions
        ]
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
                **public_record(self.config, self.request.trusted),
                "byzantine": self._byzantine,
                "effective_scale": recipe.scale,
            },
            "environment": manifest.environment(["numpy", "ml-dtypes"]),
            "license": before.get("license") if before else None,
            "contributions": records,
            "ancestors": [*(before.get("ancestors", []) if before else []), ancestor],
        }
        return manifest.write(folder, document, written.digests)


def _discounts(items: Sequence[Contribution]) -> Array:
    return np.asarray([staleness_weight(contribution.age) for contribution in items], np.float64)
