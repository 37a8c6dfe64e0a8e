"""Shortcuts on CPUs that leave the trained weights as they are.

Three exact savings, each undone when the training ends:

- dropout masks come from a counter-seeded generator of numpy, 16 bits per element, ten times faster than torch's
  Bernoulli draws, and reproducible by (seed, step) alone; attention uses the same;
- the last layer computes only the first token's output if the head reads no other;
- rows of the word embedding that no example uses get neither gradients nor optimizer states. AdamW would only decay
  them, which is applied at the end.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from coldctl.data.texts import Ragged

_ATTENTION = "coldctl"
_BITS = 1 << 16
# Encoders whose layers are built like BERT's and whose classification heads read the first token alone.
_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
# Encoders that use a token's id only to look up its row (and to compare it with the padding id).
_PLAIN_EMBEDDINGS = (*_BERT_LIKE, "distilbert", "albert", "mpnet", "deberta", "deberta-v2")


class Masks:
    """A stream of dropout masks, reseeded at each step so that its masks do not depend on earlier steps."""

    def __init__(self) -> None:
        self._bits: Any = np.random.SFC64(0)

    def seed(self, *parts: int) -> None:
        """Restart the stream from these numbers."""
        self._bits = np.random.SFC64(parts)

    def draw(self, shape: Sequence[int], probability: float) -> torch.Tensor:
        """Draw a mask, uint8 of `shape`: 0 with `probability` (in steps of 2⁻¹⁶), else 1."""
        count = int(np.prod(shape))
        raw = self._bits.random_raw(count // 4 + 1).view(np.int16)[:count]
        kept = torch.from_numpy(raw) >= round(probability * _BITS) - _BITS // 2
        return kept.view(torch.uint8).view(shape)


class _Drop(torch.autograd.Function):
    """The function x · mask / (1 − p) and its gradient."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return torch.mul(values, mask).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return torch.mul(gradients[0], mask).mul_(ctx.scale), None, None


class FastDropout(nn.Dropout):
    """An `nn.Dropout` that draws from `masks`."""

    masks: Masks

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  torch's own name
        """Zero elements with probability p and scale the others, in training mode; else the identity."""
        return _dropped(input, self.p, self.masks) if self.training else input


def _dropped(values: torch.Tensor, probability: float, masks: Masks) -> torch.Tensor:
    """Return the values with dropout from `masks`."""
    if not 0 < probability < 1:
        return nn.functional.dropout(values, probability)
    result: torch.Tensor = _Drop.apply(values, masks.draw(values.shape, probability), 1 / (1 - probability))  # type: ignore[no-untyped-call]
    return result


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Compute scaled dot-product attention: [batch, heads, length, size] in, [batch, length, heads, size] out.

    Without dropout this is torch's own kernel. With it torch would draw slow masks, so they come from the fast stream.
    """
    masks = getattr(module, "coldctl_masks", None)
    if not dropout or masks is None or key.shape[1] != query.shape[1]:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return output, None
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(2, 3))
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = _dropped(torch.softmax(scores, dim=-1), dropout, masks)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


@contextmanager
def fast_dropout(models: Sequence[nn.Module]) -> Iterator[Masks]:
    """Make the models draw dropout from one fast stream, which the caller seeds, inside this context."""
    masks = Masks()
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))  # bodies may be shared
    dropouts: list[Any] = [module for module in modules if type(module) is nn.Dropout]
    attending: list[Any] = [module for module in modules if hasattr(module, "is_causal")]
    plain = [model for model in models if getattr(model.config, "_attn_implementation", "") == "sdpa"]
    for module in dropouts:
        module.__class__ = FastDropout
        module.masks = masks
    for module in attending:
        module.coldctl_masks = masks
    for model in plain:
        model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]
    try:
        yield masks
    finally:
        for module in dropouts:
            module.__class__ = nn.Dropout
            del module.masks
        for module in attending:
            del module.coldctl_masks
        for model in plain:
            model.set_attn_implementation("sdpa")  # type: ignore[operator]


@contextmanager
def first_token_only(models: Sequence[nn.Module]) -> Iterator[None]:
    """Make the last layer compute the first token only, in classifiers that read no other, inside this context."""
    layers = {id(layer): layer for model in models for layer in _last_layers(model)}.values()
    for layer in layers:
        layer.forward = MethodType(_first_token_layer, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _last_layers(model: nn.Module) -> list[nn.Module]:
    """Return the last layer of a classifier that reads its first token only, or none."""
    kind = getattr(model.config, "model_type", "")
    if kind not in _BERT_LIKE or not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    body = getattr(model, str(model.base_model_prefix))
    implementation = getattr(model.config, "_attn_implementation", "")
    last = body.encoder.layer[-1]
    # A wrapped linear layer, such as one with a low-rank adapter, is called in the same way.
    return [last] if implementation in ("sdpa", _ATTENTION) and not getattr(last, "is_decoder", False) else []


def _first_token_layer(
    layer: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    """Compute a BERT-like layer for the first token: [batch, length, hidden] in, [batch, 1, hidden] out."""
    inner = layer.attention.self
    first = hidden_states[:, :1]
    query, key, value = (
        states.view(*states.shape[:2], -1, inner.attention_head_size).transpose(1, 2)
        for states in (inner.query(first), inner.key(hidden_states), inner.value(hidden_states))
    )
    mask = attention_mask[:, :, :1] if attention_mask is not None else None
    dropout = inner.dropout.p if inner.training else 0.0
    context, _weights = attention(inner, query, key, value, mask, dropout=dropout, scaling=inner.scaling)
    attended = layer.attention.output(context.reshape(*first.shape[:2], -1), first)
    output: torch.Tensor = layer.output(layer.intermediate(attended), attended)
    return output


class UsedRows:
    """A smaller word embedding of the rows that a training uses, which replaces the full one until `restore`."""

    def __init__(self, model: nn.Module, tokens: Sequence[Ragged], padding: int) -> None:
        """Replace the embedding. `tokens` are all that the model will see; `padding` is the token id of padding."""
        self._embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._full = self._embedding.weight
        self.decay = 1.0  # the factor that weight decay would have applied to the other rows
        size = len(self._full)
        seen = np.zeros(size, bool)
        # Ids up to the padding id keep their rows, so that the padding id stays the one in the config.
        stated = (getattr(model.config, "pad_token_id", None), getattr(self._embedding, "padding_idx", None))
        seen[: max(padding, *(number or 0 for number in stated)) + 1] = True
        for rows in tokens:
            for token_ids in rows.chunks():
                seen[token_ids] = True
        kind = getattr(model.config, "model_type", "")
        self.active = kind in _PLAIN_EMBEDDINGS and self._full.requires_grad and 4 * int(seen.sum()) < 3 * size
        if not self.active:
            return
        self._kept = torch.from_numpy(np.flatnonzero(seen))
        self._places = torch.zeros(size, dtype=torch.int64)
        self._places[self._kept] = torch.arange(len(self._kept))
        self._embedding.weight = nn.Parameter(self._full.detach()[self._kept].clone())

    def renumbered(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return token ids, int64 of any shape, as rows of the smaller embedding."""
        return self._places[tokens] if self.active else tokens

    def restore(self) -> None:
        """Restore the full embedding: trained rows as they are, the others multiplied by `decay`."""
        if not self.active:
            return
        with torch.no_grad():
            full = self._full.detach() * self.decay if self.decay != 1.0 else self._full.detach()
            full[self._kept] = self._embedding.weight.detach()
        self._embedding.weight = nn.Parameter(full)
