"""The training loop: AdamW, linear decay, length-aware batches, early stopping, the best weights kept."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from coldctl.core.config import FinetuneConfig
from coldctl.core.errors import DeclinedError
from coldctl.core.model import Encoded, collate
from coldctl.core.progress import Progress

_WINDOW = 50  # batches among which examples are grouped by length


@dataclass(frozen=True)
class Examples:
    """Tokenised examples with their labels: class indices, or numbers for regression."""

    encoded: Encoded
    labels: Sequence[int] | Sequence[float]

    def __len__(self) -> int:
        return len(self.encoded)


@dataclass(frozen=True)
class Trained:
    """How a training went. The model holds the best weights."""

    best_score: float
    steps: int
    stopped: str  # what ended it, in words
    seconds: float  # of training steps alone, without validations
    examples: int
    curve: tuple[tuple[int, float, float], ...]  # (step, mean training loss since the last, validation score)


def train(
    model: nn.Module,
    training: Examples,
    validation: Examples,
    measure: Callable[[np.ndarray[Any, Any]], float],
    config: FinetuneConfig,
    *,
    seed: int,
    padding: int,
    device: torch.device,
    progress: Progress,
    task: str,
) -> Trained:
    """Train `model` in place on `training`; `measure` turns validation predictions into a score (higher is better).

    Validates every `config.validate_every` batches and at each epoch's end, stops when `config.patience`
    validations in a row bring no improvement of more than `config.epsilon` × 100 points, and leaves the best
    weights in the model. Deterministic by `seed` at equal thread counts on the CPU.
    """
    model.to(device)
    optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.learning_rate, fused=True)
    per_epoch = math.ceil(len(training) / config.batch_size)
    total = per_epoch * config.epochs
    warmup = round(config.warmup * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _linear(step, warmup, total))
    labels = torch.tensor(training.labels)
    best, best_state, since_best = -math.inf, None, 0
    curve: list[tuple[int, float, float]] = []
    losses: list[torch.Tensor] = []
    step, seconds, seen, stopped = 0, 0.0, 0, "all epochs done"
    torch.manual_seed(seed)
    progress.begin(task, total * config.batch_size, "examples")
    for epoch in range(config.epochs):
        model.train()
        for batch in length_batches(training.encoded.lengths, config.batch_size, seed, epoch):
            started = time.perf_counter()
            inputs = collate(training.encoded, batch, padding, device)
            loss = model(**inputs, labels=labels[list(batch)].to(device)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            step, seen, seconds = step + 1, seen + len(batch), seconds + time.perf_counter() - started
            progress.advance(task, len(batch), f"loss {loss.item():.3f}" if step % 5 == 0 else "")
            if step % config.validate_every and step % per_epoch:
                continue
            if not math.isfinite(float(torch.stack(losses).mean())):
                raise DeclinedError(f"{task}: the training diverged (its loss is not finite): lower --learning-rate")
            score = measure(predict(model, validation.encoded, padding, device))
            curve.append((step, float(torch.stack(losses).mean()), score))
            losses.clear()
            progress.advance(task, 0, f"validation {score:.1f}")
            improved = score > best + 100 * config.epsilon
            since_best = 0 if improved else since_best + 1
            if score > best:
                best, best_state = score, copy.deepcopy(model.state_dict())
            if since_best >= config.patience:
                stopped = f"no improvement in {config.patience} validations"
                break
        if since_best >= config.patience:
            break
    progress.end(task)
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    return Trained(best, step, stopped, seconds, seen, tuple(curve))


def predict(
    model: nn.Module, encoded: Encoded, padding: int, device: torch.device, batch_size: int = 32
) -> np.ndarray[Any, Any]:
    """Class indices int64 [examples], or numbers float64 for a regression head; leaves the model's mode as it was."""
    training = model.training
    model.eval()
    classes = True
    result = np.empty(len(encoded))
    with torch.inference_mode():
        for batch in sorted_batches(encoded.lengths, batch_size):
            logits = model(**collate(encoded, batch, padding, device)).logits.float().cpu()
            classes = logits.shape[-1] > 1
            result[batch] = (logits.argmax(-1) if classes else logits.squeeze(-1)).numpy()
    model.train(training)
    return result.astype(np.int64) if classes else result


def length_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """One epoch's batches of indices: shuffled, grouped by length within windows, in shuffled order.

    The sequence depends on `seed` and `epoch` alone.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    sizes = np.asarray(lengths)
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * _WINDOW):
        window = order[start : start + batch_size * _WINDOW]
        window = window[np.argsort(sizes[window], kind="stable")]
        batches += [window[at : at + batch_size].tolist() for at in range(0, len(window), batch_size)]
    for index in generator.permutation(len(batches)):
        yield batches[index]


def sorted_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices for a pass without training: longest first, so that memory peaks at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size].tolist()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for biases and norms."""
    decayed = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _linear(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))
