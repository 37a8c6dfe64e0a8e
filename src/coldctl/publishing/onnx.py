"""Export to ONNX, checked by running it."""

import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from coldctl.common.errors import CheckpointError, ModelError
from coldctl.publishing.load_check import SENTENCES
from coldctl.training import model as models
from coldctl.training.batches import collate

_OPSET = 18
_LARGEST_DIFFERENCE = 1e-4  # of the largest feature: the same arithmetic in another order


class _Features(nn.Module):
    """The encoder from token ids to last hidden states, with plain tensors in and out."""

    def __init__(self, body: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.body = body
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the features, float32 [batch, length, width], of inputs that are int64 [batch, length] each."""
        hidden: torch.Tensor = self.body(**dict(zip(self.names, inputs, strict=True))).last_hidden_state
        return hidden


def export(folder: Path, file: Path) -> float:
    """Export the model in `folder` to `file`, in float32, for any batch and length, and run it on a few sentences.

    Returns the largest absolute difference from PyTorch's features. Raises CheckpointError if it is beyond rounding or the
    architecture cannot be exported, ModelError without the libraries.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (the exporter imports it late and complains at length)
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    except ImportError:
        raise ModelError("--onnx needs its libraries: install them with `pip install coldctl[onnx]`") from None
    body, tokenizer = models.load_body(folder), models.load_tokenizer(folder)
    encoded = models.encode(tokenizer, list(SENTENCES), None, models.length_limit(tokenizer, body.config, 64))
    batch = collate(encoded, range(len(encoded)), tokenizer.pad_token_id, torch.device("cpu"))
    features = _Features(body, list(batch)).eval()
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    file.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            expected = features(*batch.values()).numpy()
            program = torch.onnx.export(
                features, tuple(batch.values()), input_names=list(batch), output_names=["last_hidden_state"],
                dynamic_shapes=(tuple(axes for _ in batch),), opset_version=_OPSET, dynamo=True, verbose=False,
            )  # fmt: skip
            assert program is not None
            ClearMetadataAndDocStringPass()(program.model)  # stack traces, with this machine's directories
            program.save(file, external_data=False)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = {node.name for node in session.get_inputs()}
        exported = session.run(None, {name: value.numpy() for name, value in batch.items() if name in names})[0]
    except Exception as error:  # the exporter raises whatever an operator of the model did
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"this architecture could not be exported to ONNX ({reason}): publish without --onnx"
        ) from None
    mask = batch["attention_mask"].numpy()[..., None]
    worst = float(np.abs((exported - expected) * mask).max())
    if not worst <= _LARGEST_DIFFERENCE * float(np.abs(expected * mask).max()):
        raise CheckpointError(
            f"the ONNX model's features differ from PyTorch's by up to {worst:.2g}: publish without --onnx"
        )
    return worst
