"""The training loop, for finetuning, few-shot and multitask alike.

AdamW, linear decay, length-aware batches, early stopping, the best weights kept. Everything that is drawn depends
on (seed, step) and the process's rank alone, so a training that goes on from its last checkpoint ends with the bits
of one that was never stopped (on the CPU; elsewhere as far as the device's kernels are deterministic).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coldctl.common.errors import CheckpointError, DeclinedError
from coldctl.common.progress import Progress
from coldctl.core.config import FinetuneConfig, derived_seed
from coldctl.training import snapshot
from coldctl.training.batches import Examples, collate, length_batches, sorted_batches
from coldctl.training.cpu_shortcuts import Masks, UsedRows, fast_dropout, first_token_only
from coldctl.training.distributed import Team
from coldctl.training.logs import Log
from coldctl.training.losses import MULTI_LABEL, SINGLE_LABEL, Targets, class_weights, example_losses, problem_of
from coldctl.training.model import Encoded, body_of, check_vocabulary

_STATE = "state.safetensors"
_SAVING_SHARE = 20  # seconds of training per second of saving, at least


@dataclass(frozen=True)
class Head:
    """One dataset's part in a training: its model (all share one body), its examples, its measure.

    `measure` turns validation predictions into a score, higher is better.
    """

    model: nn.Module
    training: Examples
    validation: Examples
    measure: Callable[[NDArray[Any]], float]


@dataclass(frozen=True)
class Place:
    """Where a training runs and whom it tells. Nothing here changes what is learned, beyond rounding."""

    device: torch.device
    padding: int  # token id that fills batches
    folder: Path  # for checkpoints and the best weights; kept by the caller for as long as it may resume
    progress: Progress
    name: str  # of the progress bar
    team: Team = field(default_factory=Team)
    log: Log | None = None
    checkpoint_seconds: float = 60.0
    shortcuts: bool = True  # on CPUs: skip work that changes nothing (`training/cpu_shortcuts.py`)


@dataclass(frozen=True)
class Trained:
    """How a training went. The models hold the best weights."""

    best_score: float
    steps: int
    stopped: str  # what ended it, in words
    seconds: float  # of training steps in this process, without validations
    examples: int  # of those steps
    tokens: int
    curve: tuple[tuple[int, float, float], ...]  # (step, mean training loss since the last, validation score)


def train(heads: Sequence[Head], config: FinetuneConfig, place: Place, *, seed: int) -> Trained:
    """Train the heads' models in place, each batch from one dataset, in an order drawn by `seed`.

    Validates every `config.validate_every` batches and at each epoch's end (the mean over the heads), stops when
    `config.patience` validations in a row bring no improvement of more than `config.epsilon` × 100 points, and
    leaves the best weights in the models. Raises DeclinedError if the loss is not finite.
    """
    models = [head.model for head in heads]
    assert all(body_of(model) is body_of(models[0]) for model in models)
    for head in heads:
        check_vocabulary(head.training.encoded, head.model)
        check_vocabulary(head.validation.encoded, head.model)
        head.model.to(place.device).train()
    with ExitStack() as stack:
        masks, rows = None, None
        if config.compile:
            for model in models:
                model.compile(dynamic=True)
        elif place.shortcuts and place.device.type == "cpu":
            masks = stack.enter_context(fast_dropout(models))
            stack.enter_context(first_token_only(models))
            if not config.anchor:
                seen = [part.encoded.tokens for head in heads for part in (head.training, head.validation)]
                rows = UsedRows(models[0], seen, place.padding)
                stack.callback(rows.restore)
        training = _Training(heads, config, place, seed, masks, rows)
        try:
            training.resume()
            training.run()
        except torch.OutOfMemoryError:
            raise DeclinedError(
                f"{place.name}: out of memory beside the batch: train less with --lora-rank or --freeze-layers"
            ) from None
        training.take_best()
    for model in models:
        model.eval()
    return training.result()


class _Training:
    """The state of one training: what a checkpoint must hold, and the steps that change it."""

    def __init__(
        self,
        heads: Sequence[Head],
        config: FinetuneConfig,
        place: Place,
        seed: int,
        masks: Masks | None,
        rows: UsedRows | None,
    ) -> None:
        self.heads, self.config, self.place, self.seed, self.masks, self.rows = heads, config, place, seed, masks, rows
        inside = nn.ModuleList([head.model for head in heads])
        self.parameters = {name: value for name, value in inside.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.parameters.values(), config.weight_decay), fused=True)
        self.anchors = _anchors(heads[0].model) if config.anchor else []
        balanced = config.class_weights != "none"
        self.class_weights = [
            class_weights(head.model, head.training.labels).to(place.device) if balanced else torch.zeros(0)
            for head in heads
        ]
        self.per_epoch = sum(math.ceil(len(head.training) / config.batch_size) for head in heads)
        self.total = self.per_epoch * config.epochs
        self.micro = config.micro_batch or config.batch_size
        self.targets = [Targets(head.model, head.training.labels) for head in heads]
        self.step, self.since_best, self.decay, self.best_decay = 0, 0, 1.0, 1.0
        self.saved_best = 0  # the step of the best weights that the last checkpoint names
        self.best, self.best_step = -math.inf, 0
        self.stopped = "all epochs done"
        self.curve: list[tuple[int, float, float]] = []
        self.losses: list[torch.Tensor] = []
        self.seconds, self.seen, self.tokens = 0.0, 0, 0
        bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and _has_bfloat16(place.device))
        self.autocast = torch.autocast(place.device.type, torch.bfloat16, enabled=bfloat16)

    # Steps --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        place = self.place
        examples = self.config.epochs * sum(len(head.training) for head in self.heads)
        place.progress.begin(place.name, examples, "examples")
        place.progress.advance(place.name, examples * self.step // self.total)
        if place.log is not None:
            place.log.begin(self.step)
        begun = saved = time.monotonic()
        saving = 0.0
        while self.step < self.total and self.since_best < self.config.patience:
            epoch, done = divmod(self.step, self.per_epoch)
            for number, (head, batch) in enumerate(self._batches(epoch)):
                if number < done:
                    continue  # before the checkpoint that this training goes on from
                self._advance(head, batch)
                if self.step % self.config.validate_every == 0 or self.step % self.per_epoch == 0:
                    self._validate()
                    if self.since_best >= self.config.patience:
                        self.stopped = f"no improvement in {self.config.patience} validations"
                        break
                now = time.monotonic()
                # Sooner at the beginning, so that at most about half of a young training is lost.
                wait = min(place.checkpoint_seconds, max(1.0, saved - begun))
                if self.place.checkpoint_seconds < math.inf and now - saved >= max(wait, _SAVING_SHARE * saving):
                    self._save()
                    saved = time.monotonic()
                    saving = saved - now
        place.progress.end(place.name)

    def _batches(self, epoch: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """One epoch's batches, each with the number of its head; several heads are interleaved by seed."""
        config = self.config
        if len(self.heads) == 1:
            for batch in length_batches(self.heads[0].training.encoded.lengths, config.batch_size, self.seed, epoch):
                yield 0, batch
            return
        queues = [
            length_batches(head.training.encoded.lengths, config.batch_size, derived_seed(self.seed, number), epoch)
            for number, head in enumerate(self.heads)
        ]
        counts = [math.ceil(len(head.training) / config.batch_size) for head in self.heads]
        order = np.repeat(np.arange(len(counts)), counts)
        for number in np.random.default_rng([self.seed, epoch]).permutation(order).tolist():
            yield number, next(queues[number])

    def _advance(self, number: int, batch: NDArray[np.int64]) -> None:
        """One optimiser step on one batch."""
        config, place = self.config, self.place
        started = time.perf_counter()
        loss, tokens = self._gradients(number, batch)
        loss = place.team.sum_gradients(self.parameters.values(), loss)
        for parameter, start in self.anchors:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=config.anchor)
        nn.utils.clip_grad_norm_(self.parameters.values(), config.max_gradient_norm)
        rate = config.learning_rate * _linear(self.step, round(config.warmup * self.total), self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.decay *= 1 - rate * config.weight_decay
        self.losses.append(loss)
        self.step += 1
        self.seen, self.tokens = self.seen + len(batch), self.tokens + tokens
        self.seconds += time.perf_counter() - started
        detail = ""
        if self.step % 5 == 0 or self.step == 1:
            value, per_second = self._finite(loss), 1 / max(self.seconds, 1e-9)
            best = f", best validation {self.best:.1f}" if self.curve else ""
            speed = {"examples_per_second": self.seen * per_second, "tokens_per_second": self.tokens * per_second}
            detail = f"loss {value:.3f}{best}, {speed['examples_per_second']:.0f} examples/s, "
            detail += f"{speed['tokens_per_second']:.0f} tokens/s"
            if place.log is not None:
                place.log.add(self.step, {"loss": value, "learning_rate": rate, **speed})
        place.progress.advance(place.name, len(batch), detail)

    def _gradients(self, number: int, batch: NDArray[np.int64]) -> tuple[torch.Tensor, int]:
        """Gradients of this process's share of a batch, in micro-batches; fewer examples at once if memory ends."""
        while True:
            try:
                return self._accumulate(number, batch)
            except torch.OutOfMemoryError:
                if self.micro == 1:
                    raise DeclinedError(
                        f"{self.place.name}: out of memory with one example at a time: lower --max-length"
                    ) from None
                self.micro = max(1, min(self.micro, math.ceil(len(batch) / self.place.team.size)) // 2)
                self.optimizer.zero_grad(set_to_none=True)
                if self.place.device.type == "cuda":  # pragma: no cover  (needs a GPU)
                    torch.cuda.empty_cache()
                self.place.progress.note(
                    f"{self.place.name}: out of memory, going on with {self.micro} examples at a time"
                )

    def _accumulate(self, number: int, batch: NDArray[np.int64]) -> tuple[torch.Tensor, int]:
        head, team, config = self.heads[number], self.place.team, self.config
        torch.manual_seed(derived_seed(self.seed, "step", self.step, team.rank))
        if self.masks is not None:
            self.masks.seed(self.seed, self.step, team.rank)
        weights = self.class_weights[number]
        labels = self.targets[number].of(batch)
        total = float(weights[labels].sum()) if len(weights) else float(len(batch))
        mine = batch[team.rank :: team.size]
        if not len(mine):  # a last batch smaller than the team: take part with nothing
            mine, total = batch[:1], math.inf
        loss, tokens = torch.zeros((), device=self.place.device), 0
        for start in range(0, len(mine), self.micro):
            part = mine[start : start + self.micro]
            inputs = self._inputs(head.training.encoded, part)
            with self.autocast:
                logits = head.model(**inputs).logits
            targets = self.targets[number].of(part).to(self.place.device)
            losses = example_losses(head.model, logits.float(), targets, weights, config.label_smoothing)
            piece = losses.sum() / total
            piece.backward()  # type: ignore[no-untyped-call]
            loss, tokens = loss + piece.detach(), tokens + inputs["input_ids"].numel()
        return loss, tokens

    def _inputs(self, encoded: Encoded, batch: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        inputs = collate(encoded, batch, self.place.padding, self.place.device)
        if self.rows is not None:
            inputs["input_ids"] = self.rows.renumbered(inputs["input_ids"])
        return inputs

    # Validation ---------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        config, place = self.config, self.place
        loss = self._finite(torch.stack(self.losses).cpu().double().mean())  # MPS has no float64
        self.losses.clear()
        scores = []
        for head in self.heads:
            encoded = head.validation.encoded
            scores.append(head.measure(_predict(head.model, encoded, place, partial(self._inputs, encoded))))
        score = float(np.mean(scores))
        self.curve.append((self.step, loss, score))
        place.progress.advance(place.name, 0, f"loss {loss:.3f}, validation {score:.1f}")
        if place.log is not None:
            place.log.add(self.step, {"mean_loss": loss, "validation": score})
        improved = score > self.best + 100 * config.epsilon
        self.since_best = 0 if improved else self.since_best + 1
        if score > self.best:
            self.best, self.best_step, self.best_decay = score, self.step, self.decay
            if place.team.leads:
                best = {name: value.detach() for name, value in self.parameters.items()}
                snapshot.write(self._best_file(self.step), best, {})
                self._prune()

    def _finite(self, loss: torch.Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise DeclinedError(
                f"{self.place.name}: the training diverged (its loss is not finite): lower --learning-rate"
            )
        return value

    def take_best(self) -> None:
        """Put the weights with the best validation score back into the models."""
        if self.best_step and self.best_step != self.step and self.place.team.leads:
            _copy_into(self.parameters, snapshot.read(self._best_file(self.best_step))[0])
        self.place.team.share([value.detach() for value in self.parameters.values()])
        if self.rows is not None:
            self.rows.decay = self.best_decay
        for targets in self.targets:
            targets.unscale_model()

    def _best_file(self, step: int) -> Path:
        return self.place.folder / f"best-{step:08d}.safetensors"

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write all that a later process needs to go on from here."""
        if not self.place.team.leads:
            return
        self._finite(self.losses[-1] if self.losses else torch.zeros(()))
        tensors = {f"parameter.{name}": value.detach() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if value in self.optimizer.state:
                    tensors[f"{key}.{name}"] = self.optimizer.state[value][key]
        snapshot.write(self.place.folder / _STATE, tensors, self._progress())
        self.saved_best = self.best_step
        self._prune()

    def _prune(self) -> None:
        """Keep the best weights, and those that the last checkpoint calls the best."""
        wanted = {self._best_file(self.best_step), self._best_file(self.saved_best)}
        for path in self.place.folder.glob("best-*.safetensors"):
            if path not in wanted:
                path.unlink()

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step, "since_best": self.since_best, "best": self.best, "best_step": self.best_step,
            "decay": self.decay, "best_decay": self.best_decay, "micro": self.micro, "curve": self.curve,
            "losses": [float(loss) for loss in self.losses],
            "steps": {
                name: float(self.optimizer.state[value]["step"])
                for name, value in self.parameters.items() if value in self.optimizer.state
            },
        }  # fmt: skip

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one that fits; what does not fit is not used."""
        place = self.place
        found = self._read() if place.team.leads else None
        state = place.team.agreed(found[1] if found else None)
        if state is None:
            return
        for name, value in self.parameters.items():
            if name in state["steps"]:
                self.optimizer.state[value] = {
                    "step": torch.tensor(state["steps"][name], device=value.device),
                    "exp_avg": torch.zeros_like(value),
                    "exp_avg_sq": torch.zeros_like(value),
                }
        tensors = self._state_tensors()
        if found is not None:
            _copy_into(tensors, found[0])
        place.team.share([value.detach() for value in tensors.values()])
        self.step, self.since_best, self.micro = state["step"], state["since_best"], state["micro"]
        self.best, self.best_step, self.saved_best = state["best"], state["best_step"], state["best_step"]
        self.decay, self.best_decay = state["decay"], state["best_decay"]
        self.curve = [(step, loss, score) for step, loss, score in state["curve"]]
        self.losses = [torch.tensor(value, device=place.device) for value in state["losses"]]
        place.progress.note(f"{place.name}: going on from step {self.step} of {self.total}")

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {f"parameter.{name}": value for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            if value in self.optimizer.state:
                tensors |= {f"{key}.{name}": self.optimizer.state[value][key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors

    def _read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The last checkpoint; None if there is none, or not all of it is as it was written: the training starts anew."""
        try:
            tensors, state = snapshot.read(self.place.folder / _STATE)
            if any(
                name not in tensors or tensors[name].shape != value.shape
                for name, value in ((f"parameter.{name}", value) for name, value in self.parameters.items())
            ):
                return None
            if state["best_step"]:
                snapshot.read(self._best_file(state["best_step"]))
        except CheckpointError:
            return None
        return tensors, state

    def result(self) -> Trained:
        return Trained(self.best, self.step, self.stopped, self.seconds, self.seen, self.tokens, tuple(self.curve))


def predict(model: nn.Module, encoded: Encoded, place: Place) -> NDArray[Any]:
    """Class indices int64 [n], numbers float64 [n], or 0 and 1 for each class uint8 [n, classes]."""
    with first_token_only([model]) if place.device.type == "cpu" and place.shortcuts else nullcontext():
        return _predict(model, encoded, place, lambda batch: collate(encoded, batch, place.padding, place.device))


def _predict(
    model: nn.Module,
    encoded: Encoded,
    place: Place,
    inputs: Callable[[NDArray[np.int64]], dict[str, torch.Tensor]],
    batch_size: int = 32,
) -> NDArray[Any]:
    """Predictions, shared out over the team; leaves the model's mode as it was."""
    training = model.training
    model.eval()
    problem = problem_of(model)
    outputs = int(model.config.num_labels) if problem == MULTI_LABEL else 1  # type: ignore[union-attr, arg-type]
    result = np.zeros((len(encoded), outputs))
    queue = list(sorted_batches(encoded.lengths, batch_size))[place.team.rank :: place.team.size][::-1]
    with torch.inference_mode():
        while queue:
            batch = queue.pop()
            try:
                logits = model(**inputs(batch)).logits.float()
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                queue += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
                continue
            if problem == SINGLE_LABEL:
                logits = logits.argmax(-1, keepdim=True)
            elif problem == MULTI_LABEL:
                logits = logits > 0
            result[batch] = logits.cpu().numpy()
    model.train(training)
    result = place.team.summed(result, place.device)
    if problem == MULTI_LABEL:
        return result.astype(np.uint8)
    return result[:, 0].astype(np.int64) if problem == SINGLE_LABEL else result[:, 0]


def _anchors(model: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The body's trainable parameters, each with a copy of where it starts."""
    return [(value, value.detach().clone()) for value in body_of(model).parameters() if value.requires_grad]


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself. No CPU is asked: without its own units it is ten times slower."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _parameter_groups(parameters: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for biases and norms."""
    every = list(parameters)
    decayed = [parameter for parameter in every if parameter.ndim > 1]
    others = [parameter for parameter in every if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _linear(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def _copy_into(targets: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in targets.items():
            value.copy_(sources[name])
