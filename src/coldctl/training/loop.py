"""The training loop for finetuning, few-shot and multitask.

AdamW, linear decay, length-aware batches, early stopping, the best weights kept. Everything that is drawn depends
on (seed, step) and the process's rank alone, so a training that goes on from its last checkpoint ends with the bits
of one that was never stopped (on the CPU; elsewhere as far as the device's kernels are deterministic).
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coldctl.common.digests import derived_seed
from coldctl.common.errors import CheckpointError, DeclinedError
from coldctl.common.progress import Progress
from coldctl.config.settings import FinetuneConfig
from coldctl.training import snapshot
from coldctl.training.batches import Examples, collate, sorted_batches, task_batches
from coldctl.training.cpu_shortcuts import Masks, UsedRows, fast_dropout, first_token_only
from coldctl.training.distributed import Team
from coldctl.training.logs import Log
from coldctl.training.losses import MULTI_LABEL, SINGLE_LABEL, Targets, class_weights, example_losses, problem_of
from coldctl.training.model import Encoded, body_of, check_vocabulary, has_bfloat16

_STATE = "state.safetensors"
_SAVING_SHARE = 20  # seconds of training per second of saving, at least
_PREDICTED = 32  # examples per batch of a pass without training

_Inputs = Callable[[NDArray[np.int64]], dict[str, torch.Tensor]]  # rows of a batch -> what the model takes


@dataclass(frozen=True)
class Task:
    """One dataset to learn: its model (all tasks share one body), its examples, and its measure.

    `measure` turns validation predictions, as `predict` returns them, into a score; higher is better.
    """

    model: nn.Module
    training: Examples
    validation: Examples
    measure: Callable[[NDArray[Any]], float]


@dataclass(frozen=True)
class TrainingContext:
    """Device, folder, processes and listeners of a training. They change no result, beyond rounding."""

    device: torch.device
    padding: int  # token id of padding
    folder: Path  # of checkpoints and the best weights; the caller keeps it until the training is finished
    progress: Progress
    name: str  # of the progress bar
    team: Team = field(default_factory=Team)
    log: Log | None = None
    checkpoint_seconds: float = 60.0
    shortcuts: bool = True  # on CPUs: skip work that changes nothing (`training/cpu_shortcuts.py`)


@dataclass(frozen=True)
class Trained:
    """Summary of a finished training. The models hold the best weights."""

    best_score: float
    steps: int
    stopped: str  # the reason, for people
    seconds: float  # of training steps in this process, without validations
    examples: int  # of those steps
    tokens: int
    curve: tuple[tuple[int, float, float], ...]  # (step, mean training loss since the last, validation score)


def train(tasks: Sequence[Task], config: FinetuneConfig, context: TrainingContext, *, seed: int) -> Trained:
    """Train the tasks' models in place. Each batch is of one task, in an order drawn by `seed`.

    Validates every `config.validate_every` batches and at each epoch's end (the mean over the tasks), stops after
    `config.patience` validations in a row without an improvement of more than `config.epsilon` × 100 points, and
    leaves the best weights in the models. A training that was interrupted in `context.folder` resumes.

    Raises ModelError for tokens that a model does not have, and DeclinedError if the loss is not finite or the memory
    does not suffice.
    """
    models = [task.model for task in tasks]
    assert all(body_of(model) is body_of(models[0]) for model in models)
    for task in tasks:
        check_vocabulary(task.training.encoded, task.model)
        check_vocabulary(task.validation.encoded, task.model)
        task.model.to(context.device).train()
    with ExitStack() as stack:
        masks, rows = None, None
        if config.compile:
            for model in models:
                model.compile(dynamic=True)
        elif context.shortcuts and context.device.type == "cpu":
            masks = stack.enter_context(fast_dropout(models))
            stack.enter_context(first_token_only(models))
            if not config.anchor:
                tokens = [examples.encoded.tokens for task in tasks for examples in (task.training, task.validation)]
                rows = UsedRows(models[0], tokens, context.padding)
                stack.callback(rows.restore)
        training = _Training(tasks, config, context, seed, masks, rows)
        try:
            training.resume()
            training.run()
        except torch.OutOfMemoryError:
            raise DeclinedError(
                f"{context.name}: out of memory beside the batch: train less with --lora-rank or --freeze-layers"
            ) from None
        training.take_best()
    for model in models:
        model.eval()
    return training.result()


class _Training:
    """State of one training, which checkpoints store, and the steps that change it."""

    def __init__(
        self, tasks: Sequence[Task], config: FinetuneConfig, context: TrainingContext, seed: int, masks: Masks | None,
        rows: UsedRows | None,
    ) -> None:  # fmt: skip
        self.tasks, self.config, self.context, self.seed = tasks, config, context, seed
        self.masks, self.rows = masks, rows
        together = nn.ModuleList([task.model for task in tasks])
        self.parameters = {name: value for name, value in together.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.parameters.values(), config.weight_decay), fused=True)
        body = [value for value in body_of(tasks[0].model).parameters() if value.requires_grad and config.anchor]
        self.anchors = [(value, value.detach().clone()) for value in body]
        balanced = config.class_weights != "none"
        self.class_weights = [
            class_weights(task.model, task.training.labels).to(context.device) if balanced else torch.zeros(0)
            for task in tasks
        ]
        self.per_epoch = sum(math.ceil(len(task.training) / config.batch_size) for task in tasks)
        self.total = self.per_epoch * config.epochs
        self.micro = config.micro_batch or config.batch_size
        self.targets = [Targets(task.model, task.training.labels) for task in tasks]
        self.step, self.since_best, self.decay, self.best_decay = 0, 0, 1.0, 1.0
        self.saved_best = 0  # the step of the best weights that the last checkpoint names
        self.best, self.best_step = -math.inf, 0
        self.stopped = "all epochs done"
        self.curve: list[tuple[int, float, float]] = []
        self.losses: list[torch.Tensor] = []
        self.seconds, self.seen, self.tokens = 0.0, 0, 0
        bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and has_bfloat16(context.device))
        self.autocast = torch.autocast(context.device.type, torch.bfloat16, enabled=bfloat16)

    def run(self) -> None:
        """Train from the current step until all epochs are done or validation stops improving."""
        context = self.context
        examples = self.config.epochs * sum(len(task.training) for task in self.tasks)
        context.progress.begin(context.name, examples, "examples")
        context.progress.advance(context.name, examples * self.step // self.total)
        if context.log is not None:
            context.log.begin(self.step)
        lengths = [task.training.encoded.lengths for task in self.tasks]
        started = saved = time.monotonic()
        saving = 0.0
        while self.step < self.total and self.since_best < self.config.patience:
            epoch, done = divmod(self.step, self.per_epoch)
            batches = task_batches(lengths, self.config.batch_size, self.seed, epoch)
            for index, (number, batch) in enumerate(batches):
                if index < done:  # in the checkpoint that this training resumes from
                    continue
                self._advance(number, batch)
                if self.step % self.config.validate_every == 0 or self.step % self.per_epoch == 0:
                    self._validate()
                    if self.since_best >= self.config.patience:
                        self.stopped = f"no improvement in {self.config.patience} validations"
                        break
                now = time.monotonic()
                # Checkpoints come sooner at the beginning, so that at most about half of a short training is lost.
                wait = min(context.checkpoint_seconds, max(1.0, saved - started))
                if context.checkpoint_seconds < math.inf and now - saved >= max(wait, _SAVING_SHARE * saving):
                    self._save()
                    saved = time.monotonic()
                    saving = saved - now
        context.progress.end(context.name)

    def _advance(self, number: int, batch: NDArray[np.int64]) -> None:
        """Take one optimizer step on a batch of task `number`."""
        config, context = self.config, self.context
        started = time.perf_counter()
        loss, tokens = self._gradients(number, batch)
        loss = context.team.sum_gradients(self.parameters.values(), loss)
        for parameter, start in self.anchors:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=config.anchor)
        nn.utils.clip_grad_norm_(self.parameters.values(), config.max_gradient_norm)
        rate = config.learning_rate * _schedule(self.step, round(config.warmup * self.total), self.total)
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
            if context.log is not None:
                context.log.add(self.step, {"loss": value, "learning_rate": rate, **speed})
        context.progress.advance(context.name, len(batch), detail)

    def _gradients(self, number: int, batch: NDArray[np.int64]) -> tuple[torch.Tensor, int]:
        """Compute the gradients of this process's share of a batch; halve the micro-batches when memory is short."""
        while True:
            try:
                return self._accumulate(number, batch)
            except torch.OutOfMemoryError:
                if self.micro == 1:
                    raise DeclinedError(
                        f"{self.context.name}: out of memory with one example at a time: lower --max-length"
                    ) from None
                self.micro = max(1, min(self.micro, math.ceil(len(batch) / self.context.team.size)) // 2)
                self.optimizer.zero_grad(set_to_none=True)
                if self.context.device.type == "cuda":  # pragma: no cover  (needs a GPU)
                    torch.cuda.empty_cache()
                self.context.progress.note(
                    f"{self.context.name}: out of memory, going on with {self.micro} examples at a time"
                )

    def _accumulate(self, number: int, batch: NDArray[np.int64]) -> tuple[torch.Tensor, int]:
        """Add up the gradients of this process's share in micro-batches; return its loss and number of tokens."""
        task, team, config = self.tasks[number], self.context.team, self.config
        torch.manual_seed(derived_seed(self.seed, "step", self.step, team.rank))
        if self.masks is not None:
            self.masks.seed(self.seed, self.step, team.rank)
        weights = self.class_weights[number]
        labels = self.targets[number].of(batch)
        total = float(weights[labels].sum()) if len(weights) else float(len(batch))
        share = batch[team.rank :: team.size]
        if not len(share):  # a last batch smaller than the team: join the all-reduce with gradients of zero
            share, total = batch[:1], math.inf
        loss, tokens = torch.zeros((), device=self.context.device), 0
        for start in range(0, len(share), self.micro):
            micro_batch = share[start : start + self.micro]
            inputs = self._inputs(task.training.encoded, micro_batch)
            with self.autocast:
                logits = task.model(**inputs).logits
            targets = self.targets[number].of(micro_batch).to(self.context.device)
            losses = example_losses(task.model, logits.float(), targets, weights, config.label_smoothing)
            micro_loss = losses.sum() / total
            micro_loss.backward()  # type: ignore[no-untyped-call]
            loss, tokens = loss + micro_loss.detach(), tokens + inputs["input_ids"].numel()
        return loss, tokens

    def _inputs(self, encoded: Encoded, batch: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for a batch; token ids are rows of the embedding in use."""
        inputs = collate(encoded, batch, self.context.padding, self.context.device)
        if self.rows is not None:
            inputs["input_ids"] = self.rows.renumbered(inputs["input_ids"])
        return inputs

    def _validate(self) -> None:
        """Score the validation splits; keep the weights if they are the best so far."""
        config, context = self.config, self.context
        loss = self._finite(torch.stack(self.losses).cpu().double().mean())  # MPS has no float64
        self.losses.clear()
        scores = []
        for task in self.tasks:
            encoded = task.validation.encoded
            scores.append(task.measure(_predict(task.model, encoded, context, partial(self._inputs, encoded))))
        score = float(np.mean(scores))
        self.curve.append((self.step, loss, score))
        context.progress.advance(context.name, 0, f"loss {loss:.3f}, validation {score:.1f}")
        if context.log is not None:
            context.log.add(self.step, {"mean_loss": loss, "validation": score})
        improved = score > self.best + 100 * config.epsilon
        self.since_best = 0 if improved else self.since_best + 1
        if score > self.best:
            self.best, self.best_step, self.best_decay = score, self.step, self.decay
            if context.team.is_main:
                best = {name: value.detach() for name, value in self.parameters.items()}
                snapshot.write(self._best_file(self.step), best, {})
                self._prune()

    def _finite(self, loss: torch.Tensor) -> float:
        """Return the loss as a number. Raises DeclinedError if it is not finite."""
        value = loss.item()
        if not math.isfinite(value):
            raise DeclinedError(
                f"{self.context.name}: the training diverged (its loss is not finite): lower --learning-rate"
            )
        return value

    def take_best(self) -> None:
        """Put the weights with the best validation score back into the models."""
        if self.best_step and self.best_step != self.step and self.context.team.is_main:
            _copy_into(self.parameters, snapshot.read(self._best_file(self.best_step))[0])
        self.context.team.broadcast_tensors([value.detach() for value in self.parameters.values()])
        if self.rows is not None:
            self.rows.decay = self.best_decay
        for targets in self.targets:
            targets.unscale_model()

    def _best_file(self, step: int) -> Path:
        return self.context.folder / f"best-{step:08d}.safetensors"

    def _save(self) -> None:
        """Write a checkpoint that a later process can resume from."""
        if not self.context.team.is_main:
            return
        self._finite(self.losses[-1] if self.losses else torch.zeros(()))
        snapshot.write(self.context.folder / _STATE, self._state_tensors(), self._progress())
        self.saved_best = self.best_step
        self._prune()

    def _prune(self) -> None:
        """Delete old weights, but neither the best ones nor those that the last checkpoint names as the best."""
        kept = {self._best_file(self.best_step), self._best_file(self.saved_best)}
        for path in self.context.folder.glob("best-*.safetensors"):
            if path not in kept:
                path.unlink()

    def _progress(self) -> dict[str, Any]:
        """Return the part of a checkpoint that is not tensors, as JSON can store it."""
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
        """Restore the last checkpoint if there is one that belongs to these models."""
        context = self.context
        checkpoint = self._read() if context.team.is_main else None
        state = context.team.broadcast(checkpoint[1] if checkpoint else None)
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
        if checkpoint is not None:
            _copy_into(tensors, checkpoint[0])
        context.team.broadcast_tensors(tensors.values())
        self.step, self.since_best, self.micro = state["step"], state["since_best"], state["micro"]
        self.best, self.best_step, self.saved_best = state["best"], state["best_step"], state["best_step"]
        self.decay, self.best_decay = state["decay"], state["best_decay"]
        self.curve = [(step, loss, score) for step, loss, score in state["curve"]]
        self.losses = [torch.tensor(value, device=context.device) for value in state["losses"]]
        context.progress.note(f"{context.name}: going on from step {self.step} of {self.total}")

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the parameters and AdamW's moments by name, as tensors that share their memory."""
        tensors = {f"parameter.{name}": value.detach() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            if value in self.optimizer.state:
                tensors |= {f"{key}.{name}": self.optimizer.state[value][key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors

    def _read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return tensors and state of the last checkpoint, or None if it is missing, damaged, or of other models."""
        try:
            tensors, state = snapshot.read(self.context.folder / _STATE)
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
        """Return the summary of this training."""
        return Trained(self.best, self.step, self.stopped, self.seconds, self.seen, self.tokens, tuple(self.curve))


def predict(model: nn.Module, encoded: Encoded, context: TrainingContext) -> NDArray[Any]:
    """Return class indices int64 [n], numbers float64 [n], or 0 and 1 for each class uint8 [n, classes]."""
    with first_token_only([model]) if context.device.type == "cpu" and context.shortcuts else nullcontext():
        return _predict(model, encoded, context, lambda batch: collate(encoded, batch, context.padding, context.device))


def _predict(model: nn.Module, encoded: Encoded, context: TrainingContext, inputs: _Inputs) -> NDArray[Any]:
    """Return predictions as `predict` does, computed by all processes of the team; leave the model's mode as it was."""
    training = model.training
    model.eval()
    problem = problem_of(model)
    outputs = int(model.config.num_labels) if problem == MULTI_LABEL else 1  # type: ignore[union-attr, arg-type]
    result = np.zeros((len(encoded), outputs))
    queue = list(sorted_batches(encoded.lengths, _PREDICTED))[context.team.rank :: context.team.size][::-1]
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
    result = context.team.all_reduce(result, context.device)
    if problem == MULTI_LABEL:
        return result.astype(np.uint8)
    return result[:, 0].astype(np.int64) if problem == SINGLE_LABEL else result[:, 0]


def _parameter_groups(parameters: Collection[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups of AdamW: weight decay for matrices, none for biases and norms."""
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _schedule(step: int, warmup: int, total: int) -> float:
    """Return the factor of the learning rate at `step`: linear warmup, then linear decay to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def _copy_into(targets: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
    """Overwrite the target tensors with the sources of the same names."""
    with torch.no_grad():
        for name, value in targets.items():
            value.copy_(sources[name])
