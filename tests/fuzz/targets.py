"""One target per parser of strangers' bytes: documents to start from, what to change in them, and the way they take.

Nothing here imports torch but the target for pickles, so that a process for one target starts at once.
"""

import base64
import io
import json
import random
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mutations
import samples

from coldctl.artifacts import layout, lineage, manifest, run, signatures
from coldctl.checkpoints import sanitize
from coldctl.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_tensors
from coldctl.checkpoints.digests import body_digest
from coldctl.checkpoints.formats import open_contribution
from coldctl.config import loading
from coldctl.config.settings import SECTIONS, DatasetConfig, contributors_of
from coldctl.data.datasets import Limits, config_from_reference, load_dataset
from coldctl.data.sources import FORMATS
from coldctl.evaluation import markdown, results
from coldctl.fusing import recipe
from coldctl.fusing.compatibility import compare
from coldctl.publishing import history, licenses, tokenizer
from coldctl.storage.local import LocalFolder


@dataclass(frozen=True)
class Target:
    """A parser: `parse` takes the bytes in the file `file` of a directory that holds what else it needs."""

    name: str
    file: str
    seeds: Callable[[], list[bytes]]
    mutate: mutations.Mutation
    parse: Callable[[Path], object]
    beside: Callable[[], dict[str, bytes]] = dict


@cache
def base() -> Checkpoint:
    """A base model for what only its base can decode."""
    folder = Path(tempfile.mkdtemp(prefix="coldctl-fuzz-"))
    (folder / layout.MODEL_CONFIG).write_bytes(samples.spelt(samples.CONFIG))
    (folder / layout.WEIGHTS).write_bytes(samples.tensors_file(samples.BODY))
    return open_checkpoint(LocalFolder(folder), "base")


def examine(folder: Path) -> None:
    """Open a contribution, hold it against the base, and read all of it, as fuse and check do."""
    found = open_contribution(LocalFolder(folder), "it", base(), allow_pickle=True)
    compare(base(), found, None, allow_other_base=False)
    sanitize.note(found.config)
    body_digest(found)


def read_index(folder: Path) -> None:
    read_tensors(LocalFolder(folder))


def of_manifest(rng: random.Random, data: bytes) -> bytes:
    """A manifest changed, mostly with its digest put right: anybody can compute one."""
    changed = mutations.of_json(rng, data)
    try:
        document = json.loads(changed)
        return samples.signed(document) if isinstance(document, dict) and rng.random() < 0.85 else changed
    except (ValueError, RecursionError, UnicodeEncodeError):
        return changed


def show_manifest(folder: Path) -> None:
    found = manifest.read(folder)
    lineage.mermaid(lineage.generations(found))
    history.history(found)
    licenses.warnings(
        "mit", [item for entry in history.with_ancestors(found) for item in entry.get("contributions", [])]
    )
    manifest.shortened(found)


def read_run(folder: Path) -> None:
    found = run.read(folder)
    assert isinstance(found.base_model, str)
    assert found.decided >= 0


def show_results(folder: Path) -> None:
    found = results.read(folder)
    markdown.report(found, [])
    for model in found["models"]:
        for protocol in markdown.protocols_of(found, model["name"]):
            markdown.headline(found, model["name"], protocol)


def load_rows(folder: Path) -> None:
    path = next(path for path in folder.iterdir() if path.suffix in FORMATS)
    load_dataset(config_from_reference(str(path), DatasetConfig("", "")), Limits(), 0)


def read_config(folder: Path) -> None:
    found = loading.read(folder / "suite.toml")
    for kind in SECTIONS.values():
        loading.as_record(loading.resolve(kind, found, {}))
    contributors_of(found.datasets)


def read_weights(folder: Path) -> None:
    recipe.load_weights(next(path for path in folder.iterdir() if path.stem == "weights"))


def copy_tokenizer(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="coldctl-fuzz-", dir=folder.parent) as target:
        tokenizer.copy(LocalFolder(folder), Path(target))
    with sanitize.tokenizer_of(LocalFolder(folder)):
        pass


def of_signature(rng: random.Random, data_: bytes) -> bytes:
    """A bundle changed, or what it signs, samples.signed anew: a trusted contributor may be hostile, too."""
    if rng.random() < 0.5:
        return mutations.of_json(rng, data_)
    try:
        payload = base64.b64decode(json.loads(data_)["dsseEnvelope"]["payload"])
        return samples.bundle_of(mutations.of_json(rng, payload))
    except (ValueError, KeyError, TypeError, RecursionError):
        return mutations.of_bytes(rng, data_)


def read_signature(folder: Path) -> None:
    signatures.verify(LocalFolder(folder), [samples.signature()[1]])


def of_pickle(rng: random.Random, data_: bytes) -> bytes:
    """A pickle changed, inside its archive where it is one."""
    if rng.random() < 0.3:
        return mutations.of_bytes(rng, data_)
    file = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data_)) as source, zipfile.ZipFile(file, "w") as target:
            for item in source.infolist():
                content = source.read(item)
                changed = mutations.of_bytes(rng, content) if item.filename.endswith(".pkl") else content
                target.writestr(item.filename, changed)
    except Exception:  # an archive that was changed before
        return mutations.of_bytes(rng, data_)
    return file.getvalue()


TARGETS: tuple[Target, ...] = (
    Target(
        "safetensors header",
        layout.WEIGHTS,
        lambda: [samples.tensors_file(samples.BODY), samples.tensors_file(samples.prefixed(samples.BODY), "BF16")],
        mutations.of_safetensors,
        examine,
        lambda: {layout.MODEL_CONFIG: samples.spelt(samples.CONFIG)},
    ),
    Target(
        "weights index",
        layout.WEIGHTS_INDEX,
        lambda: [
            samples.spelt(
                {
                    "metadata": {"total_size": 28},
                    "weight_map": {"bert.a": samples.SHARDS[0], "bert.b": samples.SHARDS[1]},
                }
            )
        ],
        mutations.of_json,
        read_index,
        lambda: {
            name: samples.tensors_file(shapes) for name, shapes in zip(samples.SHARDS, samples.HALVES, strict=True)
        },
    ),
    Target(
        "config.json",
        layout.MODEL_CONFIG,
        lambda: [samples.spelt({**samples.CONFIG, "auto_map": {"AutoModel": "x.y"}})],
        mutations.of_json,
        examine,
        lambda: {layout.WEIGHTS: samples.tensors_file(samples.BODY)},
    ),
    Target(
        "adapter_config.json",
        layout.ADAPTER_CONFIG,
        lambda: [samples.spelt(samples.ADAPTER)],
        mutations.of_json,
        examine,
        lambda: {layout.ADAPTER_WEIGHTS: samples.tensors_file(samples.LORA)},
    ),
    Target(
        "adapter weights",
        layout.ADAPTER_WEIGHTS,
        lambda: [samples.tensors_file(samples.LORA), samples.tensors_file(samples.LORA, "BF16")],
        mutations.of_safetensors,
        examine,
        lambda: {layout.ADAPTER_CONFIG: samples.spelt(samples.ADAPTER)},
    ),
    Target(
        "delta weights, bfloat16",
        layout.DELTA_WEIGHTS,
        lambda: [samples.tensors_file(samples.BODY, "BF16")],
        mutations.of_safetensors,
        examine,
        lambda: {layout.MANIFEST: samples.delta_manifest("delta-bf16")},
    ),
    Target(
        "delta weights, 8-bit",
        layout.DELTA_WEIGHTS,
        lambda: [samples.delta_int8()],
        mutations.of_safetensors,
        examine,
        lambda: {layout.MANIFEST: samples.delta_manifest("delta-int8")},
    ),
    Target(
        "pickle (--allow-pickle)",
        "pytorch_model.bin",
        lambda: [samples.pickled(old=False), samples.pickled(old=True)],
        of_pickle,
        examine,
        lambda: {layout.MODEL_CONFIG: samples.spelt(samples.CONFIG)},
    ),
    Target(
        "coldctl.json",
        layout.MANIFEST,
        lambda: [samples.signed(samples.manifest_document())],
        of_manifest,
        show_manifest,
    ),
    Target(
        "model.sig",
        layout.SIGNATURE,
        lambda: [samples.signature()[0]],
        of_signature,
        read_signature,
        lambda: {layout.MODEL_CONFIG: samples.spelt(samples.CONFIG)},
    ),
    Target("run.json", layout.RUN, lambda: [samples.run_document()], mutations.of_json, read_run),
    Target("results.json", layout.RESULTS, lambda: [samples.results_document()], mutations.of_json, show_results),
    Target(
        "dataset .jsonl",
        "d.jsonl",
        lambda: [samples.lines(samples.rows(labels)) for labels in samples.LABELS],
        mutations.of_json_lines,
        load_rows,
    ),
    Target("dataset .csv", "d.csv", lambda: samples.tables(","), mutations.of_table, load_rows),
    Target("dataset .tsv", "d.tsv", lambda: samples.tables("\t"), mutations.of_table, load_rows),
    Target("TOML suite", "suite.toml", lambda: [samples.SUITE.encode()], mutations.of_toml, read_config),
    Target("weights file, TOML", "weights.toml", lambda: [b"one = 1\ntwo = 0.5\n"], mutations.of_toml, read_weights),
    Target("weights file, JSON", "weights.json", lambda: [b'{"one": 1, "two": 0.5}'], mutations.of_json, read_weights),
    Target(
        "tokenizer.json",
        "tokenizer.json",
        lambda: [samples.tokenizer(), samples.merging_tokenizer()],
        mutations.of_json,
        copy_tokenizer,
        lambda: {layout.MODEL_CONFIG: samples.spelt(samples.CONFIG)},
    ),
    Target(
        "tokenizer_config.json",
        "tokenizer_config.json",
        lambda: [
            samples.spelt(
                {"model_max_length": 64, "pad_token": "[PAD]", "vocab_file": "x", "extra_special_tokens": ["a"]}
            )
        ],
        mutations.of_json,
        copy_tokenizer,
        lambda: {layout.MODEL_CONFIG: samples.spelt(samples.CONFIG), "tokenizer.json": samples.tokenizer()},
    ),
)
