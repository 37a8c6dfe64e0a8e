"""The steps that people stitch together today, with the transformers `Trainer`: the rival of benchmarks/evaluate.py.

    python benchmarks/stitched.py finetune --base MODEL --data DIR --config configs/demo.toml --output DIR
    python benchmarks/stitched.py probe --base MODEL --data DIR --config configs/demo.toml --output FILE.json

The same examples as coldctl's own commands take under that config; dynamic padding, batches grouped by length, fused AdamW,
a validation per epoch, the best epoch kept.
"""

import argparse
import json
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

PROBE_EPOCHS, PROBE_RATE = 10, 5e-3

Texts = dict[str, tuple[list[str], list[str] | None, list[int]]]


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["finetune", "probe"])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    settings = tomllib.loads(options.config.read_text())["finetune" if options.step == "finetune" else "evaluate"]
    texts, labels = read(options.data, settings)
    length = settings["max_length"]
    if options.step == "probe":
        accuracy, _ = train_head(options.base, texts, labels, length, 0, options.tokenizer)
        options.output.write_text(json.dumps({"accuracy": accuracy}))
        return
    rates = {"epochs": settings["epochs"], "rate": settings["learning_rate"], "batch": settings["batch_size"]}
    trainer, sets = prepared(options.base, texts, labels, length, 0, options.tokenizer, **rates)
    trainer.train()
    trainer.predict(sets["test"])
    trainer.model.base_model.save_pretrained(options.output)  # a merge wants the body
    trainer.processing_class.save_pretrained(options.output)


def read(folder: Path, settings: dict[str, Any]) -> tuple[Texts, int]:
    """The examples that coldctl draws, so that scores can be compared."""
    from coldctl.config.settings import DatasetConfig
    from coldctl.data.datasets import Limits, load_dataset

    limits = Limits(*(settings[f"max_{split}_examples"] for split in ("train", "validation", "test")))
    dataset = load_dataset(DatasetConfig(folder.name, str(folder)), limits, 0)
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    texts: Texts = {name: (list(split.texts), None, split.labels.tolist()) for name, split in splits.items()}
    return texts, len(dataset.labels)


def train_head(
    base: Path, texts: Texts, labels: int, length: int, seed: int, tokenizer: Path | None = None
) -> tuple[float, float]:
    """Train a head on the frozen body: test accuracy in percent, and the seconds it took with validations and test."""
    rates = {"epochs": PROBE_EPOCHS, "rate": PROBE_RATE, "batch": 32}
    trainer, sets = prepared(base, texts, labels, length, seed, tokenizer, **rates)
    for parameter in trainer.model.base_model.parameters():
        parameter.requires_grad = False
    started = time.perf_counter()
    trainer.train()
    metrics = trainer.predict(sets["test"]).metrics
    return 100 * metrics["test_accuracy"], time.perf_counter() - started


def prepared(
    base: Path, texts: Texts, labels: int, length: int, seed: int, tokenizer_of: Path | None, *, epochs: int,
    rate: float, batch: int,
) -> tuple[Any, dict[str, "Rows"]]:  # fmt: skip
    """A Trainer with what its user would set, and the tokenised splits."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_of or base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    sets = {name: Rows(tokenizer, *part, length) for name, part in texts.items()}
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="trainer-"), num_train_epochs=epochs, per_device_train_batch_size=batch,
        per_device_eval_batch_size=32, learning_rate=rate, weight_decay=0.01, seed=seed, eval_strategy="epoch",
        save_strategy="epoch", save_total_limit=1, save_only_model=True, load_best_model_at_end=True,
        metric_for_best_model="accuracy", report_to=[], logging_strategy="no", disable_tqdm=True,
        optim="adamw_torch_fused", dataloader_pin_memory=False, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=sets["train"], eval_dataset=sets["validation"], processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )  # fmt: skip
    return trainer, sets


class Rows:
    """Tokenised examples as the Trainer takes them."""

    def __init__(
        self, tokenizer: Any, texts: list[str], pairs: list[str] | None, labels: list[int], length: int
    ) -> None:
        output = tokenizer(texts, pairs, truncation=True, max_length=length)
        self._items = [
            {**{key: output[key][index] for key in output}, "labels": label} for index, label in enumerate(labels)
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items[index]


if __name__ == "__main__":
    main()
