"""Trainable weights: all, all but the first layers, or low-rank adapters and the head."""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from coldctl.artifacts import layout
from coldctl.common.errors import ConfigError
from coldctl.config.settings import FinetuneConfig
from coldctl.training.model import body_of

_PEFT = "base_model.model."  # prefix of all names in PEFT's files
_AFTER_LAYERS = ("pooler", "final_norm")  # modules of a body after its last layer


def configure_trainable(model: nn.Module, config: FinetuneConfig, base_name: str, seed: int) -> Any | None:
    """Freeze embeddings and layers as `config` says, in place; with `lora_rank` add adapters and return PEFT's wrapper.

    Raises ConfigError for settings that do not fit the architecture.
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
    """Write adapter and head in PEFT's format, or with `body_only` an adapter of the bare encoder.

    The adapter's config names the base model, never its path.
    """
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.target_modules = sorted(config.target_modules)  # PEFT has a set, whose order differs between processes
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / layout.CARD).unlink(missing_ok=True)  # PEFT writes a template of a model card
    if body_only:
        _remove_head(folder, f"{adapted.get_base_model().base_model_prefix}.")


def _remove_head(folder: Path, prefix: str) -> None:
    """Rewrite an adapter of a model with a head as one of its body, as `AutoModel` loads it."""
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
    document["modules_to_save"] = [name for name in document["modules_to_save"] if name in _AFTER_LAYERS] or None
    settings.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_adapters(model: nn.Module, config: FinetuneConfig, base_name: str, seed: int) -> Any:
    """Add adapters to all linear layers of the body, drawn by `seed`; head and pooler are trained as a whole."""
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
    full_modules = [
        name for name, module in model.named_children() if module is not body and any(True for _ in module.parameters())
    ]
    if getattr(body, "pooler", None) is not None:
        full_modules.append("pooler")  # newly initialised, like the head
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
        modules_to_save=full_modules,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between transformers and PEFT
        return peft.get_peft_model(model, adapters)


def _freeze_below(body: nn.Module, trained: list[nn.Module]) -> None:
    """Freeze all but the trained layers and the modules after them, so that backpropagation ends above the frozen ones."""
    trainable = {id(value) for layer in trained for value in layer.parameters()}
    for name, value in body.named_parameters():
        if id(value) not in trainable and not name.startswith(_AFTER_LAYERS):
            value.requires_grad = False


def _embeddings(body: nn.Module) -> nn.Module:
    """Return the module of all embeddings of a body, else the word embedding."""
    module: nn.Module = getattr(body, "embeddings", None) or body.get_input_embeddings()  # type: ignore[operator]
    return module


def _layers(body: nn.Module) -> list[nn.Module]:
    """Return a body's layers, first to last; none if they share weights."""
    count = getattr(body.config, "num_hidden_layers", 0)
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []
