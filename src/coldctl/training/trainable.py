"""What of a model is trained: all of it, all but its first layers, or low-rank adapters (PEFT) and the head."""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from coldctl.artifacts import layout
from coldctl.common.errors import ConfigError
from coldctl.config.settings import FinetuneConfig
from coldctl.training.model import body_of

_PEFT = "base_model.model."  # before all names of a file of PEFT's
_BEHIND = ("pooler", "final_norm")  # what a body has behind its last layer


def restrict(model: nn.Module, config: FinetuneConfig, base_name: str, seed: int) -> Any | None:
    """Freeze what `config` says, in place; with `lora_rank` also put adapters in and return PEFT's wrapper.

    Raises ConfigError for what the architecture does not have.
    """
    body = body_of(model)
    if config.freeze_embeddings:
        _embeddings(body).requires_grad_(requires_grad=False)
    layers = _layers(body) if config.freeze_layers else []
    if config.freeze_layers > len(layers):
        raise ConfigError(
            f"--freeze-layers {config.freeze_layers}: {base_name} has {len(layers)} layers that can be frozen"
        )
    if config.freeze_layers:
        _freeze_below(body, layers[config.freeze_layers :])
    return _with_adapters(model, config, base_name, seed) if config.lora_rank else None


def save_adapter(adapted: Any, folder: Path, base_name: str, *, body_only: bool = False) -> None:
    """Write adapter and head in PEFT's format, or an adapter of the bare encoder alone.

    Of the base it tells the name, never where it was.
    """
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.target_modules = sorted(config.target_modules)  # a set, in another order in each process
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / layout.CARD).unlink(missing_ok=True)  # PEFT's template of a model card
    if body_only:
        _leave_head_out(folder, f"{adapted.get_base_model().base_model_prefix}.")


def _leave_head_out(folder: Path, prefix: str) -> None:
    """Make an adapter of a model with a head one of its body, as `AutoModel` loads that."""
    from safetensors.torch import load_file, save_file

    weights, settings = folder / layout.ADAPTER_WEIGHTS, folder / layout.ADAPTER_CONFIG
    inside = f"{_PEFT}{prefix}"
    tensors = {
        f"{_PEFT}{name.removeprefix(inside)}": tensor
        for name, tensor in load_file(weights).items()
        if name.startswith(inside)
    }
    save_file(tensors, weights, {"format": "pt"})
    document = json.loads(settings.read_text(encoding="utf-8"))
    document["task_type"] = "FEATURE_EXTRACTION"
    document["target_modules"] = sorted(name.removeprefix(prefix) for name in document["target_modules"])
    document["modules_to_save"] = [name for name in document["modules_to_save"] if name in _BEHIND] or None
    settings.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_adapters(model: nn.Module, config: FinetuneConfig, base_name: str, seed: int) -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("--lora-rank needs PEFT: pip install 'coldctl[lora]'") from None
    import torch

    prefix, body = str(model.base_model_prefix), body_of(model)
    inside = [
        f"{prefix}.{name}"
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear) and "pooler" not in name
    ]
    whole = [
        name for name, module in model.named_children() if module is not body and any(True for _ in module.parameters())
    ]
    if getattr(body, "pooler", None) is not None:
        whole.append("pooler")  # as fresh as the head
    shapes = [module.weight.shape for module in body.modules() if isinstance(module, nn.Linear)]
    smallest = min(min(shape) for shape in shapes)
    if config.lora_rank > smallest:
        raise ConfigError(f"--lora-rank {config.lora_rank}: the smallest matrix of {base_name} has the rank {smallest}")
    torch.manual_seed(seed)
    adapters = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=inside,
        modules_to_save=whole,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what transformers and PEFT say to each other
        return peft.get_peft_model(model, adapters)


def _freeze_below(body: nn.Module, trained: list[nn.Module]) -> None:
    """Freeze all but the trained layers and what comes behind them: gradients need not pass the frozen ones."""
    kept = {id(value) for layer in trained for value in layer.parameters()}
    for name, value in body.named_parameters():
        if id(value) not in kept and not name.startswith(_BEHIND):
            value.requires_grad = False


def _embeddings(body: nn.Module) -> nn.Module:
    """All embeddings of a body: the module that holds them, else the word embedding."""
    module: nn.Module = getattr(body, "embeddings", None) or body.get_input_embeddings()  # type: ignore[operator]
    return module


def _layers(body: nn.Module) -> list[nn.Module]:
    """A body's layers, first to last; none where they share their weights."""
    count = getattr(body.config, "num_hidden_layers", 0)
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []
