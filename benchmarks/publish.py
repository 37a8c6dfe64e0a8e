"""What publishing costs: `coldctl publish` of a roberta-base-sized model beside copying its files and hashing them.

    .venv/bin/python benchmarks/publish.py [--runs 5] [--scratch DIR]

By turns, each a process of its own: every file of the model copied and its copy's sha256 taken, once leaving the bytes to the
page cache and once with an fsync per file, as coldctl does it; and `coldctl publish` to a directory. What the command says it
spent on loading the result and comparing features (imports of torch and transformers included) is reported apart. Inputs are in
the page cache. It prints Markdown and asserts nothing about time.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

PIECE = 8 << 20


def main() -> None:
    """Run the benchmark, or one copy in a process of its own."""
    if sys.argv[1:2] == ["copy"]:
        copy(Path(sys.argv[2]), Path(sys.argv[3]), sync=sys.argv[4] == "sync")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to work (3 GB)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.scratch) as name:
        print(report(Path(name), options.runs))


def report(scratch: Path, runs: int) -> str:
    """Measure by turns, and say it in Markdown."""
    model = make_model(scratch)
    size = sum(path.stat().st_size for path in model.iterdir())
    found: dict[str, list[float]] = {key: [] for key in ("copy", "synced", "publish", "work", "loading")}
    for _ in range(runs):
        for key, mode in (("copy", "cached"), ("synced", "sync")):
            found[key].append(timed(sys.executable, __file__, "copy", model, scratch / "out", mode)[0])
            shutil.rmtree(scratch / "out")
        seconds, said = timed(
            sys.executable,
            "-m",
            "coldctl",
            "publish",
            model,
            "--to",
            scratch / "out",
            "--license",
            "mit",
            "--json",
            "--quiet",
        )
        spent = json.loads(said)["seconds"]
        found["loading"].append(spent["loading"])
        found["work"].append(spent["copy"])
        found["publish"].append(seconds - found["loading"][-1])
        shutil.rmtree(scratch / "out")
    medians = {key: statistics.median(values) for key, values in found.items()}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("coldctl", "torch", "transformers"))
    lines = [
        f"- {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}",
        f"- {size / 1e6:.0f} MB in {len(list(model.iterdir()))} files; whole processes, medians of {runs}",
        "",
        "| | seconds (least … most) |",
        "| --- | --: |",
    ]
    titles = {
        "copy": "copy the files and hash them",
        "synced": "copy the files, fsync and hash them",
        "publish": "`coldctl publish`, without its check by loading",
        "work": "of that reading, proving, writing, hashing and syncing the files",
        "loading": "its check by loading, imports included",
    }
    lines += [
        f"| {title} | {medians[key]:.2f} ({min(found[key]):.2f} … {max(found[key]):.2f}) |"
        for key, title in titles.items()
    ]
    lines += ["", "| claim | measured | aim |", "| --- | --: | --: |"]
    lines.append(f"| publish / copy and hash | {medians['publish'] / medians['copy']:.2f} × | at most 2 × |")
    lines.append(f"| its work on the files / copy, fsync and hash | {medians['work'] / medians['synced']:.2f} × | |")
    lines.append(f"| publish / copy, fsync and hash | {medians['publish'] / medians['synced']:.2f} × | |")
    return "\n".join(lines)


def make_model(scratch: Path) -> Path:
    """A fused model of roberta-base's architecture and size, random weights, through `coldctl fuse`."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    import transformers

    from helpers.tiny import make_tokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    )
    model = transformers.RobertaModel(config)
    for name in ("base", "contributions/one"):
        model.save_pretrained(scratch / name)
        make_tokenizer("roberta", scratch / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
    fuse = ("fuse", scratch / "contributions", "--base", scratch / "base", "--output", scratch / "fused", "--quiet")
    timed(sys.executable, "-m", "coldctl", *fuse)
    return scratch / "fused"


def copy(source: Path, target: Path, *, sync: bool) -> None:
    """Copy every file and take the sha256 of every copy."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb", buffering=0) as file:
            if sync:
                os.fsync(file.fileno())
            hashlib.file_digest(file, "sha256")


def timed(*command: object) -> tuple[float, str]:
    """Seconds of a whole process, and what it printed."""
    started = time.perf_counter()
    ran = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return time.perf_counter() - started, ran.stdout


if __name__ == "__main__":
    main()
