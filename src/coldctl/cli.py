"""The command line: options become a config, the config goes to one stage, what it returns is shown.

Stages are imported when they are called, so that `--help` loads neither torch nor transformers. Errors become
one line and an exit code here and nowhere else.
"""

import gc
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from coldctl import __version__
from coldctl.artifacts import layout
from coldctl.common.errors import ColdctlError, ConfigError, DeclinedError, OutputError
from coldctl.common.text import printable
from coldctl.core.config import (
    ConfigFile,
    DatasetConfig,
    EvaluateConfig,
    FinetuneConfig,
    FuseConfig,
    PublishConfig,
    RunConfig,
    read,
    resolve,
    seconds_in,
)
from coldctl.storage.location import locate, raised_by_store

if TYPE_CHECKING:
    from coldctl.console import Screen

INTERRUPTED = 130

app = typer.Typer(
    name="coldctl",
    help="Recycle finetuned models by ColD Fusion: finetune, fuse, evaluate, publish, again.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

Config = Annotated[Path | None, typer.Option("--config", metavar="FILE.toml", help="Settings; flags win over them.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything that is drawn. [dim]default: 0[/]")]
Jobs = Annotated[int, typer.Option("--jobs", min=0, help="Pieces of work side by side; 0: as many as there are cores.")]
EngineName = Annotated[str, typer.Option("--engine", metavar="local|ray", help="Where jobs run.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="A running Ray cluster; auto: this machine's. [dim]default: $RAY_ADDRESS, else one is started[/]",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads per job. [dim]default: its share of the cores[/]")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no prose, only errors.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that was made from something else.")]
# These commands draw nothing and run no jobs. They accept what every command accepts, so that a script can pass
# one set of flags to all of them.
NoSeed = Annotated[int | None, typer.Option("--seed", hidden=True)]
NoJobs = Annotated[int, typer.Option("--jobs", hidden=True)]
NoEngine = Annotated[str, typer.Option("--engine", hidden=True)]
NoConfig = Annotated[Path | None, typer.Option("--config", hidden=True)]
NoOverwrite = Annotated[bool, typer.Option("--overwrite", hidden=True)]
Revision = Annotated[str | None, typer.Option("--revision", help="Revision of a Hub model.")]


def main() -> None:
    """Run the command line; the process ends with the exit code of the design."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:  # click's own: usage
        _usage(error)
    if code == INTERRUPTED:  # click's own answer to Ctrl-C, before or after a stage: within one the boundary answers
        _interrupted()
    gc.freeze()  # the process ends: to search all of torch for garbage once more would take a second
    sys.exit(code)


def _usage(error: Exception) -> NoReturn:
    """Turn click's exceptions into our exit codes; anything else is a defect of ours and keeps its traceback."""
    code = getattr(error, "exit_code", None)
    if code is None:  # pragma: no cover - a defect of ours
        raise error
    message = _one_line(error)
    if "--json" in sys.argv[1:]:
        sys.stdout.write(json.dumps({"error": message, "details": [], "exit_code": code}) + "\n")
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def _one_line(error: Any) -> str:
    """Click's usage errors in our form: what, and which help tells more."""
    message = printable(" ".join(error.format_message().split())).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}: see {context.command_path if context else 'coldctl'} --help"


def _interrupted() -> NoReturn:
    sys.stderr.write("interrupted: run the same command again to go on; what was complete is not repeated\n")
    sys.exit(INTERRUPTED)


@contextmanager
def _boundary(*, as_json: bool, quiet: bool, mute: bool = False) -> "Iterator[Screen]":
    """The one error boundary. A `mute` process leaves even its errors to the one that leads it."""
    from coldctl.console import Screen

    screen = Screen(as_json=as_json, silent=quiet, mute=mute)
    try:
        yield screen
    except KeyboardInterrupt:
        _interrupted()
    except ColdctlError as error:
        screen.error(error)
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        screen.error(OutputError(f"{where}{error.strerror or error}: free the cause and run the same command again"))
        raise typer.Exit(OutputError.exit_code) from None
    except Exception as error:
        if not raised_by_store(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        screen.error(OutputError(f"the store does not answer as it should ({reason}): run the same command again"))
        raise typer.Exit(OutputError.exit_code) from None


def _suite(suite: Path | None, config: Path | None) -> tuple[tuple[DatasetConfig, ...], ConfigFile]:
    """The suite's datasets, and the file that settings come from: --config, else the suite file itself."""
    if suite is None:
        return (), read(config)
    file = read(suite)
    if not file.datasets:
        raise ConfigError(f"{suite} has no [[dataset]]: add the datasets of the suite")
    return file.datasets, read(
        config
    ) if config is not None else file  # the suite's own settings, unless told otherwise


def _version(show: bool) -> None:
    if show:
        sys.stdout.write(f"coldctl {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Recycle finetuned models by ColD Fusion (arXiv 2212.01378): finetune, fuse, evaluate, publish, again."""


@app.command(epilog="Example: coldctl finetune my-data/ --base roberta-base --output contributions/mine")
def finetune(
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="Directory, Hub id, URL or RUN to start from.")],
    output: Annotated[str, typer.Option("--output", help="The contribution; for a suite its folder; or a RUN.")],
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="Directory with train, validation, test files; a file; hf:NAME."),
    ] = None,
    suite: Annotated[
        Path | None, typer.Option("--suite", metavar="FILE.toml", help="One contribution per seen dataset.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=0, help="Contributors drawn from the suite; 0: all.")
    ] = None,
    only: Annotated[str, typer.Option("--only", metavar="A,B", help="Only these datasets of the suite.")] = "",
    name: Annotated[
        str | None, typer.Option("--name", help="The contribution's name. [dim]default: the dataset's[/]")
    ] = None,
    license_: Annotated[str | None, typer.Option("--license", help="Licence of the contribution (SPDX id).")] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="COLUMN")] = None,
    text_pair: Annotated[str | None, typer.Option("--text-pair", metavar="COLUMN")] = None,
    label: Annotated[str | None, typer.Option("--label", metavar="COLUMN")] = None,
    epochs: Annotated[int | None, typer.Option(help="[dim]default: 10[/]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="[dim]default: 256[/]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak, with linear decay. [dim]default: 5e-5[/]")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens per example. [dim]default: 512, or the model's limit[/]")
    ] = None,
    max_train_examples: Annotated[
        int | None, typer.Option(help="Drawn by seed, classes in proportion; 0: all.")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Training examples in all, stratified; 0: no limit.")] = None,
    shots_per_class: Annotated[
        bool | None, typer.Option("--shots-per-class", help="--shots counts in each class.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Validations without improvement before stopping. [dim]default: 20[/]")
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="Share of certainty taken off. [dim]default: 0[/]")
    ] = None,
    class_weights: Annotated[
        str | None, typer.Option(metavar="none|balanced", help="balanced: rare classes count as much as frequent ones.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Examples computed at once; gradients add up to the batch. [dim]default: all[/]")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="auto|float32|bfloat16", help="auto: bfloat16 on GPUs that have it.")
    ] = None,
    compile_: Annotated[bool | None, typer.Option("--compile", help="torch.compile; worth it on GPUs.")] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train low-rank adapters of this rank; the contribution is an adapter.")
    ] = None,
    send: Annotated[
        str | None,
        typer.Option(
            "--send",
            metavar="full|delta-bf16|delta-int8|lora",
            help="How the contribution is written: whole, as a difference from the base, as an adapter. "
            "[dim]default: full, with --lora-rank lora[/]",
        ),
    ] = None,
    body_only: Annotated[
        bool | None, typer.Option("--body-only", help="Leave the head, and the labels' names, at home.")
    ] = None,
    freeze_embeddings: Annotated[
        bool | None, typer.Option("--freeze-embeddings", help="Leave them as they are.")
    ] = None,
    freeze_layers: Annotated[
        int | None, typer.Option(help="Leave the first N layers, and the embeddings, as they are.")
    ] = None,
    anchor: Annotated[
        float | None, typer.Option(metavar="ALPHA", help="Pull towards the base model (FedProx). [dim]default: 0[/]")
    ] = None,
    fisher: Annotated[bool | None, typer.Option("--fisher", help="Also write what fuse --method fisher reads.")] = None,
    log: Annotated[
        str | None, typer.Option("--log", metavar="jsonl|tensorboard|wandb", help="Follow the training.")
    ] = None,
    log_folder: Annotated[Path, typer.Option("--log-folder", help="Where --log writes.")] = Path("coldctl-logs"),
    checkpoint_seconds: Annotated[
        float, typer.Option(min=0.0, help="How often a training is kept safe against interruptions.")
    ] = 60.0,
    sign_key: Annotated[
        Path | None,
        typer.Option(
            "--sign-key", metavar="KEY.pem", help="Sign the contribution (OpenSSF model signing), also a complete one."
        ),
    ] = None,
    revision: Revision = None,
    config: Config = None,
    seed: Seed = None,
    jobs: Jobs = 0,
    threads: Threads = None,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Make a contribution: train body and head on one dataset, or one contribution per seen dataset of a suite."""
    from coldctl.training import distributed

    rank = os.environ.get("RANK", "0")
    follows = rank.isdecimal() and rank != "0" and "WORLD_SIZE" in os.environ
    with _boundary(as_json=as_json and not follows, quiet=quiet or follows, mute=follows) as screen:
        from coldctl.artifacts import model_ref
        from coldctl.commands import finetune as stage
        from coldctl.data.datasets import config_from_reference
        from coldctl.training.jobs import JobOptions, LogOptions, jobs_of_suite, single_job
        from coldctl.training.logs import check_kind
        from coldctl.workers import choose

        alone = distributed.find().size == 1
        if not alone and engine != "local":
            raise ConfigError(f"--engine {engine} does not go with torchrun: leave one of them out")
        where = choose(engine, jobs=jobs if alone else 1, threads=threads if alone else None, ray_address=ray_address)
        if (data is None) == (suite is None):
            raise ConfigError("give either DATA or --suite FILE.toml: see coldctl finetune --help")
        suite_datasets, file = _suite(suite, config)
        flags = {
            "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "max_length": max_length,
            "max_train_examples": max_train_examples, "shots": shots, "shots_per_class": shots_per_class,
            "patience": patience, "label_smoothing": label_smoothing, "class_weights": class_weights,
            "micro_batch": micro_batch, "precision": precision, "compile": compile_, "lora_rank": lora_rank, "send": send,
            "body_only": body_only, "freeze_embeddings": freeze_embeddings, "freeze_layers": freeze_layers,
            "anchor": anchor, "fisher": fisher, "seed": seed,
        }  # fmt: skip
        settings = resolve(FinetuneConfig, file, flags)
        if log is not None:
            check_kind(log)
        options = JobOptions(overwrite, LogOptions(log, str(log_folder), checkpoint_seconds), sign_key)
        model = model_ref.resolve(base, revision)
        if data is None and any((name, license_, text, text_pair, label)):
            raise ConfigError(
                "--name, --license, --text, --text-pair and --label go with DATA: a suite's file has its own"
            )
        if data is not None and (sample is not None or only):
            raise ConfigError("--sample and --only go with --suite: DATA is one dataset")
        if data is None:
            chosen = [part for part in only.split(",") if part]
            work = jobs_of_suite(suite_datasets, model, locate(output), settings, options, sample=sample, only=chosen)
        else:
            columns = DatasetConfig(
                "", data, text=text or "text", text_pair=text_pair, label=label or "label", license=license_
            )
            dataset = config_from_reference(data, columns)
            work = [single_job(dataset, model, locate(output), settings, options, name=name)]
        with screen.progress() as progress, closing(where):
            outcomes = stage.finetune_all(work, where, progress, lambda item: progress.note(_finetuned_line(item)))
            distributed.disband()
        done = [outcome.result for outcome in outcomes if outcome.result is not None]
        failed = [(work[outcome.index].name, outcome.error) for outcome in outcomes if outcome.error is not None]
        if failed and len(work) == 1:
            raise failed[0][1]
        screen.result(done[0] if len(work) == 1 else {"contributions": done, "failed": [name for name, _ in failed]})
        if failed:
            names = shlex.quote(",".join(name for name, _ in failed))
            screen.as_json = False  # its document is out already
            outputs_only = all(isinstance(error, OutputError) for _, error in failed)
            raise (OutputError if outputs_only else DeclinedError)(
                f"{len(failed)} of {len(work)} contributions failed: mend the cause and repeat just these with --only {names}",
                [f"{name}: {error.message.removeprefix(f'{name}: ')}" for name, error in failed],
            )


def _finetuned_line(item: Any) -> str:
    metrics = item.manifest.get("metrics", {})
    scores = ", ".join(
        f"{split} {metric} {value:.1f}" for split, found in metrics.items() for metric, value in found.items()
    )
    if item.unchanged:
        what = "signed" if item.signed else "left alone"
        return f"{item.name}: complete already ({scores}), {what}: {item.path}"
    speed = f" {item.train_examples_per_second:.0f} examples/s;" if item.train_examples_per_second else ""
    return f"{item.name}: {scores}; {item.stopped};{speed} {item.seconds:.0f} s: {item.path}"


@app.command(epilog="Example: coldctl fuse contributions/ --base roberta-base --output fused")
def fuse(
    contributions: Annotated[list[str], typer.Argument(metavar="CHECKPOINT_OR_FOLDER...", help="What to fuse.")],
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="What the contributions started from.")],
    output: Annotated[str, typer.Option("--output", help="Directory of the fused model.")],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="mean, task-arithmetic, ties, dare, model-stock, slerp, median, trimmed-mean, multi-krum, "
            "geometric-median or fisher. [dim]default: mean[/]",
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option("--scale", metavar="λ", help="Length of the step: a number, auto, 1.5*auto. [dim]default: 1[/]"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="equal, examples, or a file of name = weight. [dim]default: equal[/]"),
    ] = None,
    max_share: Annotated[
        float | None,
        typer.Option(help="Largest weight of one contribution. [dim]default: with examples two equal shares[/]"),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share that ties (0.2) or dare (0.5) keeps of an update.")
    ] = None,
    trim: Annotated[
        float | None, typer.Option(help="Share cut from each end by trimmed-mean. [dim]default: 0.2[/]")
    ] = None,
    byzantine: Annotated[
        int | None, typer.Option(help="Attackers to expect in multi-krum; dropped ones count. [dim]default: 1[/]")
    ] = None,
    position: Annotated[
        float | None, typer.Option(help="Share of the second model in slerp. [dim]default: 0.5[/]")
    ] = None,
    outer_optimizer: Annotated[
        str | None, typer.Option(help="none, sgd, nesterov or adam on the pseudo-gradient. [dim]default: none[/]")
    ] = None,
    outer_lr: Annotated[float | None, typer.Option(help="Its learning rate. [dim]default: 0.7[/]")] = None,
    outer_momentum: Annotated[float | None, typer.Option(help="Its momentum. [dim]default: 0.9[/]")] = None,
    screen_: Annotated[
        str | None, typer.Option("--screen", help="report, reject or off. [dim]default: report[/]")
    ] = None,
    min_contributions: Annotated[
        int | None, typer.Option(help="How many must remain. [dim]default: more than half[/]")
    ] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="Any drop writes nothing and ends with 3.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare with the manifests' digests.")] = False,
    trusted_keys: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Take only what is signed by one of the public keys DIR/NAME.pem."),
    ] = None,
    allow_other_base: Annotated[
        bool | None, typer.Option("--allow-other-base", help="Take contributions of another base.")
    ] = None,
    stale: Annotated[
        str | None,
        typer.Option(
            "--stale",
            metavar="reject|discount",
            help="Contributions made on an earlier base. [dim]default: discount in a RUN, else reject[/]",
        ),
    ] = None,
    old_base: Annotated[
        list[str] | None,
        typer.Option("--old-base", metavar="MODEL", help="Where an earlier base is, outside of a RUN; repeatable."),
    ] = None,
    allow_pickle: Annotated[
        bool | None, typer.Option("--allow-pickle", help="Read .bin files, by torch's weights-only unpickler.")
    ] = None,
    common_rows: Annotated[
        bool | None,
        typer.Option("--common-rows", help="Of another vocabulary take the rows it shares with the base's."),
    ] = None,
    without: Annotated[
        str | None,
        typer.Option("--without", metavar="NAME", help="Withdraw a contribution from the fused model given first."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 or float64. [dim]default: the base's[/]")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Larger weights are sharded. [dim]default: 5GB[/]")] = None,
    revision: Revision = None,
    config: Config = None,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Parts side by side with --engine ray; 0: all.")] = 0,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
) -> None:
    """Average the bodies of contributions into a better base model."""
    with _boundary(as_json=as_json, quiet=quiet) as screen:
        from coldctl.artifacts import model_ref
        from coldctl.commands import fuse as stage
        from coldctl.workers import choose

        where = choose(engine, jobs=jobs, threads=1, ray_address=ray_address)
        file = read(config)
        if scale is not None and outer_lr is not None:
            raise ConfigError("--scale and --outer-lr exclude each other: give one of them")
        flags = {
            "method": method, "scale": scale, "weights": weights, "max_share": max_share, "density": density, "trim": trim,
            "byzantine": byzantine, "position": position, "outer_optimizer": outer_optimizer, "outer_lr": outer_lr,
            "outer_momentum": outer_momentum, "seed": seed, "screen": screen_, "min_contributions": min_contributions,
            "strict": strict, "verify": False if no_verify else None, "trusted_keys": trusted_keys,
            "allow_other_base": allow_other_base, "stale": stale, "allow_pickle": allow_pickle, "common_rows": common_rows,
            "dtype": dtype, "max_shard_size": max_shard_size,
        }  # fmt: skip
        settings = resolve(FuseConfig, file, flags)
        model = model_ref.resolve(base, revision)
        with screen.progress() as progress, closing(where):
            if without is not None:
                fused = model_ref.resolve(contributions[0])
                done = stage.withdraw(
                    stage.Withdrawal(fused, without, contributions[1:]),
                    model,
                    locate(output),
                    settings,
                    overwrite=overwrite,
                    progress=progress,
                    old_bases=old_base or (),
                    engine=where,
                )
            else:
                done = stage.fuse(
                    contributions,
                    model,
                    locate(output),
                    settings,
                    overwrite=overwrite,
                    progress=progress,
                    old_bases=old_base or (),
                    engine=where,
                )
        if done.unchanged:
            screen.say(f"{output}: complete already, left alone")
        else:
            from coldctl.console import fuse_table

            records: Sequence[Any] = done.manifest["contributions"]
            screen.show(fuse_table(records))
            count = sum(item["status"] == "fused" for item in records)
            screen.say(f"fused {count} contribution{'s' if count != 1 else ''}: {output}")
        screen.result(done.manifest)


@app.command(epilog="Example: coldctl evaluate fused --baseline roberta-base --suite suite.toml --output evaluation")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models to measure; a RUN means all its iterations.")
    ],
    suite: Annotated[Path, typer.Option("--suite", metavar="FILE.toml", help="The datasets to measure on.")],
    output: Annotated[str, typer.Option("--output", help="Directory of the evaluation.")],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="MODEL", help="[dim]default: the base that the manifest names[/]"),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            help="linear-probe, finetune, few-shot or multitask; repeatable. [dim]default: linear-probe[/]",
        ),
    ] = None,
    shortlist: Annotated[
        int | None,
        typer.Option("--shortlist", metavar="K", help="Only the K best by linear probe are measured further; 0: all."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", help="Finetuning runs per dataset. [dim]default: 1, which gives no verdict[/]"),
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Training examples of few-shot. [dim]default: 100[/]")] = None,
    max_train_examples: Annotated[int | None, typer.Option(help="0: all.")] = None,
    max_test_examples: Annotated[int | None, typer.Option(help="0: all.")] = None,
    pooling: Annotated[
        str | None, typer.Option(help="Features of a linear probe: mean or first. [dim]default: mean[/]")
    ] = None,
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="End with 3 if the average gain is surely negative.")
    ] = False,
    regression_margin: Annotated[
        float | None, typer.Option(metavar="POINTS", help="How much loss is accepted. [dim]default: 0[/]")
    ] = None,
    revision: Revision = None,
    config: Config = None,
    seed: Seed = None,
    jobs: Jobs = 0,
    threads: Threads = None,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure whether models are better base models than a baseline, with intervals, on a suite of datasets."""
    with _boundary(as_json=as_json, quiet=quiet) as screen:
        from coldctl.artifacts import model_ref
        from coldctl.commands import evaluate as stage
        from coldctl.console import evaluation_tables
        from coldctl.evaluation import scoring
        from coldctl.workers import choose

        where = choose(engine, jobs=jobs, threads=threads, ray_address=ray_address)
        datasets, file = _suite(suite, config)
        flags = {
            "protocol": tuple(protocol) if protocol else None, "shortlist": shortlist, "seeds": seeds, "shots": shots,
            "pooling": pooling,
            "max_train_examples": max_train_examples, "max_test_examples": max_test_examples,
            "regression_margin": regression_margin, "seed": seed,
        }  # fmt: skip
        settings = resolve(EvaluateConfig, file, flags)
        finetuning = resolve(FinetuneConfig, file, {"seed": seed})
        found = stage.candidates_of(models, revision)
        against = model_ref.resolve(baseline, revision) if baseline else stage.default_baseline(found[0].model)
        with screen.progress() as progress, closing(where):
            done = stage.evaluate(
                found,
                against,
                datasets,
                locate(output),
                settings,
                finetuning,
                engine=where,
                overwrite=overwrite,
                progress=progress,
            )
        screen.show(*evaluation_tables(done.results))
        screen.say(f"{'complete already, left alone' if done.unchanged else 'written'}: {output}")
        screen.result(done.results)
        if fail_on_regression and (losses := scoring.regressions(done.results, settings.regression_margin)):
            screen.as_json = False  # its document is out already
            raise DeclinedError("the average gain is negative beyond doubt", losses)


@app.command(epilog="Example: coldctl publish fused --to my-model --evaluation evaluation --license apache-2.0")
def publish(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fused model.")],
    to: Annotated[str, typer.Option("--to", metavar="DIR|URL|hf://ORG/NAME", help="Where to publish it.")],
    evaluation: Annotated[
        str | None, typer.Option("--evaluation", help="Directory that `coldctl evaluate` wrote.")
    ] = None,
    license_: Annotated[str | None, typer.Option("--license", help="Licence of the model (SPDX id).")] = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name on its card.")] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="The pretrained model's name on the Hub, for the card.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Language of the card's tag. [dim]default: en[/]")] = None,
    dtype: Annotated[str | None, typer.Option(help="Round weights: float32, bfloat16, float16.")] = None,
    onnx: Annotated[bool | None, typer.Option("--onnx", help="Add an ONNX model, checked by running it.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Larger weights are sharded. [dim]default: 5GB[/]")] = None,
    sign_key: Annotated[
        Path | None, typer.Option("--sign-key", metavar="KEY.pem", help="Sign all files (OpenSSF model signing).")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="On the Hub: make the new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="On the Hub: open a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and send nothing.")] = False,
    revision: Revision = None,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
    _seed: NoSeed = None,
    _jobs: NoJobs = 0,
    _engine: NoEngine = "local",
) -> None:
    """Turn a fused model into a repository that anyone can load, with a model card: here, in a store or on the Hub."""
    with _boundary(as_json=as_json, quiet=quiet) as screen:
        from coldctl.artifacts import model_ref
        from coldctl.commands import publish as stage
        from coldctl.console import files_table

        given = {
            "license": license_,
            "name": name,
            "base_model": base_model,
            "language": language,
            "dtype": dtype,
            "onnx": onnx,
            "max_shard_size": max_shard_size,
        }
        settings = resolve(PublishConfig, read(config), given)
        source = model_ref.resolve(model, revision)
        with screen.progress() as progress:
            target = stage.target_of(to, progress, private=private, create_pr=create_pr, dry_run=dry_run)
            done = stage.publish(
                source,
                target,
                settings,
                evaluation=locate(evaluation) if evaluation else None,
                sign_key=sign_key,
                overwrite=overwrite,
                progress=progress,
            )
        if done.unchanged:
            screen.say(f"{done.place}: complete already, left alone")
        elif dry_run:
            screen.show(files_table(done.files))
            screen.say(f"{done.place}: nothing was sent; {len(done.files)} files would be")
        else:
            screen.say(f"{done.place}: published, loaded and compared")
        how = {"place": done.place, "unchanged": done.unchanged, "dry_run": dry_run}
        screen.result({**done.manifest, **how, "sizes": done.files, "seconds": done.seconds})


@app.command(epilog="Example: coldctl check contributions/ --base roberta-base")
def check(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CHECKPOINT_OR_FOLDER...", help="What to examine.")],
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="The base they should fit.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read all data and verify digests.")] = False,
    verify_key: Annotated[
        Path | None, typer.Option("--verify-key", metavar="KEY.pem", help="Verify signatures by this public key.")
    ] = None,
    trusted_keys: Annotated[
        Path | None,
        typer.Option(
            "--trusted-keys", metavar="DIR", help="Verify signatures by any of the keys DIR/NAME.pem, naming it."
        ),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
    _seed: NoSeed = None,
    _jobs: NoJobs = 0,
    _engine: NoEngine = "local",
    _config: NoConfig = None,
    _overwrite: NoOverwrite = False,
) -> None:
    """Say whether checkpoints would fuse, from their headers alone, in milliseconds."""
    with _boundary(as_json=as_json, quiet=quiet) as screen:
        from coldctl.artifacts import model_ref
        from coldctl.commands import check as stage
        from coldctl.console import check_table

        model = model_ref.resolve(base, revision) if base else None
        with screen.progress() as progress:
            report = stage.check(
                checkpoints, model, deep=deep, verify_key=verify_key, trusted_keys=trusted_keys, progress=progress
            )
        screen.show(check_table(report))
        screen.say(f"not examined: {'; '.join(report.not_examined)}")
        screen.result({"sound": report.sound, "checked": report.checked, "not_examined": report.not_examined})
        if not report.sound:
            raise typer.Exit(DeclinedError.exit_code)


@app.command(epilog="Example: coldctl lineage runs/demo/iteration-002/fused")
def lineage(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="A fused or published model, or a contribution.")
    ],
    signer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|KEY.pem",
            help="Which of these models (of a RUN: all) carry contributions that this key signed; 3 if any does.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    _seed: NoSeed = None,
    _jobs: NoJobs = 0,
    _engine: NoEngine = "local",
    _config: NoConfig = None,
    _overwrite: NoOverwrite = False,
) -> None:
    """Show where a model came from: pretrained model, iterations, contributions accepted and refused."""
    with _boundary(as_json=as_json, quiet=quiet) as screen:
        from coldctl.artifacts import model_ref
        from coldctl.commands import lineage as stage
        from coldctl.console import carriers_table, lineage_tree

        if signer is not None:
            found = stage.carriers(models, signer)
            screen.show(carriers_table(found))
            screen.result({"signer": signer, "models": found})
            if tainted := [item for item in found if item.carried]:
                screen.as_json = False  # its document is out already
                raise DeclinedError(
                    f"{len(tainted)} of {len(found)} models carry contributions signed by {signer}: fuse without them, "
                    "or go on from a model that carries none",
                    [f"{item.place}: {stage.in_words(item)}" for item in tainted],
                )
            screen.say(f"none of {len(found)} models carries a contribution signed by {signer}")
            return
        if len(models) > 1:
            raise ConfigError("the lineage of one MODEL is shown at a time: give one, or --signer to search several")
        generations = stage.lineage(model_ref.resolve(models[0]))
        screen.show(lineage_tree(generations))
        screen.result({"lineage": generations})


@app.command(epilog="Example: coldctl status runs/demo")
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory.")],
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Only print where iteration 1 starts, for scripts.")
    ] = False,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Only print where the base model's evaluation is.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    _seed: NoSeed = None,
    _jobs: NoJobs = 0,
    _engine: NoEngine = "local",
    _config: NoConfig = None,
    _overwrite: NoOverwrite = False,
) -> None:
    """Show a run's iterations: what is complete, missing, running."""
    with _boundary(as_json=as_json, quiet=quiet) as screen:
        from coldctl.commands import status as stage
        from coldctl.console import status_table

        found = stage.status(locate(run))
        if evaluation and found.evaluation is None:
            raise ConfigError(f"{run} has no evaluation of a promoted model yet: run `make iterate` first")
        if (pretrained or evaluation) and not as_json:
            sys.stdout.write(f"{found.pretrained if pretrained else found.evaluation}\n")
            return
        screen.show(status_table(found))
        if found.waiting:
            screen.say(f"late, waiting for the next fuse: {', '.join(found.waiting)}")
        screen.result(found)


@app.command(epilog="Example: coldctl plan runs/demo --config configs/demo.toml --iterations 2")
def plan(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, made if it is missing.")],
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE.toml", help="[run] names the base; the suite, the settings.")
    ],
    iterations: Annotated[int, typer.Option(min=0, help="New iterations; an unmet target is finished first.")] = 1,
    target: Annotated[int | None, typer.Option(min=0, help="Iterations in all, in place of --iterations.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=0, help="Contributors per iteration, drawn by seed; 0: all.")
    ] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Promote a fused model only if it is no regression.")] = False,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
    _jobs: NoJobs = 0,
    _engine: NoEngine = "local",
    _overwrite: NoOverwrite = False,
) -> None:
    """Start or extend a run, and print the numbers of the iterations still to be made."""
    with _boundary(as_json=as_json, quiet=quiet) as screen:
        from coldctl.commands import plan as stage

        file = read(config)
        settings = resolve(RunConfig, file, {"sample": sample})
        with screen.progress() as progress:
            numbers = stage.plan(
                locate(run),
                file,
                settings,
                iterations=iterations,
                seed=seed or 0,
                gate=gate,
                target=target,
                progress=progress,
            )
        if as_json:
            screen.result({"run": str(run), "iterations": numbers})
        else:
            sys.stdout.write("".join(f"{number:03d}\n" for number in numbers))


@app.command(epilog="Example: coldctl promote runs/demo")
def promote(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory.")],
    as_json: Json = False,
    quiet: Quiet = False,
    _seed: NoSeed = None,
    _jobs: NoJobs = 0,
    _engine: NoEngine = "local",
    _config: NoConfig = None,
    _overwrite: NoOverwrite = False,
) -> None:
    """Decide about the newest fused model of a run: it becomes the base, unless the gate says no."""
    with _boundary(as_json=as_json, quiet=quiet) as screen:
        from coldctl.commands import plan as stage

        folder = locate(run)
        decision = stage.promote(folder)
        where = layout.fused(folder, decision.number)
        if decision.promoted:
            screen.say(f"iteration {decision.number} is promoted: the next base model is {where}")
        else:
            screen.say(f"iteration {decision.number} is not promoted, the base model stays: {decision.reason}")
        screen.result(decision)


@app.command(epilog="Example: coldctl watch runs/demo --min-contributions 3 --every 10m --suite configs/demo.toml")
def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, made by `coldctl plan`.")],
    min_contributions: Annotated[
        int | None, typer.Option("--min-contributions", min=1, metavar="N", help="Usable ones that an iteration needs.")
    ] = None,
    every: Annotated[str, typer.Option("--every", metavar="TIME", help="How often to look: 30s, 10m, 2h.")] = "10m",
    suite: Annotated[
        Path | None, typer.Option("--suite", metavar="FILE.toml", help="The datasets to measure on, and the settings.")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option("--iterations", min=1, metavar="K", help="End after K more. [dim]default: go on[/]")
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Look one time, do what can be done, and end: for cron.")
    ] = False,
    config: Config = None,
    seed: Seed = None,
    jobs: Jobs = 0,
    threads: Threads = None,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    as_json: Json = False,
    quiet: Quiet = False,
    _overwrite: NoOverwrite = False,
) -> None:
    """Fuse whenever enough contributions have come to a run, evaluate, promote, and wait for the next ones."""
    with _boundary(as_json=as_json, quiet=quiet) as screen:
        from coldctl.commands import watch as watching
        from coldctl.workers import choose

        datasets, file = _suite(suite, config)
        # Strangers may write to what is watched: unless the file says otherwise, what is bad is dropped and stops nobody.
        screening = None if "screen" in file.sections.get("fuse", {}) else "reject"
        fusing = resolve(FuseConfig, file, {"min_contributions": min_contributions, "screen": screening, "seed": seed})
        if not fusing.min_contributions:
            raise ConfigError("how many contributions does an iteration need? Give --min-contributions N")
        settings = watching.Settings(
            fusing,
            resolve(EvaluateConfig, file, {"seed": seed}),
            resolve(FinetuneConfig, file, {"seed": seed}),
            datasets or file.datasets,
            choose(engine, jobs=jobs, threads=threads, ray_address=ray_address),
        )
        with screen.progress() as progress, closing(settings.engine):
            looks = watching.watch(
                locate(run),
                settings,
                every=seconds_in(every),
                iterations=iterations,
                once=once,
                progress=progress,
                announce=lambda look: _announce(screen, look, fusing.min_contributions),
            )
        screen.result({"run": run, "looks": looks})


def _announce(screen: "Screen", look: Any, least: int) -> None:
    """One look of `watch` in words, and in tables where there is something to show."""
    from coldctl.console import evaluation_tables, fuse_table

    if look.state == "waiting":
        screen.say(f"iteration {look.iteration}: {look.usable} of {least} contributions have come, waiting")
    elif look.state != "decided":
        screen.say(f"iteration {look.iteration}: {look.reason}; waiting")
    else:
        screen.show(fuse_table(look.fused["contributions"]), *(evaluation_tables(look.results) if look.results else ()))
        promoted = "promoted" if look.promoted else f"not promoted, the base model stays: {look.reason}"
        screen.say(f"iteration {look.iteration} is fused and {promoted}")
