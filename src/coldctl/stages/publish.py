"""`coldctl publish`: a directory that others can load, with a card that says what it is and what it gains."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldctl.core import layout, manifest, output
from coldctl.core.card import card
from coldctl.core.checkpoint import DTYPES, Checkpoint, body_digest, open_checkpoint
from coldctl.core.config import PublishConfig, as_record, identity, size_in_bytes
from coldctl.core.describe import bare_config
from coldctl.core.errors import CheckpointError, ConfigError, ManifestError
from coldctl.core.manifest import Manifest
from coldctl.core.progress import Progress
from coldctl.core.reference import Model
from coldctl.core.storage import LocalFolder
from coldctl.core.weights import Layout, WeightsWriter, file_order

_CHUNK = 8 << 20  # bytes copied at a time
_TEXTS = ("A short sentence.", "Another one, a little longer than the first, so that the batch is padded.")


@dataclass(frozen=True)
class Published:
    """What was published, and whether it already stood there."""

    path: Path
    manifest: Manifest
    unchanged: bool


def publish(
    model: Model,
    destination: Path,
    config: PublishConfig,
    *,
    evaluation: Path | None,
    overwrite: bool,
    progress: Progress,
) -> Published:
    """Write `model` to `destination` as bare weights, config, tokenizer, card and manifest, and prove that it loads.

    Raises ConfigError without a licence, ManifestError for an evaluation of another model, CheckpointError if the
    written model does not give the source model's features.
    """
    output.refuse_overlap(destination, [model.place, *([evaluation] if evaluation else [])])
    source = open_checkpoint(model.folder, model.name)
    stated = source.manifest
    digest = body_digest(source)
    if stated is not None and stated["body_digest"] != digest:
        raise CheckpointError(f"{source.label}: its body is not the one its manifest names: make or fetch it again")
    license_ = config.license or (stated.get("license") if stated else None)
    if not license_:
        raise ConfigError("no licence: give --license, for example --license apache-2.0 (an SPDX id)")
    if not any(source.folder.has(name) for name in layout.VOCABULARY_FILES):
        raise CheckpointError(f"{source.label} has no tokenizer: copy the base model's tokenizer files there")
    results = _evaluation(evaluation, digest) if evaluation else None
    name = config.name or (stated["name"] if stated else model.name)
    key = identity("publish", config, body=digest, evaluation=results or {})
    if output.is_done(destination, key, overwrite=overwrite):
        return Published(destination, manifest.read(destination), unchanged=True)
    with output.writing(destination, None, overwrite=True) as partial:
        digests = _copy_body(source, partial, config, progress)
        _copy_rest(source, partial)
        if evaluation is not None:
            for file in (layout.RESULTS, layout.REPORT, layout.GAIN_CHART):
                if (evaluation / file).is_file():
                    (partial / file).write_bytes((evaluation / file).read_bytes())
        with tempfile.TemporaryDirectory(prefix="coldctl-") as scratch:
            _prove_loading(model.local(Path(scratch)), partial, progress)
        document: Manifest = {
            "kind": "published",
            "name": name,
            "iteration": stated.get("iteration") if stated else None,
            "encoding": "full",
            "identity": key,
            "body_digest": digest,
            "config": as_record(config),
            "environment": manifest.environment(["torch", "transformers"]),
            "license": license_,
        }
        if stated is not None:
            for field in ("base", "contributions", "ancestors"):
                if field in stated:
                    document[field] = stated[field]
        text = card(name, destination.name, license_, config.language, document, results)
        (partial / layout.CARD).write_text(text, encoding="utf-8")
        document = manifest.write(partial, document, digests)
    return Published(destination, document, unchanged=False)


def _evaluation(folder: Path, digest: str) -> dict[str, Any]:
    manifest.read_unchanged(folder)
    results: dict[str, Any] = json.loads((folder / layout.RESULTS).read_text(encoding="utf-8"))
    measured = [item["body_digest"] for item in results["models"]]
    if digest in measured:  # the card is about this model alone
        name = results["models"][measured.index(digest)]["name"]
        return {
            **results,
            "models": [item for item in results["models"] if item["name"] == name],
            "results": [entry for entry in results["results"] if entry["model"] == name],
            "averages": [entry for entry in results["averages"] if entry["model"] == name],
        }
    if measured:
        raise ManifestError(
            f"{folder} evaluates {measured[-1][:19]}…, not this model's body {digest[:19]}…: give the evaluation of this model"
        )
    raise ManifestError(f"{folder} evaluates no model: give the evaluation of this model")


def _copy_body(source: Checkpoint, partial: Path, config: PublishConfig, progress: Progress) -> dict[str, str]:
    """The body's tensors as they are, unprefixed, without heads. Returns the files' digests."""
    layouts = [Layout(name, tensor.dtype, tensor.shape) for name, tensor in source.body.items()]
    writer = WeightsWriter(partial, layouts, size_in_bytes(config.max_shard_size))
    buffer = memoryview(bytearray(_CHUNK))
    progress.begin("publish", sum(item.nbytes for item in layouts), "bytes")
    try:
        for item in file_order(layouts):
            tensor = source.body[item.name]
            itemsize = DTYPES[tensor.dtype].itemsize
            for start in range(0, tensor.nbytes, _CHUNK):
                part = buffer[: min(_CHUNK, tensor.nbytes - start)]
                source.read_into(tensor, start // itemsize, part)
                writer.write(part)
                progress.advance("publish", len(part))
        writer.close()
    finally:
        writer.abandon()
        progress.end("publish")
    return writer.digests


def _copy_rest(source: Checkpoint, partial: Path) -> None:
    document = bare_config(source.config, source.config.get("dtype") or source.config.get("torch_dtype"))
    (partial / layout.MODEL_CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in layout.TOKENIZER_FILES:
        if source.folder.has(name):
            (partial / name).write_bytes(source.folder.read(name))


def _prove_loading(before: Path, after: Path, progress: Progress) -> None:
    """Load what was written as a user would, and compare its features with the source's. Raises CheckpointError."""
    import torch

    from coldctl.core import model as models

    progress.note("loading what was written, and comparing its features with the source model's")
    hidden = []
    for folder in (before, after):
        tokenizer, body = models.load_tokenizer(folder), models.load_body(folder)
        encoded = models.encode(tokenizer, list(_TEXTS), None, models.length_limit(tokenizer, body.config, 64))
        with torch.inference_mode():
            batch = models.collate(encoded, [0, 1], tokenizer.pad_token_id, torch.device("cpu"))
            hidden.append(body(**batch).last_hidden_state)
    models.load_classifier(after, ("a", "b"), 0)
    if not torch.equal(hidden[0], hidden[1]):
        worst = float((hidden[0] - hidden[1]).abs().max())
        raise CheckpointError(
            f"the published model's features differ from the source's by up to {worst:.2g}: nothing was published"
        )
    if body_digest(open_checkpoint(LocalFolder(after), "published")) != body_digest(
        open_checkpoint(LocalFolder(before), "source")
    ):
        raise CheckpointError("the published body is not the source's: nothing was published")
