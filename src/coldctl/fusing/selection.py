"""Select: which contributions are fused, as more becomes known of them while they are read."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from coldctl.common.errors import CheckpointError, DeclinedError
from coldctl.config.settings import FuseConfig
from coldctl.fusing.compatibility import other_base
from coldctl.fusing.contributions import Contribution
from coldctl.fusing.passes import Verification
from coldctl.fusing.statistics import UpdateStatistics, names_of


@dataclass(frozen=True)
class Selection:
    """All contributions that were offered, with what is known of them at one step of a fuse."""

    contributions: Sequence[Contribution]
    statistics: UpdateStatistics | None = None  # of the accepted ones, once their updates are measured
    base_digest: str | None = None  # once the base and the accepted ones are verified

    @property
    def accepted(self) -> list[Contribution]:
        """Return the contributions that are not rejected."""
        return [contribution for contribution in self.contributions if not contribution.rejections]

    @property
    def dropped_attackers(self) -> int:
        """Return how many of the attackers that multi-krum expects were dropped by screening."""
        return sum(contribution.attacking and not contribution.late for contribution in self.contributions)

    def updated(self, changed: Iterable[Contribution]) -> "Selection":
        """Return a selection in which these contributions replace those of the same names."""
        by_name = {contribution.name: contribution for contribution in changed}
        return replace(self, contributions=[by_name.get(one.name, one) for one in self.contributions])

    def verified(
        self, read: Sequence[Contribution], verification: Verification, config: FuseConfig, base: str
    ) -> "Selection":
        """Return a selection with what a pass found out of the contributions that it read, in its order.

        Raises CheckpointError for an unsound base; `base` is its label.
        """
        if tensors := names_of(verification.findings, -1):
            raise CheckpointError(f"{base}: {tensors[0]} holds a not-a-number or infinity: take a sound base model")
        if verification.base_mismatches:
            raise CheckpointError(f"{base}: {verification.base_mismatches[0]}: make or fetch the base model again")
        return self.updated(_verified(one, index, verification, config) for index, one in enumerate(read))

    def require_enough(self, config: FuseConfig, written: Collection[str] = ()) -> list[Contribution]:
        """Return the accepted contributions. None of those that were `written`, by name, can be dropped any more.

        Raises DeclinedError if --strict forbids to drop the others, CheckpointError if screening does not drop them or
        too few would be left.
        """
        good = self.accepted
        bad = [contribution for contribution in self.contributions if contribution.rejections]
        late = [one for one in bad if one.late and one.name not in written]  # they are only left out
        stopping = [one for one in bad if not one.late or one.name in written]
        if good and not stopping and not (late and config.strict):
            return good
        details = [f"{one.place}: {rejection}" for one in (*stopping, *late) for rejection in one.rejections]
        total = len(self.contributions)
        if config.strict:
            raise DeclinedError(
                f"{len(bad)} of {total} contributions would be dropped, and --strict forbids that", details
            )
        if config.screen != "reject":
            remedy = "mend or remove them, or drop them with --screen reject"
            raise CheckpointError(f"{len(bad)} of {total} contributions cannot be fused: {remedy}", details)
        total -= len(late)
        least = config.min_contributions or total // 2 + 1
        if len(good) < least:
            remedy = "mend the others, or lower --min-contributions"
            raise CheckpointError(
                f"only {len(good)} of {total} contributions can be fused, {least} are needed: {remedy}", details
            )
        return good


def _verified(contribution: Contribution, index: int, verification: Verification, config: FuseConfig) -> Contribution:
    """Return a contribution with its digest, and rejected where it is not what its manifest says or not finite."""
    checkpoint = contribution.checkpoint
    assert checkpoint is not None
    rejections = []
    base_digest = None if contribution.age or config.allow_other_base else verification.base_digest
    if finding := other_base(checkpoint, base_digest):  # so far the base was only presumed
        rejections.append(f"{finding}: give that base as --base")
        if checkpoint.relative:
            return contribution.judged(rejections)  # decoded from another base, its values mean nothing
    rejections += verification.mismatches[index]
    sound = config.verify and checkpoint.manifest is not None and not rejections
    if tensors := names_of(verification.findings, index):
        more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
        rejections.append(f"{tensors[0]}{more} holds a not-a-number or infinity")
    digest = verification.digests[index] or None
    return replace(contribution, digest=digest, verified=sound, attacking=bool(tensors)).judged(rejections)
