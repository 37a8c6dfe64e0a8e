"""Write a trained model and its manifest in the encoding that was asked for."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from coldctl.artifacts import layout, manifest
from coldctl.artifacts.manifest import Manifest
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.body_export import write_body, write_config
from coldctl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from coldctl.checkpoints.deltas import ENCODINGS, open_delta, write_delta
from coldctl.checkpoints.digests import body_digest, outside_body
from coldctl.checkpoints.lora import open_adapter
from coldctl.common.progress import Progress
from coldctl.config.loading import as_record
from coldctl.config.settings import FinetuneConfig
from coldctl.data.sources import is_hub
from coldctl.storage.local import LocalFolder
from coldctl.training import trainable
from coldctl.training.jobs import Job, Prepared

_SHARD = 5_000_000_000  # bytes; larger bodies are written in several files
_MODEL = "whole"  # folder of the full trained model, temporary, from which body or delta are written
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Learned:
    """Summary of a training for the manifest and for messages. `metrics` are scores by split and metric."""

    device: str
    metrics: dict[str, dict[str, float]]
    examples_per_second: float | None
    seconds: float
    stopped: str


def write_weights(
    model: nn.Module,
    adapted: Any | None,
    folder: Path,
    base: Checkpoint,
    config: FinetuneConfig,
    name: str,
    progress: Progress,
) -> None:
    """Write the weights that `config.send` asks for into `folder`; `adapted` is PEFT's wrapper of the model, if it has adapters.

    Raises CheckpointError for a delta that its encoding cannot represent.
    """
    if adapted is not None:
        trainable.save_adapter(adapted.cpu(), folder, base.name, body_only=config.body_only)
        return
    model.cpu()
    encoding = encoding_of(config)
    if encoding == "full":
        model.save_pretrained(folder)  # type: ignore[operator]
        return
    full = folder / layout.TRAINING / _MODEL
    model.save_pretrained(full)  # type: ignore[operator]
    source = open_checkpoint(LocalFolder(full), name)
    if encoding == "body":
        write_body(source, folder, None, _SHARD, progress, f"{name}: write the body")
        write_config(source, folder, None)
        return
    write_delta(source, base, folder, encoding)


def write_manifest(job: Job, work: Prepared, learned: Learned, folder: Path, threads: int) -> Manifest:
    """Complete the contribution in `folder`: copy the tokenizer, write the manifest, remove checkpoints of the training."""
    config = job.config
    encoding = encoding_of(config)
    if encoding not in ENCODINGS:  # a delta is never used without its base, which brings the tokenizer
        sanitize.copy_tokenizer(work.base.folder, folder)
    written = _open_written(folder, job.name, work.base, encoding)
    before = work.base.manifest
    ancestor: manifest.GenerationRecord = (
        manifest.shortened(before)
        if before
        else {"kind": "pretrained", "name": job.base.name, "body_digest": work.base_digest}
    )
    document: Manifest = {
        "kind": "contribution",
        "name": job.name,
        "iteration": work.iteration,
        "encoding": encoding,
        "identity": work.key,
        "body_digest": body_digest(written),
        "outside_body": outside_body(written),
        "base": {"name": ancestor["name"], "body_digest": work.base_digest},
        "config": as_record(config),
        "environment": manifest.environment(
            _PACKAGES, device=learned.device, threads=threads, training_seconds=round(learned.seconds, 1)
        ),
        "license": job.dataset.license,
        "dataset": {
            "name": job.dataset.name,
            **({"source": job.dataset.path.removeprefix("hf:")} if is_hub(job.dataset.path) else {}),
            "fingerprint": work.dataset.fingerprint,
            "num_train": len(work.dataset.train),
            "num_validation": len(work.dataset.validation),
            "num_test": len(work.dataset.test),
            **({"num_labels": len(work.dataset.labels)} if config.body_only else {"labels": list(work.dataset.labels)}),
        },
        "metrics": learned.metrics,
    }
    written_document = manifest.write(folder, document)
    # Only now: a command that is killed before this line resumes from these checkpoints.
    shutil.rmtree(folder / layout.TRAINING, ignore_errors=True)
    return written_document


def _open_written(folder: Path, name: str, base: Checkpoint, encoding: str) -> Checkpoint:
    """Open the contribution that `write_weights` wrote, which has no manifest yet."""
    place = LocalFolder(folder)
    if encoding == "adapter":
        return open_adapter(place, name, base)
    return open_delta(place, name, base, encoding) if encoding in ENCODINGS else open_checkpoint(place, name)


def encoding_of(config: FinetuneConfig) -> str:
    """Return the encoding as the manifest names it."""
    if config.send == "lora":
        return "adapter"
    return "body" if config.body_only and config.send == "full" else config.send or "full"
