"""Every file and folder name of the directory contract."""

import re
from typing import Any, TypeVar, cast

from coldctl.storage.location import Location, children

AnyLocation = TypeVar("AnyLocation", bound=Location)

MANIFEST = "coldctl.json"
RUN = "run.json"
PRETRAINED = "pretrained"  # in a RUN in a store, where its base was a directory of one machine
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
TRAINING = "training"  # checkpoints of a training, while it lasts
FISHER = "fisher.safetensors"
CARD = "README.md"
SIGNATURE = "model.sig"
# What git and the Hub keep beside a model's files, wherever it was downloaded or cloned.
KEPT_BY_GIT = (".gitattributes", ".gitignore")
ONNX_MODEL = "onnx/model.onnx"

# What a tokenizer may consist of, over all the encoders and versions of transformers that people have.
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
# Without one of these there is no vocabulary, whatever the other files say.
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
# What is fetched of a model: never code, never pickles.
MODEL_FILES = (MODEL_CONFIG, MANIFEST, "*.safetensors", WEIGHTS_INDEX, ADAPTER_CONFIG, *TOKENIZER_FILES)


def partial(path: AnyLocation) -> AnyLocation:
    """Return the directory of unfinished work on `path`: a hidden sibling, so that one rename completes it."""
    return cast(AnyLocation, path.parent / f".{path.name}.partial")


def iteration(run: Location, number: int) -> Location:
    """`RUN/iteration-001`, and so on."""
    return run / f"iteration-{number:03d}"


def iteration_numbers(run: Location) -> list[int]:
    """The iterations that a RUN has folders of, ascending."""
    found = (re.fullmatch(r"iteration-(\d{3,})", child.name) for child in children(run) if child.is_dir())
    return sorted(int(match[1]) for match in found if match)


def contributions(run: Location, number: int) -> Location:
    """The folder that holds one contribution per contributor."""
    return iteration(run, number) / "contributions"


def fused(run: Location, number: int) -> Location:
    """The fused model of an iteration."""
    return iteration(run, number) / "fused"


def evaluation(run: Location, number: int) -> Location:
    """The evaluation of an iteration's fused model."""
    return iteration(run, number) / "evaluation"


def gate(run: Location, number: int) -> Location:
    """The evaluation of an iteration's fused model against the iteration's own base."""
    return iteration(run, number) / "gate"


def enclosing_run(path: Location) -> Location | None:
    """The RUN that `path` lies in, if it lies in one: the nearest parent with `run.json`."""
    whole: Any = path.resolve()
    for parent in (whole, *whole.parents):
        candidate: Location = parent
        if (candidate / RUN).is_file():
            return candidate
    return None


def iteration_of(contributions: Location) -> tuple[Location, int] | None:
    """The RUN and the number of the iteration whose folder of contributions this is; None for any other place."""
    whole: Any = contributions.resolve()
    found = re.fullmatch(r"iteration-(\d{3,})", whole.parent.name)
    run: Location = whole.parent.parent
    if found is None or whole.name != "contributions" or not (run / RUN).is_file():
        return None
    return run, int(found[1])


def outer_state(kind: str) -> str:
    """The file that holds one state of the outer optimiser, beside the fused model."""
    return f"outer_{kind}.safetensors"


def is_complete(path: Location) -> bool:
    """Whether a directory of ours is finished: its manifest is the last file written."""
    return (path / MANIFEST).is_file()
