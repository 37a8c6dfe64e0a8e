"""Diagonal of the empirical Fisher information, for `fuse --method fisher`."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from coldctl.artifacts import layout
from coldctl.checkpoints.checkpoint import modern_name
from coldctl.common.errors import as_os_errors
from coldctl.training.batches import Examples, collate
from coldctl.training.loop import TrainingContext
from coldctl.training.losses import REGRESSION, negative_log_likelihoods, problem_of
from coldctl.training.model import body_of

EXAMPLES = 1024  # training examples of which the mean is taken, drawn by seed


def write_fisher(model: nn.Module, examples: Examples, context: TrainingContext, folder: Path, seed: int) -> None:
    """Write `fisher.safetensors`: for each body tensor, float32 of its shape, the mean over examples of (∂ log p / ∂θ)².

    The labels are the true ones, so this is the empirical Fisher information (arXiv 2111.09832, equation 5, with
    labels of the data instead of the model's own). Frozen tensors have zeros. Raises OSError.
    """
    model.eval()
    body = body_of(model)
    sums = {name: torch.zeros_like(value) for name, value in body.named_parameters() if value.requires_grad}
    parameters = dict(body.named_parameters())
    # The variance of what a regression leaves open is unknown; that of its labels keeps units out of the result.
    variance = float(examples.labels.var()) or 1.0 if problem_of(model) == REGRESSION else 1.0
    chosen = np.random.default_rng(seed).permutation(len(examples))[:EXAMPLES]
    task = f"{context.name}: Fisher information"
    context.progress.begin(task, len(chosen), "examples")
    for index in chosen:
        one = np.array([index])
        logits = model(**collate(examples.encoded, one, context.padding, context.device)).logits.float()
        labels = torch.from_numpy(np.ascontiguousarray(examples.labels[one])).to(context.device)
        labels = labels if labels.dtype == torch.int64 else labels.float()
        (negative_log_likelihoods(model, logits, labels).sum() / variance).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, total in sums.items():
                gradient = parameters[name].grad
                if gradient is not None:
                    total.addcmul_(gradient, gradient)
        model.zero_grad(set_to_none=True)
        context.progress.advance(task, 1)
    context.progress.end(task)
    tensors = {
        modern_name(name): (sums[name] / len(chosen)).cpu() if name in sums else torch.zeros(value.shape)
        for name, value in body.state_dict().items()
        if value.is_floating_point()
    }
    with as_os_errors():
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / layout.FISHER)
