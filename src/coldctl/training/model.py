"""Load encoders with torch and transformers, never executing a checkpoint's code."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from coldctl.artifacts import layout
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.architectures import BODY_PREFIXES
from coldctl.checkpoints.checkpoint import Checkpoint, is_pooler, modern_name, open_checkpoint
from coldctl.common.errors import ModelError
from coldctl.data.texts import Ragged, Spool
from coldctl.storage.local import LocalFolder

_CHUNK = 4096  # texts tokenised at a time, over all cores
_LENGTH_LIMIT = 100_000  # tokenizers that know no limit state an absurd one
_SHORTEST = 4  # tokens of the shortest example: three special ones and one of its text
_TEST_TOKENS = 8  # of a test run; Funnel models, which pool three times, need more than four
_MOST_LAYERS = 256  # layers that a config may name, however few weights there are: some models share one layer's
_IN_A_LAYER = re.compile(r"(^|\.)(layers?|layer_groups)\.\d+\.")
_SPARE = 1 << 24  # weights that a config may describe beyond twice those stored, such as a pooler


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples: rows of token ids (int32), and of token types (int8) where the model has them."""

    tokens: Ragged
    types: Ragged | None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens per example, int64 [examples]."""
        return self.tokens.lengths


def quiet() -> None:
    """Silence transformers' own progress bars and warnings."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def load_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's tokenizer. Raises ModelError if its files are missing or unusable."""
    quiet()
    remedy = "copy the base model's tokenizer files there"
    # Without a vocabulary transformers 5 would make up an empty tokenizer.
    if not any((folder / name).is_file() for name in layout.VOCABULARY_FILES):
        raise ModelError(f"{folder} has no tokenizer: {remedy}")
    with sanitize.tokenizer_of(LocalFolder(folder)) as place:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # transformers raises whatever a parser did, and one in Rust may panic
            raise ModelError(f"{folder} has no usable tokenizer ({_first_line(error)}): {remedy}") from None
    tokenizer.name_or_path = ""
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{folder}: its tokenizer has no padding token: set one in tokenizer_config.json")
    return tokenizer


def load_body(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the bare encoder in evaluation mode. Raises ModelError if a body tensor is missing."""
    return _load(transformers.AutoModel, folder, dtype).eval()


def load_classifier(folder: Path, labels: Sequence[str], seed: int, *, multilabel: bool = False) -> nn.Module:
    """Load the encoder in float32 with a new head, drawn by `seed`: one output per label, or one number without labels.

    Raises ModelError if a body tensor is missing or the architecture has no sequence-classification head.
    """
    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_labels": max(1, len(labels))}
    if labels:
        options |= {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
        options["problem_type"] = "multi_label_classification" if multilabel else "single_label_classification"
    else:
        options["problem_type"] = "regression"
    model = _load(transformers.AutoModelForSequenceClassification, folder, **options)
    _reset_head(model, folder, seed)
    return model


def body_of(model: nn.Module) -> nn.Module:
    """Return the encoder inside a model with a head."""
    body: nn.Module = getattr(model, str(model.base_model_prefix))
    return body


def share_body(models: Sequence[nn.Module]) -> None:
    """Make all models share the first one's body, as multitask training does."""
    for model in models[1:]:
        setattr(model, str(model.base_model_prefix), body_of(models[0]))


def check_vocabulary(encoded: Encoded, model: nn.Module) -> None:
    """Raise ModelError if a token id has no row in the model's embedding."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    largest = max((int(chunk.max()) for chunk in encoded.tokens.chunks()), default=0)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer gives token {largest}, the model has {rows}: they do not belong together, take both from one base"
        )


def length_limit(tokenizer: Any, model_config: Any, requested: int) -> int:
    """Return the tokens per example: `requested`, or as many as the model has positions for.

    Raises ModelError if tokenizer or config state no usable length.
    """
    positions = getattr(model_config, "max_position_embeddings", None) or _LENGTH_LIMIT
    if model_config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xmod"):
        positions -= (model_config.pad_token_id or 0) + 1  # their positions start behind the padding id
    stated = tokenizer.model_max_length
    if not isinstance(stated, int | float) or not isinstance(positions, int):
        raise ModelError("its tokenizer or config states a length that is no number: take both from one base")
    limit = int(min(requested, positions, stated if stated < _LENGTH_LIMIT else requested))
    if limit < _SHORTEST and limit < requested:
        raise ModelError(f"its tokenizer or config leaves room for {limit} tokens: take both from one base")
    return limit


def encode(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> Encoded:
    """Tokenise single texts or pairs, truncated to `max_length` tokens, without padding, some thousands at a time."""
    tokens, types = Spool(np.int32), Spool(np.int8)
    typed = False
    for start in range(0, len(texts), _CHUNK):
        rows = slice(start, start + _CHUNK)
        output = tokenizer(
            list(texts[rows]), None if pairs is None else list(pairs[rows]), truncation=True, max_length=max_length,
            padding=False, return_attention_mask=False,
        )  # fmt: skip
        tokens.extend(output["input_ids"])
        if typed := "token_type_ids" in output:
            types.extend(output["token_type_ids"])
    return Encoded(tokens.finish(), types.finish() if typed else None)


def device_of_choice(local_rank: int = 0) -> torch.device:
    """Return this process's CUDA device if there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():  # pragma: no cover - where there is one
        return torch.device("cuda", local_rank)
    if torch.backends.mps.is_available():  # pragma: no cover - where there is one
        return torch.device("mps")
    return torch.device("cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Return True if the device has units for bfloat16. CPUs count as without: most emulate it ten times slower."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _load(kind: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Load a checkpoint with `kind.from_pretrained`, after checks that read headers only. Raises ModelError."""
    quiet()
    source = LocalFolder(folder)
    checkpoint = open_checkpoint(source, folder.name)  # raises for unsafe files and for models that are no encoders
    if (folder / layout.ADAPTER_CONFIG).exists():  # transformers would apply it without being asked
        raise ModelError(
            f"{folder} holds an adapter beside the model: merge the adapter, or take {layout.ADAPTER_CONFIG} away"
        )
    state = torch.get_rng_state()
    try:
        with sanitize.config_of(source) as place:
            config = transformers.AutoConfig.from_pretrained(
                place, local_files_only=True, trust_remote_code=False, **options
            )
        config.name_or_path = ""
        _check_sizes(config, checkpoint)
        with sanitize.weights_of(source, checkpoint.files) as place:
            model, report = kind.from_pretrained(
                place,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # of a head with other labels
                output_loading_info=True,
            )
        _test_run(model)
    except ModelError:
        raise
    except Exception as error:  # transformers raises whatever went wrong inside
        raise ModelError(f"{folder} cannot be loaded ({_first_line(error)}): check it with `coldctl check`") from None
    torch.set_rng_state(state)
    prefix = BODY_PREFIXES[model.config.model_type] + "."
    bare = kind is transformers.AutoModel
    missing = [name for name in report["missing_keys"] if bare or name.startswith(prefix)]
    lost = sorted(name for name in missing if not is_pooler(modern_name(name.removeprefix(prefix))))
    if lost:
        raise ModelError(f"{folder} lacks {len(lost)} body tensors ({lost[0]} …): the checkpoint is incomplete")
    loaded: nn.Module = model
    return loaded


def _test_run(model: nn.Module) -> None:
    """Run the model once on a few tokens, so that an unusable config fails here and not during training."""
    training = model.training
    tokens = torch.ones((1, _TEST_TOKENS), dtype=torch.int64)
    with torch.no_grad():  # not inference mode, whose tensors a model may cache and could not train with
        model.eval()(input_ids=tokens, attention_mask=tokens)
    model.train(training)


def _check_sizes(config: Any, checkpoint: Checkpoint) -> None:
    """Raise ModelError if the config describes another body than the stored weights, before memory is allocated.

    Layers are counted before they are built, even on the meta device.
    """
    for key in vars(config):
        if callable(getattr(type(config), key, None)):
            raise ModelError(f"{checkpoint.label}: its config has a setting {key!r}, which is none: take it out")
    most = max(_MOST_LAYERS, len(checkpoint.body))
    for key, value in config.to_dict().items():
        if type(value) is int and value > most and re.search("layer|block|group", key):
            raise ModelError(f"{checkpoint.label}: its config says {key} = {value}, its weights hold far fewer")
    with torch.device("meta"):
        skeleton = transformers.AutoModel.from_config(config)
    for raw, tensor in skeleton.state_dict().items():
        stored = checkpoint.body.get(modern_name(raw))
        if stored is not None and stored.shape != tuple(tensor.shape):
            raise ModelError(
                f"{checkpoint.label}: {raw} is {list(stored.shape)} in its weights, {list(tensor.shape)} by its config: "
                "they do not belong together, take both from one base"
            )
    built = {modern_name(raw) for raw in skeleton.state_dict()}
    if beyond := [name for name in checkpoint.body if name not in built and _IN_A_LAYER.search(name)]:
        raise ModelError(f"{checkpoint.label}: its config leaves out {beyond[0]}, which its weights hold: correct it")
    described = sum(tensor.numel() for tensor in skeleton.parameters())
    stored_elements = sum(tensor.size for tensor in checkpoint.body.values())
    if described > 2 * stored_elements + _SPARE:
        raise ModelError(f"{checkpoint.label}: its config describes {described} weights, it holds {stored_elements}")


def _reset_head(model: nn.Module, folder: Path, seed: int) -> None:
    """Draw every parameter of the head by `seed`, so that no head that the checkpoint brings is used."""
    body = body_of(model)
    inside = {id(module) for module in body.modules()}
    torch.manual_seed(seed)
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    for module in model.modules():
        if id(module) in inside:
            continue
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=deviation)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    _seed_missing_pooler(body, folder, deviation)


def _seed_missing_pooler(body: nn.Module, folder: Path, deviation: float) -> None:
    """Draw a pooler that the checkpoint lacks, which is as new as the head."""
    pooler = getattr(body, "pooler", None)
    if pooler is None or any(is_pooler(name) for name in open_checkpoint(LocalFolder(folder), folder.name).body):
        return
    for module in pooler.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=deviation)
            nn.init.zeros_(module.bias)


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
