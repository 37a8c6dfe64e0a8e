"""Every setting, written once: type, range, help and default beside each other.

The options of the command line, the keys of TOML files, the checks, the records in manifests and `docs/reference.md`
come from these classes. To add a setting, add a field: `name: Annotated[TYPE_WITH_RANGE, about("Help.")] = default`.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from coldctl.common.errors import ConfigError
from coldctl.config.fields import about
from coldctl.config.values import Scale, Size

HIGHEST_RANK = 4096  # of a low-rank adapter
_STEP = Scale(1.0)
_SHARD = Size.parse("5GB")
DEFAULT_RANK = 8  # where an adapter is asked for, and no rank is given

Metric = Literal["accuracy", "macro_f1", "matthews", "pearson", "spearman"]
Protocol = Literal["linear-probe", "finetune", "few-shot", "multitask"]
PROTOCOLS: tuple[Protocol, ...] = typing.get_args(Protocol)
Send = Literal["full", "delta-bf16", "delta-int8", "lora"]
Columns = str | Annotated[tuple[str, ...], Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Number = Annotated[float, Meta(ge=0)]
PositiveNumber = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True)
class RunConfig:
    """`[run]`: what `coldctl plan` starts a run from."""

    base: Annotated[
        str, about("Pretrained model of iteration 1: directory, Hub id or URL.", default="none", metavar="MODEL")
    ] = ""
    sample: Annotated[Count, about("Contributors per iteration, drawn by seed.", default="0, all")] = 0
    revision: Annotated[str | None, about("Revision of the pretrained model on the Hub.", default="main")] = None


@dataclass(frozen=True)
class FinetuneConfig:
    """`[finetune]`: how a contribution is trained. The defaults are the protocol's hyperparameters (arXiv 2211.00107)."""

    epochs: Annotated[Positive, about("Epochs of training at most; early stopping may end sooner.")] = 10
    batch_size: Annotated[Positive, about("Batch size in examples per optimizer step.")] = 256
    learning_rate: Annotated[PositiveNumber, about("Learning rate at its peak, with linear decay.")] = 5e-5
    weight_decay: Annotated[Number, about("Weight decay of AdamW.")] = 0.01
    warmup: Annotated[Share, about("Warmup, as a share of all steps.")] = 0.0
    max_gradient_norm: Annotated[Number, about("Gradient clipping: largest norm of all gradients together.")] = 1.0
    max_length: Annotated[
        Positive, about("Sequence length: tokens per example at most.", default="512, or the model's limit")
    ] = 512
    max_train_examples: Annotated[
        Count, about("Training examples at most, drawn by seed, classes in proportion.", default="0, all")
    ] = 0
    max_validation_examples: Annotated[Count, about("Validation examples at most.", default="0, all")] = 0
    max_test_examples: Annotated[Count, about("Test examples at most.", default="0, all")] = 0
    shots: Annotated[Count, about("Training examples in all, stratified by class.", default="0, no limit")] = 0
    shots_per_class: Annotated[bool, about("Count --shots in each class instead of in all.")] = False
    validate_every: Annotated[Positive, about("Validation interval in steps.")] = 50
    patience: Annotated[Positive, about("Early stopping: validations without improvement before it ends.")] = 20
    epsilon: Annotated[Number, about("Early stopping: smallest improvement of the score, as a share of 1.")] = 0.001
    label_smoothing: Annotated[
        Annotated[float, Meta(ge=0, lt=1)], about("Label smoothing factor of the cross-entropy loss.")
    ] = 0.0
    class_weights: Annotated[
        Literal["none", "balanced"],
        about("Class weights in the loss; balanced: rare classes count as much as frequent ones."),
    ] = "none"
    micro_batch: Annotated[
        Count,
        about("Micro-batch in examples: gradients of several add up to one batch.", default="0, the whole batch"),
    ] = 0
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], about("Precision of training; auto: bfloat16 on GPUs that have it.")
    ] = "auto"
    compile: Annotated[bool, about("Compile the model with torch.compile; faster on GPUs.")] = False
    freeze_embeddings: Annotated[bool, about("Freeze the embeddings: leave them untrained.")] = False
    freeze_layers: Annotated[Count, about("Freeze the first N layers and the embeddings.", metavar="N")] = 0
    lora_rank: Annotated[
        Annotated[int, Meta(ge=0, le=HIGHEST_RANK)],
        about(
            "LoRA rank: train low-rank adapters; the contribution is an adapter.",
            default=f"0, no adapters; with --send lora {DEFAULT_RANK}",
        ),
    ] = 0
    send: Annotated[
        Send | None,
        about(
            "Encoding of the contribution: all weights, a difference from the base, or an adapter.",
            default="full, with --lora-rank lora",
        ),
    ] = None
    body_only: Annotated[bool, about("Write only the encoder: no classification head, no label names.")] = False
    anchor: Annotated[
        Number, about("Proximal term (FedProx): strength of the pull towards the base model.", metavar="ALPHA")
    ] = 0.0
    fisher: Annotated[bool, about("Fisher information: also write what fuse --method fisher reads.")] = False
    seed: Annotated[Count, about("Random seed of everything that is drawn.")] = 0


@dataclass(frozen=True)
class FuseConfig:
    """`[fuse]`: how contributions become a fused model. The defaults are the paper's plain mean."""

    method: Annotated[str, about("Merge method: a name from the table in docs/fusing.md.", metavar="METHOD")] = "mean"
    scale: Annotated[
        Scale, about("Scale λ of the step from the base: a number, auto, or a multiple such as 1.5*auto.", metavar="λ")
    ] = _STEP
    weights: Annotated[
        str, about("Weights of the contributions: equal, examples, or a file of name = weight.", metavar="WEIGHTS")
    ] = "equal"
    max_share: Annotated[
        Share,
        about("Largest weight of one contribution.", default="0, no limit; with --weights examples two equal shares"),
    ] = 0.0
    density: Annotated[
        Share, about("Density: share of an update that ties or dare keeps.", default="0.2 with ties, 0.5 with dare")
    ] = 0.0
    trim: Annotated[Share, about("Trimmed mean: share cut from each end.")] = 0.2
    byzantine: Annotated[
        Count, about("Attackers to expect in multi-krum, less those that screening dropped.", metavar="F")
    ] = 1
    position: Annotated[Share, about("Position of slerp between the first model (0) and the second (1).")] = 0.5
    outer_optimizer: Annotated[
        Literal["none", "sgd", "nesterov", "adam"],
        about("Outer optimizer: applied to the difference from the base as a gradient."),
    ] = "none"
    outer_lr: Annotated[Number, about("Learning rate of the outer optimizer.")] = 0.7
    outer_momentum: Annotated[Number, about("Momentum of the outer optimizer.")] = 0.9
    seed: Annotated[Count, about("Random seed of everything that is drawn.")] = 0
    common_rows: Annotated[
        bool, about("Common rows: fuse a larger or smaller vocabulary in the rows that it shares with the base.")
    ] = False
    allow_pickle: Annotated[bool, about("Pickle files (.bin): read them with torch's weights-only unpickler.")] = False
    screen: Annotated[
        Literal["report", "reject", "off"], about("Outlier screening: report outliers, reject them, or off.")
    ] = "report"
    min_contributions: Annotated[
        Count, about("Smallest number of contributions to fuse.", default="more than half", metavar="N")
    ] = 0
    strict: Annotated[bool, about("Strict: if any contribution is rejected, write nothing and end with 3.")] = False
    verify: Annotated[bool, about("Verify checkpoints against the digests in their manifests.")] = True
    trusted_keys: Annotated[
        str | None,
        about(
            "Public keys: take only contributions signed by one of DIR/NAME.pem.",
            default="signatures are not asked for",
            metavar="DIR",
        ),
    ] = None
    allow_other_base: Annotated[bool, about("Accept contributions that were made on another base.")] = False
    stale: Annotated[
        Literal["auto", "reject", "discount"],
        about(
            "Late contributions, made on an earlier base: reject or discount them.",
            default="auto: discount in a RUN, else reject",
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["float64", "float32", "float16", "bfloat16"] | None,
        about("Data type of the written weights.", default="the base's"),
    ] = None
    max_shard_size: Annotated[Size, about("Shard size: larger weights are split into files.", metavar="SIZE")] = _SHARD


@dataclass(frozen=True)
class EvaluateConfig:
    """`[evaluate]`: how models are compared."""

    protocol: Annotated[
        Annotated[tuple[Protocol, ...], Meta(min_length=1)], about("Evaluation protocol; repeatable.")
    ] = ("linear-probe",)
    shortlist: Annotated[
        Count,
        about("Shortlist: measure only the K best by linear probe further.", default="0, all", metavar="K"),
    ] = 0
    seeds: Annotated[
        Positive, about("Finetuning runs per dataset, with seeds of their own.", default="1, which gives no verdict")
    ] = 1
    shots: Annotated[Count, about("Training examples of few-shot.")] = 100
    pooling: Annotated[Literal["mean", "first"], about("Pooling of features for a linear probe.")] = "mean"
    max_length: Annotated[
        Positive,
        about("Sequence length of a linear probe: tokens per example at most.", default="512, or the model's limit"),
    ] = 512
    max_train_examples: Annotated[Count, about("Training examples at most.", default="0, all")] = 0
    max_validation_examples: Annotated[Count, about("Validation examples at most.", default="0, all")] = 0
    max_test_examples: Annotated[Count, about("Test examples at most.", default="0, all")] = 0
    regression_margin: Annotated[
        Number, about("Regression margin in points: how much loss is accepted.", metavar="POINTS")
    ] = 0.0
    seed: Annotated[Count, about("Random seed of everything that is drawn.")] = 0


@dataclass(frozen=True)
class PublishConfig:
    """`[publish]`: what a published directory says about itself."""

    license: Annotated[str | None, about("Licence of the model (SPDX id).", default="the one published before")] = None
    name: Annotated[str | None, about("Name of the model on its card.", default="from the directory")] = None
    language: Annotated[str, about("Language of the card's tag (ISO 639-1).")] = "en"
    base_model: Annotated[
        str | None,
        about("Pretrained model's name on the Hub, for the card.", default="none", metavar="ORG/NAME"),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        about("Data type that weights are rounded to.", default="the fused model's"),
    ] = None
    onnx: Annotated[bool, about("ONNX export: add an ONNX model, checked by running it.")] = False
    max_shard_size: Annotated[Size, about("Shard size: larger weights are split into files.", metavar="SIZE")] = _SHARD


@dataclass(frozen=True)
class DatasetConfig:
    """One `[[dataset]]` of a suite. `path` is absolute or a Hub reference once the file is read.

    With `contributors` above 1 its training and validation examples are shared out among so many contributors, as in
    federated learning; `part` is the share of one of them, counted from 1, and 0 means all of it.
    """

    name: Annotated[str, about("Name of the dataset; contributions are named after it.", metavar="NAME")]
    path: Annotated[str, about("Directory with train, validation and test files; a file; hf:NAME.")]
    role: Annotated[Literal["seen", "unseen"], about("Role: seen datasets contribute, unseen ones only measure.")] = (
        "seen"
    )
    contributors: Annotated[Positive, about("Contributors that share the dataset's examples out.")] = 1
    part: Annotated[Count, about("Number of the contributor's share, from 1.", default="0, all")] = 0
    metric: Annotated[Metric, about("Metric that scores predictions.")] = "accuracy"
    text: Annotated[Columns, about("Text column; in a file also a list of columns.", metavar="COLUMN")] = "text"
    text_pair: Annotated[
        Columns | None,
        about("Text pair: column of the second text, for pair classification.", default="none", metavar="COLUMN"),
    ] = None
    label: Annotated[str, about("Label column.", metavar="COLUMN")] = "label"
    train: Annotated[Columns | None, about("Training split: its file or its name.", default="by name")] = None
    validation: Annotated[Columns | None, about("Validation split: its file or its name.", default="by name")] = None
    test: Annotated[Columns | None, about("Test split: its file or its name.", default="by name")] = None
    revision: Annotated[str | None, about("Revision of a Hub dataset.", default="main")] = None
    license: Annotated[str | None, about("Licence of the contribution (SPDX id).", default="none stated")] = None


SECTIONS: Mapping[str, type] = {
    "run": RunConfig,
    "finetune": FinetuneConfig,
    "fuse": FuseConfig,
    "evaluate": EvaluateConfig,
    "publish": PublishConfig,
}


def settled_finetuning(config: FinetuneConfig) -> FinetuneConfig:
    """Return the settings with what follows from them: `send` from the rank of adapters, and the other way round.

    Raises ConfigError for settings that contradict each other.
    """
    if config.lora_rank and config.send not in (None, "lora"):
        raise ConfigError(
            f"--send {config.send} and --lora-rank {config.lora_rank} exclude each other: leave one out, or --send lora"
        )
    if config.send is None:
        config = dataclasses.replace(config, send="lora" if config.lora_rank else "full")
    elif config.send == "lora" and not config.lora_rank:
        config = dataclasses.replace(config, lora_rank=DEFAULT_RANK)
    if config.shots_per_class and not config.shots:
        raise ConfigError("--shots-per-class says how --shots counts: give --shots, too")
    for flag, value in (
        ("--fisher", config.fisher),
        ("--anchor", config.anchor),
        ("--freeze-embeddings", config.freeze_embeddings),
        ("--freeze-layers", config.freeze_layers),
    ):
        if value and config.lora_rank:
            raise ConfigError(
                f"{flag} is about the body's own weights, which adapters leave alone: leave out --lora-rank and --send lora"
            )
    return config


def contributors_of(datasets: Sequence[DatasetConfig]) -> list[tuple[str, DatasetConfig]]:
    """Return the contributors of a suite by name, each with its dataset, or with its part of one that several share."""
    contributors: list[tuple[str, DatasetConfig]] = []
    for dataset in datasets:
        if dataset.role != "seen":
            continue
        if dataset.part or dataset.contributors == 1:
            contributors.append((dataset.name, dataset))
            continue
        width = len(str(dataset.contributors))
        contributors += [
            (f"{dataset.name}-{part:0{width}d}", dataclasses.replace(dataset, part=part))
            for part in range(1, dataset.contributors + 1)
        ]
    return contributors
