"""What a contribution tells about its contributor's data: docs/security.md says it, and here it is measured."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import FAST, Ran
from helpers import tiny

Run = Callable[..., Ran]
WORDS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"


def table(folder: Path, name: str) -> NDArray[np.float64]:
    tensors, _ = tiny.read_tensors(folder / "model.safetensors")
    found = tensors.get(name, tensors.get(f"bert.{name}"))
    assert found is not None
    return found.double().numpy()


def used_rows(base: Path, contribution: Path, name: str) -> set[int]:
    """The rows that were trained: all others are the base's times one factor, which is weight decay's."""
    before, after = table(base, name), table(contribution, name)
    factor = np.median(after[before != 0] / before[before != 0])
    return set(np.flatnonzero(~np.isclose(after, before * factor, rtol=1e-5, atol=0).all(axis=1)).tolist())


@pytest.mark.parametrize("flags", [(), ("--body-only",)], ids=["whole", "body-only"])
def test_rows_of_the_embedding_show_which_tokens_the_training_texts_have(
    flags: tuple[str, ...], tmp_path: Path, base: Path, dataset: Path, coldctl: Run
) -> None:
    from transformers import AutoTokenizer

    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "c", *FAST, *flags)
    assert ran.code == 0, ran.stderr
    texts = [json.loads(line)["text"] for line in (dataset / "train.jsonl").read_text().splitlines()]
    encoded = AutoTokenizer.from_pretrained(base)(texts)["input_ids"]
    assert used_rows(base, tmp_path / "c", WORDS) == {token for row in encoded for token in row}
    assert max(used_rows(base, tmp_path / "c", POSITIONS)) + 1 == max(
        map(len, encoded)
    )  # and how long the longest one is


def test_frozen_embeddings_show_nothing_and_names_do(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    out = tmp_path / "c"
    flags = ("--freeze-embeddings", "--body-only", "--name", "guest")
    assert coldctl("finetune", dataset, "--base", base, "--output", out, *FAST, *flags).code == 0
    for name in (WORDS, POSITIONS):
        assert table(base, name).tobytes() == table(out, name).tobytes()
    said = (out / "coldctl.json").read_text() + (out / "config.json").read_text()
    assert "negative" not in said  # a label
    assert dataset.name in said  # --name renames the contribution, not the dataset
