"""Every file and folder name of the directory contract."""

import re
import shutil
from pathlib import Path
from typing import Any, TypeVar, cast

from coldctl.common.errors import OutputError
from coldctl.storage.location import Location, children

AnyLocation = TypeVar("AnyLocation", bound=Location)

MANIFEST = "coldctl.json"
RUN = "run.json"
# In a RUN in a store: its base, where that was a directory of one machine.
PRETRAINED = "pretrained"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MODEL_CONFIG = "config.json"
DELTA_WEIGHTS = "delta.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
RESULTS = "results.json"
REPORT = "report.md"
PAGE = "report.html"
CURVE_CHART = "curve.png"
CELLS = "cells"
GAIN_CHART = "gain.png"
FUSE_CHART = "fuse.png"
TRAINING_CHART = "training.png"
# Checkpoints of a training, while it lasts.
TRAINING = "training"
FISHER = "fisher.safetensors"
CARD = "README.md"
SIGNATURE = "model.sig"
# Files of git and the Hub in a clone or download.
KEPT_BY_GIT = (".gitattributes", ".gitignore")
ONNX_MODEL = "onnx/model.onnx"

# In a partial directory: the identity of the unfinished work; with the suffix, only the rename is missing.
IDENTITY = ".identity"
WHOLE = " whole"
# In a partial directory of a store, in place of a lock.
LEASE = ".lease"

# All files that tokenizers consist of, over the encoders and versions of transformers in use.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
SENTENCEPIECE_FILES = ("spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model")
# One of these holds the vocabulary.
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
# The files that are fetched of a model: never code, never pickles.
MODEL_FILES = (MODEL_CONFIG, MANIFEST, "*.safetensors", WEIGHTS_INDEX, ADAPTER_CONFIG, *TOKENIZER_FILES)

_ITERATION = re.compile(r"iteration-(\d{3,})")


def partial(path: AnyLocation) -> AnyLocation:
    """Return the directory of unfinished work on `path`: a hidden sibling, so that one rename completes it."""
    return cast(AnyLocation, path.parent / f".{path.name}.partial")


def iteration(run: Location, number: int) -> Location:
    """Return `RUN/iteration-001`, and so on."""
    return run / f"iteration-{number:03d}"


def iteration_numbers(run: Location) -> list[int]:
    """Return the numbers of the iterations that have a folder in a RUN, ascending."""
    matches = (_ITERATION.fullmatch(child.name) for child in children(run) if child.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def contributions(run: Location, number: int) -> Location:
    """Return the folder that holds one contribution per contributor."""
    return iteration(run, number) / "contributions"


def fused(run: Location, number: int) -> Location:
    """Return the directory of an iteration's fused model."""
    return iteration(run, number) / "fused"


def evaluation(run: Location, number: int) -> Location:
    """Return the directory of the evaluation of an iteration's fused model."""
    return iteration(run, number) / "evaluation"


def gate(run: Location, number: int) -> Location:
    """Return the directory of the evaluation of an iteration's fused model against the iteration's base."""
    return iteration(run, number) / "gate"


def enclosing_run(path: Location) -> Location | None:
    """Return the RUN that `path` lies in: the nearest folder above it with `run.json`. None without one."""
    absolute: Any = path.resolve()
    return next((folder for folder in (absolute, *absolute.parents) if (folder / RUN).is_file()), None)


def iteration_of(contributions: Location) -> tuple[Location, int] | None:
    """Return the RUN and the number of the iteration whose folder of contributions this is; None for another place."""
    absolute: Any = contributions.resolve()
    match = _ITERATION.fullmatch(absolute.parent.name)
    run: Location = absolute.parent.parent
    if match is None or absolute.name != "contributions" or not (run / RUN).is_file():
        return None
    return run, int(match[1])


def outer_state(kind: str) -> str:
    """Return the name of the file with one state of the outer optimizer, beside the fused model."""
    return f"outer_{kind}.safetensors"


def is_complete(path: Location) -> bool:
    """Return True if a directory of ours is finished: its manifest is the last file written."""
    return (path / MANIFEST).is_file()


def claim(partial: Location, path: Location, identity: str | None, *, overwrite: bool) -> None:
    """Keep the unfinished work on `path` if it has the same identity, else clear the directory and mark it as ours.

    Without an `identity` nothing is kept. Raises OutputError if other work is there and `overwrite` is not given.
    """
    marker = partial / IDENTITY
    earlier = marker.read_text(encoding="utf-8").removesuffix(WHOLE) if marker.is_file() else None
    if identity and earlier == identity:
        # A command that was killed while it wrote the manifest may have left half of it.
        (partial / MANIFEST).unlink(missing_ok=True)
        return
    has_files = any(child.name not in (IDENTITY, LEASE) for child in children(partial))
    if earlier is not None and has_files and identity is not None and not overwrite:
        raise OutputError(
            f"{partial} holds unfinished work on {path.name} under another config or other inputs: "
            "give --overwrite to drop it, or repeat the earlier command to finish it"
        )
    clear(partial, keep=(LEASE,))
    marker.write_text(identity or "", encoding="utf-8")


def clear(folder: Location, *, keep: tuple[str, ...]) -> None:
    """Remove everything in a folder except the files named in `keep`."""
    for child in children(folder):
        if child.name in keep:
            continue
        if not isinstance(child, Path):
            child.fs.rm(child.path, recursive=True)
        elif child.is_dir():
            shutil.rmtree(child)
        else:
            child.unlink()
