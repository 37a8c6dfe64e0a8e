"""One fuse: select, measure, write, describe.

The stage decides where inputs come from and where the result goes. The passes read and write the weights.
"""

import json
from collections.abc import Callable, Mapping, Sequence
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
from coldctl.common.errors import ConfigError
from coldctl.common.progress import Progress
from coldctl.config.settings import FuseConfig
from coldctl.config.values import Scale
from coldctl.fusing.blocks import Array
from coldctl.fusing.contributions import Accepted, Contribution
from coldctl.fusing.late import staleness_weight
from coldctl.fusing.methods import find_method
from coldctl.fusing.passes import (
    Inputs,
    Spread,
    Verifier,
    distance,
    measure_updates,
    tensor_weights,
    thresholds,
)
from coldctl.fusing.recipe import OUTER_STATES, Method, Need, Recipe, shares_of, weights_of
from coldctl.fusing.record import FuseRequest, contribution_record, model_name, public_record
from coldctl.fusing.selection import Selection
from coldctl.fusing.statistics import UpdateStatistics, outliers
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

    def run(self, folder: Location) -> Manifest:
        """Select, measure where something must be known before writing, write, verify, and describe the fused model.

        Returns the manifest. Raises CheckpointError, DeclinedError or ConfigError before the manifest is written.
        """
        selection = self._verify_late(Selection(self.request.contributions))
        if not selection.accepted:
            selection.require_enough(self.config)  # raises
        if self._measures_first(selection):
            selection = self._select(selection)
        recipe = self._recipe(selection)
        if self.method.needs is Need.DIGESTS:  # then the keys of the recipe are digests of bodies
            digests = zip(selection.accepted, recipe.keys, strict=True)
            selection = selection.updated(replace(contribution, digest=digest) for contribution, digest in digests)
        written, selection = self._write(folder, selection, recipe)
        accepted = self._accepted(selection, recipe)
        self._write_config(folder)
        return self._describe(folder, written, selection, accepted, recipe)

    def _verify_late(self, selection: Selection) -> Selection:
        """Read late contributions by themselves first, so that an unsound one does not stop the fuse."""
        if late := [contribution for contribution in selection.accepted if contribution.late]:
            inputs = self._inputs(late)
            verifier = Verifier(inputs, verify=self.config.verify, whole=True)
            equal = np.full(len(late), 1 / len(late))
            measure_updates(inputs, equal, verifier, gram=False, pairs=False, progress=self.progress)
            selection = selection.verified(late, verifier.verification(), self.config, self.base_checkpoint.label)
        for contribution in selection.contributions:
            if contribution.late and contribution.rejections:
                reasons = "; ".join(contribution.rejections)
                self.progress.note(f"{contribution.name} came late and is left out: {reasons}")
        return selection

    def _measures_first(self, selection: Selection) -> bool:
        """Return whether the updates are measured in a pass of its own, before the one that writes."""
        # Where one is refused already, the others are looked at, too, so that all findings are listed at once.
        refused = any(contribution.rejections and not contribution.late for contribution in selection.contributions)
        automatic = self.scale.automatic and self.method.linear
        return refused or automatic or self.method.needs is Need.GRAM or self.config.screen == "reject"

    def _select(self, selection: Selection) -> Selection:
        """Verify and measure the accepted contributions, and drop those that screening rejects.

        Raises as `Selection.require_enough` does.
        """
        read = selection.accepted
        verifier = Verifier(self._inputs(read), verify=self.config.verify, whole=self.spread is None)
        statistics = self._measure(read, verifier)
        verification = verifier.verification(self.spread)
        selection = selection.verified(read, verification, self.config, self.base_checkpoint.label)
        sound = selection.accepted
        if len(sound) < len(read) and sound:  # what was refused must not hide who else stands out
            statistics = self._measure(sound)
        if self.config.screen == "reject" and sound:
            selection = selection.updated(
                replace(sound[index], attacking=True).judged([f"outlier: {reason}"])
                for index, reason in _outliers(sound, statistics).items()
            )
        kept = selection.require_enough(self.config)
        if len(kept) < len(sound):
            statistics = self._measure(kept)
        return replace(selection, statistics=statistics, base_digest=verification.base_digest)

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

    def _write(self, folder: Location, selection: Selection, recipe: Recipe) -> tuple[Written, Selection]:
        """Write the fused weights, and verify and measure the contributions on the way if no pass before did.

        Raises as `Selection.require_enough` does.
        """
        accepted = selection.accepted
        inputs = self._inputs(accepted)
        whole = self._in_name_order() and self.spread is None  # then digests are taken while the pass reads
        verifier = Verifier(inputs, verify=self.config.verify, whole=whole) if selection.base_digest is None else None
        fresh = selection.statistics is None and self.config.screen != "off"
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
        selection = replace(selection, statistics=measured or selection.statistics)
        if verifier is not None:
            verification = verifier.verification(self.spread)
            selection = selection.verified(accepted, verification, self.config, self.base_checkpoint.label)
            selection.require_enough(self.config, written=[contribution.name for contribution in accepted])
            selection = replace(selection, base_digest=verification.base_digest)
        return written, selection

    def _byzantine(self, selection: Selection) -> int:
        """Return the number of attackers that multi-krum still expects among the accepted contributions."""
        expected = self.config.byzantine
        return max(0, expected - selection.dropped_attackers) if "byzantine" in self.method.settings else expected

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

    def _recipe(self, selection: Selection) -> Recipe:
        """Compute the method's parameters, in a pass over the inputs if the method needs one. Raises ConfigError."""
        accepted = selection.accepted
        config, method, inputs = self.config, self.method, self._inputs(accepted)
        shares = np.asarray(self._shares(accepted), np.float64)
        weights = weights_of(shares, config)
        if method.check is not None:
            method.check(config, len(accepted))
        if method.needs is Need.GRAM:
            weights = self._weights_from_gram(weights, selection)
        keys = [contribution.digest or contribution.name for contribution in accepted]
        if method.needs is Need.DIGESTS:
            keys = [
                contribution.digest or body_digest(checkpoint)
                for contribution, checkpoint in zip(accepted, inputs.contributions, strict=True)
            ]
        plain = np.array_equal(weights, shares / shares.sum())  # neither capped nor computed by a method
        recipe = Recipe(config, method, weights, keys, shares if plain else None)
        if method.per_tensor:
            recipe = replace(recipe, tensor_weights=tensor_weights(inputs, recipe, self.progress, self.spread))
        elif method.needs is Need.RANKS:
            recipe = replace(recipe, thresholds=thresholds(inputs, recipe.density, self.progress, self.spread))
        scale = self.scale.value
        if self.scale.automatic:
            scale *= self._automatic_scale(recipe, inputs, selection.statistics)
            self.progress.note(f"scale {config.scale}: {scale:.4g}")
        return replace(recipe, scale=scale)

    def _weights_from_gram(self, weights: Array, selection: Selection) -> Array:
        """Return the method's weights, float64 [N], from the nominal ones and the updates' inner products."""
        config, statistics = replace(self.config, byzantine=self._byzantine(selection)), selection.statistics
        assert self.method.solve is not None
        assert statistics is not None
        assert statistics.gram is not None
        if config.byzantine < self.config.byzantine:
            self.progress.note(
                f"screening dropped {selection.dropped_attackers}, who count among the attackers of --byzantine "
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

    def _accepted(self, selection: Selection, recipe: Recipe) -> list[Accepted]:
        """Return the accepted contributions with their weights and statistics. Those that stand out get a note."""
        contributions, statistics = selection.accepted, selection.statistics
        weights = [float(weight) or 0.0 for weight in self._reported_weights(recipe)]  # 0.0 may be -0.0
        if statistics is None:
            return [Accepted(*row) for row in zip(contributions, weights, strict=True)]
        reasons = _outliers(contributions, statistics) if self.config.screen == "report" else {}
        for index, reason in reasons.items():
            name = contributions[index].name
            contributions[index] = contributions[index].judged([], [f"outlier: {reason}"])
            self.progress.note(f"{name} stands out: {reason}; --screen reject would drop it")
        norms, cosines = statistics.norms.tolist(), statistics.cosines.tolist()
        shares = map(statistics.shares, range(len(contributions)))
        return [Accepted(*row) for row in zip(contributions, weights, norms, cosines, shares, strict=True)]

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
        selection: Selection,
        accepted: Sequence[Accepted],
        recipe: Recipe,
    ) -> Manifest:
        """Copy the base's tokenizer, draw the chart and write the manifest: the last file."""
        name = model_name(self.destination)
        model = open_checkpoint(open_folder(folder), name)
        base_digest = selection.base_digest
        assert base_digest is not None
        by_name = {one.contribution.name: one for one in accepted}
        records = [contribution_record(by_name.get(one.name, one)) for one in selection.contributions]
        digests = {one.name: one.digest for one in selection.contributions}
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
            "identity": self.request.identity(base_digest, digests),
            "body_digest": written.body_digest or body_digest(model),  # mixed dtypes are not written in name order
            "outside_body": outside_body(model),
            "base": {"name": ancestor["name"], "body_digest": base_digest},
            "config": {
                **public_record(self.config, self.request.trusted),
                "byzantine": self._byzantine(selection),
                "effective_scale": recipe.scale,
            },
            "environment": manifest.environment(["numpy", "ml-dtypes"]),
            "license": before.get("license") if before else None,
            "contributions": records,
            "ancestors": [*(before.get("ancestors", []) if before else []), ancestor],
        }
        return manifest.write(folder, document, written.digests)


def _outliers(contributions: Sequence[Contribution], statistics: UpdateStatistics) -> Mapping[int, str]:
    """Return the reasons why updates stand out, by index."""
    names = [contribution.name for contribution in contributions]
    discounts = np.asarray([staleness_weight(contribution.age) for contribution in contributions], np.float64)
    return outliers(statistics, names, discounts)
