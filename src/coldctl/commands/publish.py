"""`coldctl publish`: a repository that others can load, with a model card."""

import json
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coldctl.artifacts import layout, manifest, output, signatures
from coldctl.artifacts.manifest import Manifest
from coldctl.artifacts.model_ref import HUB_ID, Model
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.body_export import WrittenBody, write_body, write_config
from coldctl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from coldctl.checkpoints.digests import body_digest
from coldctl.checkpoints.header import DTYPE_NAMES
from coldctl.common.errors import CheckpointError, ConfigError, ManifestError
from coldctl.common.progress import Progress
from coldctl.config.loading import as_record, check_name, identity
from coldctl.config.settings import PublishConfig
from coldctl.evaluation import results
from coldctl.evaluation.charts import gain_chart
from coldctl.fusing.passes import verify_checkpoint
from coldctl.publishing import privacy, tokenizer
from coldctl.publishing.card import CardContext, EarlierCard, card, earlier_card
from coldctl.publishing.targets import LocalTarget, StoreTarget, Target, Upload, current_in, scratch_upload
from coldctl.storage.location import Location, is_url
from coldctl.storage.remote import open_folder

# Files of an evaluation that are published with the model.
_EVALUATION_FILES = (layout.RESULTS, layout.REPORT, layout.PAGE)
_POOLING = "1_Pooling"


@dataclass(frozen=True)
class Published:
    """A finished publication: its place, and whether it was complete before. `files` are names and sizes in bytes."""

    place: str
    manifest: Manifest
    unchanged: bool
    files: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class _Work:
    """A publication in progress: its inputs, and values derived from them."""

    model: Model
    source: Checkpoint
    config: PublishConfig
    license: str
    name: str
    digest: str  # of the source's body
    results: dict[str, Any] | None  # of this model alone
    evaluation: Location | None
    sign_key: Path | None
    key: str
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def converted_from(self) -> str | None:
        """Return the dtype of the source's weights if they are published in another one."""
        names = {code: name for name, code in DTYPE_NAMES.items()}
        before = {names.get(tensor.dtype, tensor.dtype) for tensor in self.source.body.values() if tensor.floating}
        return ", ".join(sorted(before)) if self.config.dtype and before != {self.config.dtype} else None


def target_of(to: str, progress: Progress, *, private: bool, create_pr: bool) -> Target:
    """Return the target that `--to` means.

    Raises ConfigError for a name that the Hub refuses, or a flag that only the Hub knows.
    """
    if to.startswith("hf://"):
        from coldctl.publishing import hub

        return hub.target(to, progress, private=private, create_pr=create_pr)
    if private or create_pr:
        flag = "--private" if private else "--create-pr"
        raise ConfigError(f"{flag} is about repositories on the Hub: give --to hf://ORG/NAME, or leave it out")
    if to.startswith("hf:"):
        raise ConfigError(f"--to {to}: write hf://{to.removeprefix('hf:').lstrip('/')}")
    return StoreTarget(to, progress) if is_url(to) else LocalTarget(Path(to).expanduser())


def publish(
    model: Model,
    target: Target,
    config: PublishConfig,
    *,
    evaluation: Location | None,
    sign_key: Path | None,
    overwrite: bool,
    dry_run: bool,
    progress: Progress,
) -> Published:
    """Publish `model` at `target`: weights, config, tokenizer, card and manifest, loaded once as its users will load it.

    With `dry_run` everything is made in a temporary directory, and nothing is sent.
    Raises ConfigError without a licence, ManifestError for an evaluation of another model, CheckpointError if the
    written model does not give the source model's features, OutputError if the target cannot be written.
    """
    if isinstance(target, LocalTarget):
        output.refuse_overlap(target.path, [model.place, *([evaluation] if evaluation else [])], flag="--to")
    work = _prepared(model, target, config, evaluation, sign_key, progress)
    if target.is_done(work.key, overwrite=overwrite):
        document = target.current()[1]
        assert document is not None
        if not dry_run:
            target.repair_tag(_tag(document))
        return Published(target.label, document, unchanged=True)
    earlier = _earlier_cards(work, target)
    with scratch_upload(target.label) if dry_run else target.writing() as upload:
        document = _fill(work, target, upload, earlier)
        files = {
            path.relative_to(upload.folder).as_posix(): path.stat().st_size
            for path in sorted(upload.folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
    return Published(upload.place, document, unchanged=False, files=files, seconds=work.seconds)


def _prepared(
    model: Model,
    target: Target,
    config: PublishConfig,
    evaluation: Location | None,
    sign_key: Path | None,
    progress: Progress,
) -> _Work:
    """Check and read the inputs, so that everything that can be refused is refused before a byte is written."""
    if sign_key is not None:
        signatures.check_private_key(sign_key)
    if config.name is not None:
        check_name(config.name, "--name")
    if config.base_model is not None and _hub_id(config.base_model) is None:
        raise ConfigError(f"--base-model {config.base_model} is no name on the Hub: write ORG/NAME")
    source = open_checkpoint(model.folder, model.name)
    stated = source.manifest
    if _has_card(source) and config.base_model is None:  # said when it was published first
        config = replace(config, base_model=_hub_id(stated.get("config", {}).get("base_model") if stated else None))
    license_ = config.license or (stated.get("license") if stated else None)
    if not license_:
        raise ConfigError("no licence: give --license, for example --license apache-2.0 (an SPDX id)")
    if not any(source.folder.has(name) for name in layout.VOCABULARY_FILES):
        raise CheckpointError(f"{source.label} has no tokenizer: copy the base model's tokenizer files there")
    digest = stated["body_digest"] if stated else body_digest(source)  # what is stated is proven while it is copied
    results = _evaluation(evaluation, digest) if evaluation else None
    own = {"card": source.folder.read(layout.CARD).decode("utf-8", "replace")} if _has_card(source) else {}
    key = identity("publish", config, body=digest, evaluation=results or {}, signed=sign_key is not None, **own)
    name = config.name or _name(stated["name"] if stated else model.name, target)
    return _Work(model, source, config, license_, name, digest, results, evaluation, sign_key, key, progress)


def _hub_id(name: object) -> str | None:
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) else None


def _name(stated: str, target: Target) -> str:
    """Return the published model's name. Iterations of a run have only numbers, so these are called after the target."""
    return target.reference if re.fullmatch(r"iteration-\d+", stated) else stated


def _evaluation(folder: Location, digest: str) -> dict[str, Any]:
    """Return the results of the body with this digest alone. Raises ManifestError if the evaluation has none."""
    if not (folder / layout.MANIFEST).is_file() or not (folder / layout.RESULTS).is_file():
        raise ManifestError(
            f"--evaluation {folder} holds no evaluation: give the directory that `coldctl evaluate` wrote"
        )
    stated, there = manifest.read_unchanged(folder)["files"], open_folder(folder)
    for file in (*_EVALUATION_FILES, layout.GAIN_CHART):  # a link to a file of ours would be published, too
        if file not in stated and there.has(file):
            raise ManifestError(f"{folder}: its manifest does not name {file}: evaluate again, or take it out")
    measured = results.read(folder)
    digests = [model["body_digest"] for model in measured["models"]]
    if digest in digests:
        name = measured["models"][digests.index(digest)]["name"]
        return {
            **measured,
            "models": [model for model in measured["models"] if model["name"] == name],
            "results": [entry for entry in measured["results"] if entry["model"] == name],
            "averages": [entry for entry in measured["averages"] if entry["model"] == name],
        }
    other = "".join(f"{evaluated[:19]}…, " for evaluated in digests[-1:])
    raise ManifestError(
        f"{folder} evaluates {other}not this model's body {digest[:19]}…: give the evaluation of this model"
    )


def _earlier_cards(work: _Work, target: Target) -> list[EarlierCard]:
    """Read the cards of the target and of a source that was published before. Raises OutputError for unpaired markers."""
    texts = {target.label: target.current()[0]}
    if _has_card(work.source):
        texts.setdefault(work.source.label, current_in(work.source.folder)[0])
    cards = {f"{label}/{layout.CARD}": text for label, text in texts.items() if text}
    earlier = {label: earlier_card(text, label) for label, text in cards.items()}
    for label, before in earlier.items():
        if not before.has_markers:
            work.progress.note(
                f"card: {label} has no coldctl markers, so its whole text is kept below the generated blocks. Delete what is "
                "out of date"
            )
    return list(earlier.values())


def _fill(work: _Work, target: Target, upload: Upload, earlier: list[EarlierCard]) -> Manifest:
    """Write the whole repository into the directory of `upload` and return its manifest."""
    folder, config, progress = upload.folder, work.config, work.progress
    started = time.perf_counter()
    body = write_body(work.source, folder, config.dtype, config.max_shard_size, progress)
    verify_checkpoint(work.source, body.source_digest)
    write_config(work.source, folder, config.dtype)
    if words := sanitize.note_on(work.source.folder):
        progress.note(f"{work.name} {words}")
    for lack in tokenizer.copy(work.source.folder, folder):
        progress.note(f"the tokenizer is complete but for {lack}")
    _describe_pooling(work.source, folder)
    _copy_evaluation(work, folder)
    work.seconds["copy"] = time.perf_counter() - started
    _prove(work, folder)
    document = _document(work, body)
    context = CardContext(
        name=work.name,
        reference=target.reference,
        page=target.page,
        language=config.language,
        base_model=config.base_model,
        model_config=json.loads((folder / layout.MODEL_CONFIG).read_text(encoding="utf-8")),
        document=document,
        results=work.results,
        converted_from=work.converted_from,
        onnx=config.onnx,
    )
    written = card(context, earlier)
    (folder / layout.CARD).write_text(written.text, encoding="utf-8")
    for words in written.license_warnings:
        progress.note(f"licence: {words}")
    document = manifest.write(folder, document, body.files)
    places = [work.model.place, *([str(work.evaluation)] if work.evaluation else [])]
    by_publisher = (config.name, config.license, config.base_model, config.language)
    public = [str(work.source.config.get("model_type")), *filter(None, by_publisher)]
    privacy.search(folder, places, written.by_people, public)
    if work.sign_key is not None:
        signatures.sign(folder, work.sign_key)
    number = document.get("iteration")
    upload.tag = _tag(document)
    upload.message = f"{work.name}, iteration {number}" if number else work.name
    return document


def _has_card(source: Checkpoint) -> bool:
    """Return True if the source was published before, so that people may have written into its card."""
    stated = source.manifest
    return stated is not None and stated["kind"] == "published" and source.folder.has(layout.CARD)


def _tag(document: Manifest) -> str | None:
    number = document.get("iteration")
    return f"iteration-{number:03d}" if number else None


def _document(work: _Work, body: WrittenBody) -> Manifest:
    """Return the manifest as far as it can be filled in before the card is written."""
    stated = work.source.manifest
    document: Manifest = {
        "kind": "published",
        "name": work.name,
        "iteration": stated.get("iteration") if stated else None,
        "encoding": "full",
        "created": manifest.now(),
        "identity": work.key,
        "body_digest": body.body_digest,
        "config": as_record(work.config),
        "environment": manifest.environment(["torch", "transformers"]),
        "license": work.license,
    }
    if stated is None:
        return document
    if work.converted_from:  # other weights: the model they were rounded from is an ancestor of its own
        document["base"] = {"name": stated["name"], "body_digest": body.source_digest}
        document["ancestors"] = [*stated.get("ancestors", []), manifest.shortened(stated)]
    else:
        for field_ in ("base", "contributions", "ancestors", "fused_by"):
            if field_ in stated:
                document[field_] = stated[field_]
        if stated["kind"] == "fused":  # its own settings and versions, which the publication's do not replace
            document["fused_by"] = {"config": stated.get("config", {}), "environment": stated.get("environment", {})}
    cleaned: Manifest = privacy.without_paths(document)
    return cleaned


def _describe_pooling(source: Checkpoint, folder: Path) -> None:
    """Write what sentence-transformers reads: the encoder, then the mean over its tokens."""
    width = source.config.get("hidden_size") or source.config.get("dim") or source.config.get("d_model")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": _POOLING, "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {"word_embedding_dimension": width, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    for name, content in (("modules.json", modules), (f"{_POOLING}/config.json", pooling)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_evaluation(work: _Work, folder: Path) -> None:
    if work.evaluation is None or work.results is None:
        return
    source = open_folder(work.evaluation)
    alone = len(results.read(work.evaluation)["models"]) == 1
    for file in (*_EVALUATION_FILES, *([layout.GAIN_CHART] if alone else [])):
        (folder / file).write_bytes(source.read(file))
    if not (folder / layout.GAIN_CHART).exists():  # the card's picture is of this model alone
        gain_chart(work.results, folder / layout.GAIN_CHART)


def _prove(work: _Work, folder: Path) -> None:
    """Load what was written, and with `onnx` export and run it."""
    started = time.perf_counter()  # importing torch and transformers is part of it
    from coldctl.publishing.load_check import prove_loading

    prove_loading(work.model.local(), folder, work.config.dtype)
    work.seconds["loading"] = time.perf_counter() - started
    work.progress.note(f"loaded as its users will load it, features compared: {work.seconds['loading']:.1f} s")
    if work.config.onnx:
        from coldctl.publishing.onnx import export

        started = time.perf_counter()
        worst = export(folder, folder / layout.ONNX_MODEL)
        work.seconds["onnx"] = time.perf_counter() - started
        work.progress.note(f"exported to ONNX and run: features differ by at most {worst:.1g}")
