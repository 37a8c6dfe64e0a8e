"""What finetuning costs: `coldctl finetune` beside the transformers `Trainer`, tuned and as it comes.

    .venv/bin/python benchmarks/finetune.py [--base assets/demo/base] [--data assets/demo/movies] [--seeds 5]

Every contestant trains the same classifier on the same examples with the same batch size, learning rate and number of
steps, both cores, one validation at the end of each epoch, each in a process of its own, one after another in each
round (a round is a seed). It prints Markdown: examples per second of the whole training phase (validations included),
test accuracy, the share of the machine's matrix-multiply rate that the model's floating-point operations reach, the time
from the start of the command to its first step, memory, and a suite of small datasets. It asserts nothing about time.
"""

import argparse
import importlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CONTESTANTS = {
    "coldctl": "coldctl's loop",
    "grouped": "Trainer, batches grouped by length",
    "dynamic": "Trainer, dynamic padding",
    "example": "Trainer, padded to 128 (the example scripts' default)",
    "plain": "coldctl's loop without its shortcuts",
}
AIMS = {"grouped": 1.15, "dynamic": 1.7, "example": 4.0}
LABELS = ("negative", "neutral", "positive")
BATCH, RATE, EPOCHS, LENGTH = 32, 5e-5, 1, 128


def main() -> None:
    """Run what is asked for and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("assets/demo/base"))
    parser.add_argument("--data", type=Path, default=Path("assets/demo/movies"), help="train, validation, test .jsonl")
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--validation", type=int, default=160)
    parser.add_argument("--test", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of the suites")
    parser.add_argument("--only", default="", help="sections: throughput,start,memory,suite")
    parser.add_argument("--contestant", choices=[*CONTESTANTS, "suite"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--measure-memory", choices=["needed", "grown"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant == "suite":
        print(json.dumps(trainer_suite(options.data, options.base)))
        return
    if options.contestant:
        print(json.dumps(contest(options)))
        return
    sections = options.only.split(",") if options.only else ["throughput", "start", "memory", "suite"]
    print(machine())
    for section in sections:
        {"throughput": throughput, "start": start, "memory": memory, "suite": suite}[section](options)


def machine() -> str:
    """What was measured where."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("coldctl", "torch", "transformers"))
    return f"\n- {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}"


# Throughput ---------------------------------------------------------------------------------------------------


def throughput(options: argparse.Namespace) -> None:
    """Examples per second and accuracy of every contestant, over seeds."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for seed in range(options.seeds):
        for name in CONTESTANTS:
            found[name].append(child(options, name, seed))
    print(
        f"- {options.examples} training examples of {options.data.name}, {EPOCHS} epoch, batch {BATCH}, learning rate {RATE}, "
        f"at most {LENGTH} tokens; {options.validation} validation examples once; {options.seeds} seeds, medians\n"
    )
    print(
        "| training | examples/s | slowest to fastest | coldctl is | aim | test accuracy | share of the matmul rate |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: |")
    ours = statistics.median(run["rate"] for run in found["coldctl"])
    for name, words in CONTESTANTS.items():
        runs = found[name]
        rates = sorted(run["rate"] for run in runs)
        median = statistics.median(rates)
        accuracies = [run["accuracy"] for run in runs]
        ratio = "" if name == "coldctl" else f"{ours / median:.2f} ×"
        deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        share = statistics.median(run["flops"] / run["seconds"] / run["matmul"] for run in runs)
        aim = f"{AIMS[name]} ×" if name in AIMS else ""
        print(
            f"| {words} | {median:.1f} | {rates[0]:.1f}–{rates[-1]:.1f} | {ratio} | {aim} "
            f"| {statistics.mean(accuracies):.1f} ± {deviation:.1f} | {100 * share:.0f} % |"
        )
    rate = statistics.median(run["matmul"] for runs in found.values() for run in runs)
    executed = [run["executed"] / run["seconds"] / run["matmul"] for run in found["coldctl"]]
    print(
        f"\nMatrix multiplications alone, float32, in the model's shapes: {rate / 1e9:.0f} GFLOP/s. The share counts the "
        "operations of the unabridged model on each contestant's own padded batches, validation included; counting only "
        f"what it really computed, coldctl's is {100 * statistics.median(executed):.0f} %."
    )


def child(options: argparse.Namespace, name: str, seed: int, *more: str) -> dict[str, float]:
    """One contestant in a process of its own."""
    line = [sys.executable, __file__, "--contestant", name, "--seed", str(seed), "--base", str(options.base)]
    line += ["--data", str(options.data), "--examples", str(options.examples), "--validation", str(options.validation)]
    line += ["--test", str(options.test)]
    ran = subprocess.run([*line, *more], stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **OFFLINE})
    result: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return result


def contest(options: argparse.Namespace) -> dict[str, float]:
    """Train once: seconds, accuracy, floating-point operations, the machine's matmul rate, peak memory."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    splits = {split: read(options.data / f"{split}.jsonl") for split in ("train", "validation", "test")}
    splits["train"] = splits["train"][: options.examples]
    splits["validation"] = splits["validation"][: options.validation]
    splits["test"] = splits["test"][: options.test]
    work = ours if options.contestant in ("coldctl", "plain") else trainer
    result: dict[str, float] = work(options, splits)
    if not options.measure_memory:
        result["matmul"] = matmul_rate(options.base)
    result["rate"] = EPOCHS * len(splits["train"]) / result["seconds"]
    return result


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file, labels as indices."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = sorted({str(row["label"]) for row in rows})
    return [{"text": row["text"], "label": names.index(str(row["label"]))} for row in rows]


def ours(options: argparse.Namespace, splits: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The loop of `coldctl finetune`."""
    import numpy as np
    import torch

    from coldctl.common.progress import SILENT
    from coldctl.config.settings import FinetuneConfig
    from coldctl.training import model as models
    from coldctl.training.batches import Examples, collate, length_batches, sorted_batches
    from coldctl.training.loop import Task, TrainingContext, predict, train

    kind = json.loads((options.base / "config.json").read_text())["model_type"].replace("-", "_")
    importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    before = resident()
    tokenizer = models.load_tokenizer(options.base)
    model = models.load_classifier(options.base, LABELS, options.seed)
    training, validation, test = (
        Examples(
            models.encode(tokenizer, [row["text"] for row in rows], None, LENGTH),
            np.array([row["label"] for row in rows]),
        )
        for rows in splits.values()
    )
    config = FinetuneConfig(epochs=EPOCHS, batch_size=BATCH, learning_rate=RATE, validate_every=10**9)
    task = Task(model, training, validation, lambda found: 100 * float(np.mean(found == validation.labels)))
    with tempfile.TemporaryDirectory() as scratch:
        context = TrainingContext(
            torch.device("cpu"), tokenizer.pad_token_id, Path(scratch), SILENT, "x",
            shortcuts=options.contestant == "coldctl",
        )  # fmt: skip
        if options.measure_memory == "needed":
            batch = length_batches(training.encoded.lengths, BATCH, options.seed, 0)
            longest = max(batch, key=lambda part: int(training.encoded.lengths[part].max()))
            inputs = collate(training.encoded, longest, context.padding, context.device)
            return {"needed": memory_needed(model, inputs), "seconds": 1.0}
        started = time.perf_counter()
        train([task], config, context, seed=options.seed)
        seconds = time.perf_counter() - started
        if options.measure_memory:
            return {"grown": resource_peak() - before, "seconds": seconds}
    accuracy = 100 * float(np.mean(predict(model, test.encoded, context) == test.labels))
    shapes = [
        (len(batch), int(part.encoded.lengths[batch].max()), factor)
        for part, batches, factor in (
            (training, length_batches(training.encoded.lengths, BATCH, options.seed, 0), 3 * EPOCHS),
            (validation, sorted_batches(validation.encoded.lengths, 32), EPOCHS),
        )
        for batch in batches
    ]
    executed = sum(operations(model, *shape, whole=options.contestant != "coldctl") for shape in shapes)
    return {
        "seconds": seconds, "accuracy": accuracy, "executed": executed,
        "flops": sum(operations(model, *shape, whole=True) for shape in shapes),
    }  # fmt: skip


def trainer(options: argparse.Namespace, splits: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The transformers Trainer, with what its user would set for this contestant."""
    import numpy as np
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.base)
    example = options.contestant == "example"
    sets = {name: Rows(tokenizer, rows, padding="max_length" if example else False) for name, rows in splits.items()}
    shapes: list[tuple[int, int, int]] = []
    collator = transformers.default_data_collator if example else transformers.DataCollatorWithPadding(tokenizer)

    def collate(rows: Any) -> Any:
        batch = collator(rows)
        shapes.append((*batch["input_ids"].shape, 3 if recording[0] == "train" else 1))
        return batch

    recording = ["train"]
    transformers.set_seed(options.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(options.base, num_labels=len(LABELS))
    with tempfile.TemporaryDirectory() as scratch:
        more: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if options.contestant == "grouped" else {}
        arguments = transformers.TrainingArguments(
            output_dir=scratch, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=RATE,
            per_device_eval_batch_size=32, weight_decay=0.01, seed=options.seed, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, optim="adamw_torch_fused", dataloader_pin_memory=False, **more,
        )  # fmt: skip
        run = transformers.Trainer(
            model, arguments, train_dataset=sets["train"], eval_dataset=sets["validation"], data_collator=collate,
            processing_class=tokenizer,
        )  # fmt: skip
        started = time.perf_counter()
        run.train()
        recording[0] = "evaluate"
        run.evaluate()
        seconds = time.perf_counter() - started
        measured = list(shapes)
        found = run.predict(sets["test"]).predictions.argmax(-1)
        if getattr(options, "save", False):
            run.save_model(scratch)
    accuracy = 100 * float(np.mean(found == np.array([row["label"] for row in splits["test"]])))
    return {
        "seconds": seconds, "accuracy": accuracy,
        "flops": sum(operations(model, *shape, whole=True) for shape in measured),
        "executed": 0.0,
    }  # fmt: skip


class Rows:
    """Tokenised examples as the Trainer takes them."""

    def __init__(self, tokenizer: Any, rows: Sequence[dict[str, Any]], *, padding: Any) -> None:
        output = tokenizer([row["text"] for row in rows], truncation=True, max_length=LENGTH, padding=padding)
        self._items = [
            {**{key: output[key][index] for key in output}, "labels": row["label"]} for index, row in enumerate(rows)
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items[index]


def operations(model: Any, examples: int, length: int, factor: int, *, whole: bool) -> float:
    """Floating-point operations of the body's matrix products on one batch; `factor` 3 with the backward pass.

    Not `whole`: of the last layer only keys and values of all tokens, and the rest of the first token.
    """
    config = model.config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    token = 2 * (4 * hidden * hidden + 2 * hidden * inner) + 4 * length * hidden
    total = layers * token * length
    if not whole:
        total += -token * length + token + 4 * hidden * hidden * (length - 1)
    return float(factor * examples * total)


def matmul_rate(base: Path) -> float:
    """Floating-point operations per second of float32 products in the model's shapes, on batches of 32 × 32 tokens."""
    import torch

    config = json.loads((base / "config.json").read_text())
    hidden, inner, tokens = config["hidden_size"], config["intermediate_size"], 1024
    pairs = [(hidden, hidden)] * 4 + [(hidden, inner), (inner, hidden)]
    inputs = [(torch.randn(tokens, left), torch.randn(left, right)) for left, right in pairs]
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(20):
            for left, right in inputs:
                torch.mm(left, right)
        count = 20 * sum(2 * tokens * left * right for left, right in pairs)
        rates.append(count / (time.perf_counter() - started))
    return statistics.median(rates[1:])


# Start and memory ---------------------------------------------------------------------------------------------


def start(options: argparse.Namespace) -> None:
    """Seconds from the start of the command to its first finished step, whole process."""
    found = []
    for attempt in range(3):
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "logs" / "x.jsonl"
            line = [sys.executable, "-m", "coldctl", "finetune", options.data, "--base", options.base, "--name", "x",
                    "--output", Path(scratch) / "o", "--batch-size", BATCH, "--max-length", 64, "--seed", attempt,
                    "--max-train-examples", 1000, "--log", "jsonl", "--log-folder", log.parent, "--quiet"]  # fmt: skip
            begun = time.perf_counter()
            process = subprocess.Popen(list(map(str, line)))
            while not (log.exists() and log.stat().st_size) and process.poll() is None:
                time.sleep(0.005)
            found.append(time.perf_counter() - begun)
            process.kill()
            process.wait()
    print(
        f"\nStart of `coldctl finetune` to the end of its first step: {statistics.median(found):.1f} s (aim: at most 6)."
    )


def memory(options: argparse.Namespace) -> None:
    """What a training takes beyond its imports, beside what it must hold."""
    run = {**child(options, "coldctl", 0, "--measure-memory", "needed")}
    run |= child(options, "coldctl", 0, "--measure-memory", "grown")
    print(
        f"\nMemory beyond the imports: {run['grown'] / 1e6:.0f} MB at the peak; weights, gradients, both moments of AdamW "
        f"and the activations of the longest batch: {run['needed'] / 1e6:.0f} MB; "
        f"ratio {run['grown'] / run['needed']:.2f} (aim: at most 1.2)."
    )


def memory_needed(model: Any, batch: dict[str, Any]) -> float:
    """Bytes of weights, gradients, two moments, and what autograd keeps of one batch (each storage once)."""
    import torch

    parameters = sum(value.numel() * value.element_size() for value in model.parameters())
    kept: dict[int, int] = {}
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch)  # kept alive, so that no storage is counted twice under one address
    del output
    return float(4 * parameters + sum(kept.values()))


def resident() -> float:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


def resource_peak() -> float:
    """Bytes of this process that were in memory at the peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


# Suites -------------------------------------------------------------------------------------------------------


def suite(options: argparse.Namespace) -> None:
    """Eight small datasets: `coldctl finetune --suite` beside the tuned Trainer on one after the other in one process."""
    found: dict[str, list[float]] = {"coldctl": [], "trainer": []}
    count, size = 8, 320
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = (options.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
        text = f"[finetune]\nepochs = {EPOCHS}\nbatch_size = {BATCH}\nlearning_rate = {RATE}\nmax_length = {LENGTH}\n"
        for number in range(count):
            part = folder / f"part-{number}"
            part.mkdir()
            (part / "train.jsonl").write_text("\n".join(rows[number * size : (number + 1) * size]), encoding="utf-8")
            for split in ("validation", "test"):
                some = (options.data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:64]
                (part / f"{split}.jsonl").write_text("\n".join(some), encoding="utf-8")
            text += f'[[dataset]]\nname = "part-{number}"\npath = "./part-{number}"\n'
        (folder / "suite.toml").write_text(text)
        for _ in range(options.repeats):
            shutil.rmtree(folder / "out", ignore_errors=True)
            line = [sys.executable, "-m", "coldctl", "finetune", "--suite", folder / "suite.toml", "--base", options.base,
                    "--output", folder / "out", "--quiet"]  # fmt: skip
            for name, command in (
                ("coldctl", line),
                (
                    "trainer",
                    [sys.executable, __file__, "--contestant", "suite", "--base", options.base, "--data", folder],
                ),
            ):
                begun = time.perf_counter()
                subprocess.run(
                    list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env={**os.environ, **OFFLINE}
                )
                found[name].append(count * size * EPOCHS / (time.perf_counter() - begun))
    ours_rate, theirs = (statistics.median(found[name]) for name in ("coldctl", "trainer"))
    print(
        f"\nA suite of {count} datasets of {size} examples, whole process, models saved: `coldctl finetune --suite` "
        f"{ours_rate:.1f} examples/s, the tuned Trainer one after the other in one process {theirs:.1f}: "
        f"{ours_rate / theirs:.2f} × (aim: 1.25)."
    )


def trainer_suite(folder: Path, base: Path) -> dict[str, float]:
    """The tuned Trainer on every part, in this process, each model saved."""
    for part in sorted(folder.glob("part-*")):
        splits = {split: read(part / f"{split}.jsonl") for split in ("train", "validation", "test")}
        trainer(argparse.Namespace(contestant="grouped", base=base, seed=0, save=True), splits)
    return {}


if __name__ == "__main__":
    main()
