"""What fusing costs: `coldctl fuse` beside the disk's limit, mergekit's `linear` and loading everything into memory.

Run as

    .venv/bin/python benchmarks/fuse.py [--mergekit .venv-peers/bin/python] [--quick] [--runs 5]

It makes 8 float32 checkpoints of roberta-base size (random weights in roberta-base's tensor layout, about 4 GB in all,
and 2 GB of small ones), runs every tool on them as a whole process with a warm page cache, one after another in each
round, and prints one Markdown block: medians, ratios, how time and memory grow with the number of contributions. It
asserts nothing about time. `--scratch DIR` keeps the checkpoints for the next run; the directory must be on a disk.

This process imports the standard library only: a child's peak memory as the kernel counts it starts from its parent's.
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PIECE = 4 << 20  # bytes read or written at once by the limit
WEIGHTS = "model.safetensors"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Size:
    """How big a checkpoint is, in RobertaConfig's terms."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Plan:
    """How much is made and measured."""

    large: Size
    small: Size
    many: int  # large contributions, hard links of the eight
    most: int  # small contributions


LARGE = Size(vocab_size=50265, hidden_size=768, layers=12, heads=12)
SMALL = Size(vocab_size=4096, hidden_size=128, layers=2, heads=2)
FULL = Plan(large=LARGE, small=SMALL, many=64, most=512)
QUICK = Plan(large=dataclasses.replace(LARGE, vocab_size=8000, layers=2), small=SMALL, many=64, most=128)
COUNT = 8


@dataclass(frozen=True)
class Sample:
    """One process: seconds on the wall, seconds of processor time, peak resident bytes."""

    wall: float
    cpu: float
    resident: int


@dataclass(frozen=True)
class Contender:
    """A command to measure. `{output}` in it is replaced by a path that does not exist yet."""

    name: str
    command: tuple[str, ...]
    cold: bool = False  # drop the inputs from the page cache first


# ------------------------------------------------------------------------------------------ steps, each its own process


def make_checkpoints(folder: Path, large: Size, small: Size, most: int) -> None:
    """Write two bases and their contributions; `signed` and `small-signed` hold them with manifests."""
    make_family(folder / "base", folder / "contributions", large, COUNT)
    make_family(folder / "small-base", folder / "small", small, most)
    sign(folder / "base", folder / "contributions", folder / "signed")
    sign(folder / "small-base", folder / "small", folder / "small-signed")


def make_family(base: Path, contributions: Path, size: Size, count: int) -> None:
    """Write a bare encoder and `count` classifiers that are that encoder plus small noise."""
    import torch
    from safetensors.torch import save_file
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden_size,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        num_labels=2,
    )
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config).eval()
    model.roberta.save_pretrained(base)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    config.architectures = ["RobertaForSequenceClassification"]
    for number in range(count):
        folder = contributions / f"contribution-{number:03d}"
        folder.mkdir(parents=True)
        noisy = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        save_file(noisy, folder / WEIGHTS, {"format": "pt"})
        config.save_pretrained(folder)


def sign(base: Path, contributions: Path, target: Path) -> None:
    """Link the contributions into `target` and give each a manifest that names its files' and its body's digests."""
    from coldctl.artifacts import manifest
    from coldctl.checkpoints.checkpoint import open_checkpoint
    from coldctl.checkpoints.digests import body_digest, outside_body
    from coldctl.storage.local import LocalFolder

    base_digest = body_digest(open_checkpoint(LocalFolder(base), base.name))
    for number, source in enumerate(sorted(contributions.iterdir())):
        folder = linked(source, target / source.name)
        checkpoint = open_checkpoint(LocalFolder(folder), folder.name)
        manifest.write(
            folder,
            {
                "kind": "contribution",
                "name": folder.name,
                "iteration": 1,
                "encoding": "full",
                "body_digest": body_digest(checkpoint),
                "outside_body": outside_body(checkpoint),
                "base": {"name": base.name, "body_digest": base_digest},
                "config": {},
                "dataset": {"name": folder.name, "num_train": 1000 + number, "num_validation": 100},
            },
        )


def linked(source: Path, target: Path) -> Path:
    """A directory of hard links to the files of another one."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).hardlink_to(path)
    return target


def touch_the_limit(output: str, inputs: Sequence[str], *, sync: bool) -> None:
    """Read all inputs into one reused buffer and write as many bytes as the first one has."""
    buffer = bytearray(os.urandom(PIECE))
    for path in inputs:
        file = os.open(path, os.O_RDONLY)
        while os.readv(file, [buffer]):
            pass
        os.close(file)
    if output == os.devnull:
        return
    left = Path(inputs[0]).stat().st_size
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    view = memoryview(buffer)
    while left:
        left -= os.write(file, view[: min(left, PIECE)])
    if sync:
        os.fsync(file)
    os.close(file)


def average(output: str, inputs: Sequence[str]) -> None:
    """What people write by hand: load all, stack, take the mean, save."""
    import torch
    from safetensors.torch import load_file, save_file

    loaded = [load_file(path) for path in inputs]
    means = {name: torch.stack([tensors[name] for tensors in loaded]).mean(0) for name in loaded[0]}
    save_file(means, output, {"format": "pt"})


def compare(left: str, right: str) -> None:
    """Print the largest difference between two merged bodies, whatever their prefix."""
    from safetensors import safe_open

    with safe_open(left, framework="numpy") as one, safe_open(right, framework="numpy") as other:
        prefix = "roberta." if any(name.startswith("roberta.") for name in other.keys()) else ""  # noqa: SIM118
        names = list(one.keys())
        print(max(float(abs(one.get_tensor(name) - other.get_tensor(prefix + name)).max()) for name in names))


def run_step(name: str, arguments: Sequence[str]) -> None:
    """Do one of the above in this process."""
    if name == "make":
        sizes = json.loads(arguments[1])
        make_checkpoints(Path(arguments[0]), Size(**sizes["large"]), Size(**sizes["small"]), sizes["most"])
    elif name == "limit":
        touch_the_limit(arguments[1], arguments[2:], sync=arguments[0] == "fsync")
    elif name == "average":
        average(arguments[0], arguments[1:])
    else:
        compare(*arguments)


# --------------------------------------------------------------------------------------------------------- measuring


def step(name: str, *arguments: object) -> tuple[str, ...]:
    """The command that does a step in a process of its own."""
    return (sys.executable, str(Path(__file__).resolve()), "--step", name, *(str(argument) for argument in arguments))


def measure(command: Sequence[str]) -> Sample:
    """Run a command to its end. Exits with what it printed if it fails."""
    import time

    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, **OFFLINE})
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            text = errors.read().decode(errors="replace")
            sys.exit(f"error: this ended with {process.returncode}:\n{shlex.join(command)}\n{text}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def rounds(
    contenders: Sequence[Contender],
    runs: int,
    scratch: Path,
    inputs: Sequence[Path],
    look: Callable[[Mapping[str, Path]], None] | None = None,
) -> dict[str, list[Sample]]:
    """Measure all contenders in turn, `runs` times over; `look` sees the first round's outputs by contender."""
    samples: dict[str, list[Sample]] = {item.name: [] for item in contenders}
    for number in range(runs):
        outputs: dict[str, Path] = {}
        for item in contenders:
            output = scratch / f"output-{len(outputs)}"
            outputs[item.name] = output
            os.sync()  # what others have written is not this one's to wait for
            (drop_from_cache if item.cold else read_once)(inputs)
            say(f"run {number + 1} of {runs}: {item.name}")
            sample = measure([part.replace("{output}", str(output)) for part in item.command])
            say(f"    {sample.wall:.2f} s, {sample.cpu:.2f} s of processor, {sample.resident / 1e6:.0f} MB")
            samples[item.name].append(sample)
            if number or look is None:
                remove(output)
        if number == 0 and look is not None:
            look(outputs)
            for output in outputs.values():
                remove(output)
    return samples


def read_once(paths: Iterable[Path]) -> None:
    """Have these files in the page cache."""
    buffer = bytearray(PIECE)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Have these files out of the page cache, where the system allows it."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def say(text: str) -> None:
    """Tell on stderr how far it is."""
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------- the report


def median(samples: Iterable[Sample], field: str) -> float:
    """The median of one of Sample's fields."""
    return float(statistics.median(getattr(sample, field) for sample in samples))


def row(*cells: object) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(title: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    return [row(*title), row("---", *("---:" for _ in title[1:])), *(row(*line) for line in lines), ""]


def described(samples: Mapping[str, list[Sample]]) -> list[str]:
    """Wall and processor seconds and peak memory of each contender."""
    return table(
        ["whole process", "wall, s", "slowest to fastest", "processor, s", "cores used", "peak resident, MB"],
        [
            (
                name,
                f"{median(taken, 'wall'):.2f}",
                f"{max(item.wall for item in taken):.2f}–{min(item.wall for item in taken):.2f}",
                f"{median(taken, 'cpu'):.2f}",
                f"{median(taken, 'cpu') / median(taken, 'wall'):.1f}",
                f"{median(taken, 'resident') / 1e6:.0f}",
            )
            for name, taken in samples.items()
        ],
    )


def ratios(samples: Mapping[str, list[Sample]], pairs: Iterable[tuple[str, str, str]]) -> list[str]:
    """Ratios of median wall times, for the pairs of contenders that were measured."""
    return table(
        ["ratio of medians", "measured", "aim"],
        [
            (f"{above} / {below}", f"{median(samples[above], 'wall') / median(samples[below], 'wall'):.2f}", aim)
            for above, below, aim in pairs
            if above in samples and below in samples
        ],
    )


def machine(mergekit: Path | None) -> list[str]:
    """What it was measured on and with."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ["numpy", "ml_dtypes", "safetensors", "torch", "coldctl"]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    lines = [
        f"- {os.cpu_count()} cores ({processor}), {memory:.0f} GiB, {platform.system()}",
        f"- Python {platform.python_version()}, {versions}",
    ]
    if mergekit is not None:
        code = 'from importlib.metadata import version as v; print(f\'{v("mergekit")}, with torch {v("torch")}\')'
        answer = subprocess.run([mergekit, "-c", code], check=True, capture_output=True, text=True)
        lines.append(f"- mergekit {answer.stdout.strip()}")
    return lines


# ------------------------------------------------------------------------------------------------------- what is run

READ = "read the inputs"
LIMIT = "limit: read the inputs, write the output's bytes"
SYNCED = "limit, with fsync"
BARE = "coldctl fuse --no-verify --screen off"
WHOLE = "coldctl fuse"
PLAIN_BARE = "coldctl fuse --no-verify --screen off, inputs without manifests"
PLAIN = "coldctl fuse, inputs without manifests"
MERGEKIT = "mergekit linear"
NAIVE = "load all and average"
CHECK = "coldctl check"
START = "coldctl fuse --help"

RATIOS = (
    (BARE, SYNCED, "at most 1.5"),
    (BARE, LIMIT, ""),
    (WHOLE, SYNCED, "at most 3"),
    (WHOLE, LIMIT, ""),
    (PLAIN, SYNCED, ""),
    (MERGEKIT, BARE, "at least 10"),
    (MERGEKIT, WHOLE, ""),
    (MERGEKIT, PLAIN, ""),
    (NAIVE, BARE, "at least 4"),
    (NAIVE, WHOLE, ""),
    (NAIVE, PLAIN, ""),
)


def fuse_command(contributions: Path, base: Path, *options: str) -> tuple[str, ...]:
    """The `coldctl fuse` of this environment."""
    program = str(Path(sys.executable).parent / "coldctl")
    where = ("--base", str(base), "--output", "{output}", "--quiet")
    return (program, "fuse", str(contributions), *where, *options)


def weights_below(folder: Path) -> list[Path]:
    """The weight files of the checkpoints in a folder."""
    return sorted(folder.glob(f"*/{WEIGHTS}"))


def main_contenders(scratch: Path, mergekit: Path | None) -> list[Contender]:
    """Everything that is compared on the eight large checkpoints."""
    base, plain, signed = scratch / "base", scratch / "contributions", scratch / "signed"
    inputs = weights_below(plain)
    found = [
        Contender(READ, step("limit", "no", os.devnull, *inputs)),
        Contender(LIMIT, step("limit", "no", "{output}", *inputs)),
        Contender(SYNCED, step("limit", "fsync", "{output}", *inputs)),
        Contender(BARE, fuse_command(signed, base, "--no-verify", "--screen", "off")),
        Contender(WHOLE, fuse_command(signed, base)),
        Contender(PLAIN_BARE, fuse_command(plain, base, "--no-verify", "--screen", "off")),
        Contender(PLAIN, fuse_command(plain, base)),
        Contender(NAIVE, step("average", "{output}", *inputs)),
    ]
    if mergekit is not None:
        models = [{"model": str(path.parent), "parameters": {"weight": 1.0}} for path in inputs]
        config = scratch / "linear.yml"  # JSON is YAML
        config.write_text(json.dumps({"merge_method": "linear", "dtype": "float32", "models": models}))
        program = str(mergekit.parent / "mergekit-yaml")
        options = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")
        found.append(Contender(MERGEKIT, (program, str(config), "{output}", *options)))
    return found


def compare_outputs(outputs: Mapping[str, Path], lines: list[str]) -> None:
    """Add to `lines` how far the others' results are from ours, to show that all did the same work."""
    ours = outputs[BARE] / WEIGHTS
    for name in (WHOLE, PLAIN, NAIVE, MERGEKIT):
        if name not in outputs:
            continue
        found = [outputs[name]] if outputs[name].is_file() else sorted(outputs[name].glob("*.safetensors"))
        if len(found) != 1:
            sys.exit(f"error: {name} wrote {len(found)} weight files, where one was expected")
        answer = subprocess.run(step("compare", ours, found[0]), check=True, capture_output=True, text=True)
        lines.append(f"- largest difference between {BARE} and {name}: {float(answer.stdout):.1e}")


def scaling(scratch: Path, plan: Plan, runs: int) -> list[str]:
    """How time and memory grow with the number of contributions, all of them with manifests."""
    many = scratch / "many"
    remove(many)
    sources = sorted((scratch / "signed").iterdir())
    for number in range(plan.many):
        linked(sources[number % COUNT], many / f"contribution-{number:03d}")
    lines = []
    for kind, folder, base in (
        ("large", scratch / "signed", scratch / "base"),
        ("large", many, scratch / "base"),
        ("small", scratch / "small-signed", scratch / "small-base"),
    ):
        inputs = weights_below(folder)
        size = sum(path.stat().st_size for path in inputs) / 1e9
        bare = f"{len(inputs)} {kind}, --no-verify --screen off"
        whole = f"{len(inputs)} {kind}"
        pair = [
            Contender(bare, fuse_command(folder, base, "--no-verify", "--screen", "off")),
            Contender(whole, fuse_command(folder, base)),
        ]
        for name, taken in rounds(pair, runs, scratch, inputs[:COUNT] if folder == many else inputs).items():
            wall = median(taken, "wall")
            resident = median(taken, "resident") / 1e6
            lines.append((name, f"{size:.2f}", f"{wall:.2f}", f"{wall / size:.2f}", f"{resident:.0f}"))
    remove(many)
    return table(["contributions", "GB read", "wall, s", "s per GB", "peak resident, MB"], lines)


def report(scratch: Path, plan: Plan, options: argparse.Namespace) -> str:
    """Measure everything and describe it in Markdown."""
    base, plain = scratch / "base", scratch / "contributions"
    inputs = weights_below(plain)
    size = inputs[0].stat().st_size
    fewer = min(options.runs, 3)
    agreement: list[str] = []
    contenders = main_contenders(scratch, options.mergekit)
    samples = rounds(
        contenders,
        options.runs,
        scratch,
        inputs,
        look=lambda outputs: compare_outputs(outputs, agreement),
    )
    program = str(Path(sys.executable).parent / "coldctl")
    quick = [
        Contender(CHECK, (program, "check", str(plain), "--base", str(base), "--quiet")),
        Contender(START, (program, "fuse", "--help")),
    ]
    checked = rounds(quick, options.runs, scratch, inputs)
    cold: list[str] = []
    if hasattr(os, "posix_fadvise"):
        names = (READ, SYNCED, BARE, WHOLE)
        colder = [dataclasses.replace(item, cold=True) for item in contenders if item.name in names]
        cold = ["Cold page cache:", "", *described(rounds(colder, fewer, scratch, inputs))]
    grown = scaling(scratch, plan, fewer)
    return "\n".join(
        [
            f"`{shlex.join(['python', 'benchmarks/fuse.py', *sys.argv[1:]])}`",
            "",
            *machine(options.mergekit),
            f"- {COUNT} float32 checkpoints of {size / 1e6:.0f} MB each, page cache warm, median of {options.runs}"
            f" (of {fewer} where the cache is cold and where the number of contributions grows)",
            *agreement,
            "",
            *described(samples),
            *ratios(samples, RATIOS),
            *described(checked),
            *cold,
            *grown,
            "Processor time and memory are as the kernel counts them for the process; mapped files count as resident.",
            "",
        ]
    )


def prepare(scratch: Path, plan: Plan) -> None:
    """Make the checkpoints, unless this directory has them from an earlier run of the same plan."""
    done = scratch / "complete.json"
    wanted = json.dumps(dataclasses.asdict(plan), sort_keys=True)
    if done.is_file() and done.read_text() == wanted:
        return
    if done.is_file() or (scratch.is_dir() and any(scratch.iterdir())):
        sys.exit(f"error: {scratch} holds something else: name an empty or new directory")
    scratch.mkdir(parents=True, exist_ok=True)
    say("making the checkpoints")
    measure(step("make", scratch, wanted))
    done.write_text(wanted)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON", help="the python of an environment with mergekit")
    parser.add_argument("--runs", type=int, default=5, help="how often everything is measured; default: 5")
    parser.add_argument("--quick", action="store_true", help="small checkpoints, to see that it works")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the checkpoints are made and kept")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the Markdown here as well")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    if options.mergekit is not None and not (options.mergekit.parent / "mergekit-yaml").is_file():
        parser.error(f"there is no mergekit-yaml beside {options.mergekit}")
    return options


def main(arguments: Sequence[str]) -> None:
    """Prepare, measure, report."""
    if arguments and arguments[0] == "--step":
        run_step(arguments[1], arguments[2:])
        return
    options = parse(arguments)
    plan: Any = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="coldctl-bench-") as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        prepare(scratch, plan)
        text = report(scratch, plan, options)
    print(text)
    if options.report is not None:
        options.report.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
