"""Load a repository the way its users will, before it is called published."""

from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from coldctl.checkpoints.architectures import BODY_PREFIXES
from coldctl.checkpoints.checkpoint import is_pooler, modern_name, open_checkpoint
from coldctl.checkpoints.header import DTYPE_NAMES, DTYPES, rounded
from coldctl.common.errors import CheckpointError
from coldctl.storage.local import LocalFolder
from coldctl.training import model as models
from coldctl.training.batches import collate

SENTENCES = (
    "A short sentence.",
    "Another one, a little longer than the first, so that the batch is padded.",
    "Numbers like 3,141.59, an e-mail address, and a word nobody has ever written: quaxolotlish.",
)
_ROUNDING = 1e-5  # of the largest feature: the same weights in files laid out otherwise


def features(folder: Path, sentences: tuple[str, ...] = SENTENCES, *, rounded_to: str | None = None) -> torch.Tensor:
    """Return the last hidden states of a directory's model in float32, [sentences, tokens, width], padding set to zero.

    `rounded_to` rounds the weights to that dtype (`bfloat16`, `float16`, …) first. Raises ModelError.
    """
    if rounded_to is None:
        return _hidden(folder, models.load_body(folder), sentences)
    stored = open_checkpoint(LocalFolder(folder), folder.name).body.values()
    has_doubles = any(tensor.dtype == "F64" for tensor in stored)
    body = models.load_body(folder, torch.float64 if has_doubles else torch.float32)
    with torch.no_grad():
        for parameter in body.parameters():
            values = rounded(parameter.numpy(), DTYPES[DTYPE_NAMES[rounded_to]])
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return _hidden(folder, body.float(), sentences)


def prove_loading(before: Path, after: Path, dtype: str | None) -> None:
    """Load the directory `after` with AutoModel, AutoTokenizer and AutoModelForSequenceClassification, and compare.

    Its features must be those of the model in `before`, whose weights were rounded to `dtype` if one is given.
    Raises CheckpointError for a body tensor that is missing or not expected, or for features that differ beyond rounding.
    """
    models.quiet()
    expected = features(before, rounded_to=dtype)  # which also proves that its config and weights belong together
    options = {
        "local_files_only": True,
        "trust_remote_code": False,
        "dtype": torch.float32,
        "output_loading_info": True,
    }
    body, report = transformers.AutoModel.from_pretrained(after, **options)
    _complete(report, "", "AutoModel")
    loaded = _hidden(after, body.eval(), SENTENCES)
    classifier, report = transformers.AutoModelForSequenceClassification.from_pretrained(after, num_labels=3, **options)
    _complete(report, BODY_PREFIXES[classifier.config.model_type] + ".", "AutoModelForSequenceClassification")
    if loaded.shape != expected.shape:
        raise CheckpointError("the published tokenizer gives other tokens than the source's: nothing was published")
    worst = float((loaded - expected).abs().max())
    if not worst <= _ROUNDING * float(expected.abs().max()):  # so that a not-a-number is refused, too
        raise CheckpointError(
            f"the published model's features differ from the source's by up to {worst:.2g}: nothing was published"
        )


def _complete(report: dict[str, list[str]], prefix: str, kind: str) -> None:
    """Raise CheckpointError if a tensor other than head and pooler is missing or left over."""
    missing = [name for name in report["missing_keys"] if name.startswith(prefix)]
    for words, names in (("lacks", missing), ("has unexpected", report["unexpected_keys"])):
        odd = sorted(name for name in names if not is_pooler(modern_name(name.removeprefix(prefix))))
        if odd:
            raise CheckpointError(f"loaded as {kind} the published model {words} {odd[0]}: nothing was published")


def _hidden(folder: Path, body: nn.Module, sentences: tuple[str, ...]) -> torch.Tensor:
    tokenizer = models.load_tokenizer(folder)
    limit = models.length_limit(tokenizer, body.config, 64)
    encoded = models.encode(tokenizer, list(sentences), None, limit)
    batch = collate(encoded, range(len(encoded)), tokenizer.pad_token_id, torch.device("cpu"))
    with torch.inference_mode():
        hidden: torch.Tensor = body(**batch).last_hidden_state
        return hidden * batch["attention_mask"][..., None]
