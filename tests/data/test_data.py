"""Datasets: what is read, how it is cut and counted, and that a large one takes little memory."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldctl.common.errors import DataError
from coldctl.config.settings import DatasetConfig
from coldctl.data.datasets import Dataset, Limits, config_from_reference, load_dataset
from coldctl.data.sampling import stratified
from coldctl.evaluation import probe, scoring
from conftest import Ran
from helpers import tiny

Run = Callable[..., Ran]

TOPICS = ("food", "music", "sport")


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load(path: Path | str, limits: Limits | None = None, seed: int = 3, **settings: Any) -> Dataset:
    return load_dataset(DatasetConfig(settings.pop("name", "some"), str(path), **settings), limits or Limits(), seed)


def topical(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts about none, one or more of three topics, whose words show in them."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        topics = [topic for topic in TOPICS if generator.random() < 0.5]
        words = [str(word) for topic in topics for word in generator.choice(tiny.THEMES[topic], 3)]
        rows.append({"text": " ".join([*words, "the day", str(number)]), "label": topics})
    return rows


def suite(folder: Path, **settings: str) -> Path:
    lines = "".join(f'{key} = "{value}"\n' for key, value in settings.items())
    (folder / "suite.toml").write_text(f'[[dataset]]\nname = "some"\npath = "data"\n{lines}')
    return folder / "suite.toml"


def evaluated(coldctl: Run, model: Path, baseline: Path, folder: Path, **settings: str) -> Ran:
    return coldctl(
        "evaluate", model, "--baseline", baseline, "--suite", suite(folder, **settings),
        "--output", folder / "out", "--jobs", 1, "--json",
    )  # fmt: skip


# Fingerprints: the literals are of the code before the texts moved out of memory ------------------------------------

WORDS: list[dict[str, Any]] = [{"text": f"text {i} é\u2028", "label": "cab"[i * i % 3]} for i in range(60)]
NUMBERS: list[dict[str, Any]] = [{"text": f"text {i}", "label": (i * 7) % 11} for i in range(99)]
FRACTIONS: list[dict[str, Any]] = [{"text": f"text {i}", "text_pair": f"pair {i}", "label": i / 8} for i in range(60)]


@pytest.mark.parametrize(
    ("name", "rows", "limits", "expected"),
    [
        ("words", WORDS, Limits(), "e8874d739836d73238f35ee7a6ab25a8f4c15cbeb9cff9da83bf6e74737888fc"),
        ("numbers", NUMBERS, Limits(40, 5, 4), "279199922135bf22fba183ede1ff764102b87ed3e4b312dcd7b55674ff601b75"),
        ("shots", NUMBERS, Limits(shots=30), "198b9119289030bead79a8b8a6c93af22e8092420d62bbf04340fca4cb9b5af4"),
        ("fractions", FRACTIONS, Limits(20), "3ead7407b46b272dec2c3f5fc326bdf8afe5f19fff42a5b095f8d84ae8152ccd"),
    ],
)
def test_fingerprints_stay_what_they_were(
    name: str, rows: list[dict[str, Any]], limits: Limits, expected: str, tmp_path: Path
) -> None:
    if name == "words":
        write(tmp_path / name / "test.jsonl", rows[:9])
    path = write(tmp_path / name / "train.jsonl", rows)
    found = load(path.parent if name == "words" else path, limits, name=name)
    assert found.fingerprint == f"sha256:{expected}"


def test_the_fingerprint_of_lists_holds_indices(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": ["b", "a"]}, {"text": "y", "label": []}, {"text": "z", "label": ["b"]}]
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", rows)
    part = b'\x1e["x", null, [0, 1]]\n["y", null, []]\n["z", null, [1]]\n'
    assert load(tmp_path).fingerprint == "sha256:" + hashlib.sha256(b'["a", "b"]' + 3 * part).hexdigest()


def test_draws_stay_what_they_were() -> None:
    labels = [0] * 50 + [1] * 5 + [2] * 20
    expected = [0, 10, 12, 20, 24, 37, 45, 46, 53, 58, 62, 67]
    assert stratified(labels, 12, 7) == stratified(np.asarray(labels), 12, 7) == expected


# Files --------------------------------------------------------------------------------------------------------------


def test_tables_hold_line_ends_inside_quotes(tmp_path: Path, base: Path, coldctl: Run) -> None:
    texts = [f'first {i}\nsecond, "{i}"\r\nthird' for i in range(30)]
    quoted = "".join('"{}",{}\r\n'.format(text.replace('"', '""'), "ab"[i % 2]) for i, text in enumerate(texts))
    (tmp_path / "data.csv").write_bytes(b"\xef\xbb\xbf" + b"text,label\r\n" + quoted.encode())
    found = load(tmp_path / "data.csv")
    assert sorted(text for part in (found.train, found.validation, found.test) for text in part.texts) == sorted(texts)
    assert found.labels == ("a", "b")
    (tmp_path / "data.csv").write_bytes(b"text,label\n" + quoted.encode() + b"too,many,columns\n")
    ran = coldctl("finetune", tmp_path / "data.csv", "--base", base, "--output", tmp_path / "out")
    assert ran.code == 2
    assert "line 92" in ran.stderr


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_byte_that_is_no_utf8_is_named_wherever_it_stands(suffix: str, tmp_path: Path) -> None:
    line = '{"text": "thé", "label": "a"}\n' if suffix == "jsonl" else "thé,a\n"
    head = ("" if suffix == "jsonl" else "text,label\n") + line * 5000
    (tmp_path / f"train.{suffix}").write_bytes(head.encode() + b"caf\xe9\n")
    with pytest.raises(DataError, match=rf"byte {len(head.encode()) + 3}\)"):
        load(tmp_path)


def test_parquet_files_hold_the_same_as_others(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, rows in (("lists", topical(3000)), ("fractions", FRACTIONS)):
        (tmp_path / name).mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name / "data.parquet")
        write(tmp_path / name / "data.jsonl", rows)
        found, other = load(tmp_path / name / "data.parquet"), load(tmp_path / name / "data.jsonl")
        assert found.fingerprint == other.fingerprint
        assert found.train.texts[3] == list(found.train.texts)[3]
        assert len(found.train) + len(found.validation) + len(found.test) == len(rows)


def test_class_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = datasets.ClassLabel(names=["sun", "rain", "never", "fog"])

    def published(kind: str, label: Any, labels: list[Any]) -> str:
        features = datasets.Features({"text": datasets.Value("string"), "label": label})
        rows = {"text": [f"text {i}" for i in range(len(labels))], "label": labels}
        (tmp_path / kind).mkdir()
        for split in ("train", "test"):
            datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / kind / f"{split}.parquet")
        return f"hf:{tmp_path / kind}"

    found = load(published("lists", datasets.Sequence(names), [[3, 0], [], [1], [0]] * 10))
    assert found.labels == ("sun", "rain", "fog")
    assert found.test.labels[:4].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
    single = load(published("single", names, [3, -1, 1, 0] * 10))
    assert single.labels == ("sun", "rain", "fog")
    assert single.test.labels[:4].tolist() == [2, 1, 0, 2]
    assert list(single.test.texts[:3]) == ["text 0", "text 2", "text 3"]
    assert single.unlabelled == 20
    assert load(published("sizes", datasets.ClassLabel(names=["2.5", "1"]), [0, 1] * 20)).labels == ("2.5", "1")
    with pytest.raises(DataError, match="train, example 2, has the label None, which names no class"):
        load(published("without", names, [0, None, 1] * 10))
    with pytest.raises(
        DataError, match="no example of the train split has a label on the Hub: name another split as train"
    ):
        load(published("hidden", names, [-1] * 10))


def test_splits_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them is what: as the configuration says, else by their usual names."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def published(folder: str, **counts: int) -> str:
        (tmp_path / folder).mkdir()
        for split, count in counts.items():
            rows = {"text": [f"{split} {i}" for i in range(count)], "label": list("ab") * (count // 2)}
            datasets.Dataset.from_dict(rows).to_parquet(tmp_path / folder / f"{split}.parquet")
        return f"hf:{tmp_path / folder}"

    def sizes(path: str, **settings: Any) -> tuple[int, int, int]:
        found = load(path, **settings)
        return len(found.train), len(found.validation), len(found.test)

    both = published("both", train=40, validation=10)
    assert sizes(both) == (36, 4, 10)  # it has no test split, so its validation split is what is measured on
    assert sizes(both, test="validation") == (36, 4, 10)
    three = published("three", train=40, validation=10, test=6)
    assert sizes(three) == (40, 10, 6)
    assert sizes(three, train=("train", "test"), test="validation") == (41, 5, 10)
    with pytest.raises(DataError, match="has no split 'dev': it has 'train', 'validation', 'test'"):
        load(three, test="dev")
    with pytest.raises(DataError, match="has no split 'nowhere'"):
        load(three, train=("train", "nowhere"))


# Labels -------------------------------------------------------------------------------------------------------------


def test_kinds_of_labels(tmp_path: Path) -> None:
    def kind(*labels: Any, **settings: Any) -> tuple[tuple[str, ...], str, list[Any]]:
        for split in ("train", "test"):
            write(
                tmp_path / f"{split}.jsonl", [{"text": f"{i}", "label": label} for i, label in enumerate(labels * 20)]
            )
        found = load(tmp_path, **settings)
        return found.labels, found.test.labels.dtype.name, found.test.labels[: len(labels)].tolist()

    assert kind("10", 9, 9.0, True) == (("1", "9", "10"), "int64", [2, 1, 1, 0])
    assert kind(1, 2.5) == kind("1", "2.5") == ((), "float64", [1.0, 2.5])
    assert kind(1, 2, metric="pearson") == ((), "float64", [1.0, 2.0])
    assert kind("2.5", "2.50", "x") == (("2.5", "2.50", "x"), "int64", [0, 1, 2])
    assert kind([10, 9], [], ["9", 10.0]) == (("9", "10"), "uint8", [[1, 1], [0, 0], [1, 1]])


LABELS: dict[str, tuple[list[Any], list[Any], str]] = {
    "a list among words": (["a", "b", ["a"]], ["a"], "train, example 3, .* is a list"),
    "a word among lists": ([["a"], ["b"], None], [["a"]], r"train, example 3, None, is no list.*write \[\]"),
    "nothing in a list": ([["a"], ["b", None]], [["a"]], r"train, example 2, has no usable label \(None\)"),
    "a list in a list": ([["a"], ["b", ["c"]]], [["a"]], r"train, example 2, has no usable label"),
    "a class of test alone": ([["a"], ["b"]], [["a", "b"], [], ["c", "a"]], r"label 'c' in test, example 3, never"),
    "a word of test alone": (["a", "b"], ["a", "c"], "label 'c' in test, example 2, never"),
    "other lists in test": ([["a"], ["b"]], ["a"], "labels of test are no lists"),
    "empty lists": ([[], []], [[]], "no class in any list"),
    "one class in lists": ([["a"], []], [["a"]], r"one class only \('a'\)"),
    "a fraction among classes": (["a", 2.5], ["a"], r"train, example 2, has no usable label \(2.5\)"),
    "no number among numbers": ([2.5, 1], [1, "x"], "label of test, example 2, is 'x', not a number"),
    "one number alone": ([2.5, 2.5], [1], "all 1 training labels are 2.5: there is nothing to learn"),
    "half a character": (["a", "b\ud800"], ["a"], "train, example 2, has half a surrogate pair"),
    "no finite number": ([2.5, float("inf")], [1], "label of train, example 2, is inf, not a number"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_wrong(case: str, tmp_path: Path) -> None:
    train, test, message = LABELS[case]
    for split, labels in (("train", train), ("test", test)):
        write(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}", "label": label} for i, label in enumerate(labels)])
    with pytest.raises(DataError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(("labels", "only"), [(["a", "b"], "one class"), ([["a"], ["b"]], "the same classes")])
def test_too_few_examples_to_tell_classes_apart(labels: list[Any], only: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"text": f"{i}", "label": labels[i % 2]} for i in range(20)])
    with pytest.raises(DataError, match=f"the 1 training examples left have {only} only: allow more of them"):
        load(tmp_path, Limits(1))


def test_a_column_of_names_is_no_label(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"text": "x", "label": f"row {i}"} for i in range((1 << 16) + 1)])
    with pytest.raises(DataError, match=r"more than 65536 classes.*--label"):
        load(path)


# Counts and limits --------------------------------------------------------------------------------------------------


def test_repetitions_are_counted_and_told(tmp_path: Path, base: Path, coldctl: Run) -> None:
    rows = [{"text": f"text {i}", "text_pair": f"{i}", "label": "ab"[i % 2]} for i in range(40)]
    other = [{**row, "text_pair": row["text_pair"] + "'"} for row in rows]  # another pair is another example
    shifted = [{**row, "text": row["text"] + row["text_pair"][0], "text_pair": row["text_pair"][1:]} for row in rows]
    write(tmp_path / "data" / "train.jsonl", [*rows, *rows[:3], rows[0]])
    write(tmp_path / "data" / "validation.jsonl", [*other, *rows[:5], *shifted[10:20]])
    write(tmp_path / "data" / "test.jsonl", [*rows[30:32], *other[:7], {"text": "new", "text_pair": "", "label": "a"}])
    found = load(tmp_path / "data", Limits(10, 10, 4))
    assert (found.leaked, found.repeated, found.duplicated) == (9, 5, 4)
    ran = evaluated(coldctl, base, base, tmp_path)
    assert ran.code == 0, ran.stderr
    assert "9 test examples also stand in its train or validation split" in ran.stderr
    assert "5 validation examples also stand in its train split" in ran.stderr
    assert "4 train examples repeat an earlier one" in ran.stderr


def test_numbers_are_dealt_out_to_contributors(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", [{"text": f"{i}", "label": i + 0.5} for i in range(21)])
    parts = [load(tmp_path, contributors=2, part=part) for part in (1, 2)]
    assert [len(part.train) for part in parts] == [11, 10]
    assert sorted(np.concatenate([part.train.labels for part in parts])) == [i + 0.5 for i in range(21)]


def test_shots_per_class(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "a" if i % 20 else "b" if i % 40 else "c"} for i in range(400)]
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", rows)
    limits = Limits(shots=12, per_class=True)
    drawn = load(tmp_path, limits)
    assert np.bincount(drawn.train.labels).tolist() == [12, 10, 10]
    assert [rows[int(text.split()[1])]["label"] for text in drawn.train.texts] == [
        drawn.labels[index] for index in drawn.train.labels
    ]
    assert load(tmp_path, limits).fingerprint == drawn.fingerprint != load(tmp_path, limits, seed=4).fingerprint
    assert len(load(tmp_path, Limits(shots=12)).train) == 12
    for kind, labels in (("numbers", [0.5, 1]), ("lists of classes", [["a"], ["b"]])):
        path = write(tmp_path / "other.jsonl", [{"text": f"{i}", "label": labels[i % 2]} for i in range(40)])
        with pytest.raises(DataError, match=f"{kind}, so shots.*in all"):
            load(path, limits)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it asks Linux for the peak")
def test_a_million_examples_are_no_burden(tmp_path: Path) -> None:
    """A third of a million, to be quick: 28 MB above the imports were measured, and 192 MB when they were lists."""
    with (tmp_path / "train.jsonl").open("w") as file:
        for i in range(300_000):
            file.write(
                f'{{"text": "a short text of a few words, the number {i} of many", "label": "{"abc"[i % 3]}"}}\n'
            )
    # The kernel's own mark, because getrusage begins with what the process that started this one had.
    script = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from coldctl.data.datasets import Limits, load_dataset\n"
        "from coldctl.config.settings import DatasetConfig\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) >> 10\n"
        "before = peak()\n"
        "found = load_dataset(DatasetConfig('many', sys.argv[1]), Limits(), 0)\n"
        "assert len(found.train) + len(found.validation) + len(found.test) == 300_000\n"
        "print(peak() - before, before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) < 60, done.stdout


# Several classes per example, and numbers, through the command -----------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_lists_of_classes_are_probed(metric: str, tmp_path: Path, base: Path, coldctl: Run) -> None:
    for seed, (split, count) in enumerate((("train", 240), ("validation", 60), ("test", 80))):
        write(tmp_path / "data" / f"{split}.jsonl", topical(count, seed))
    ran = evaluated(coldctl, tiny.perturb(base, tmp_path / "other", seed=1, scale=0.05), base, tmp_path, metric=metric)
    assert ran.code == 0, ran.stderr
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert result["metric"] == metric
    assert result["mean"] > (30 if metric == "accuracy" else 60)  # guessing gives 12.5 and 50
    assert result["gain_interval"][0] <= result["gain"] <= result["gain_interval"][1]
    truth = load(tmp_path / "data", metric=metric).test.labels
    scores = [
        scoring.score(metric, truth, np.asarray(json.loads(cell.read_text())["predictions"][0], np.uint8))
        for cell in (tmp_path / "out" / "cells").iterdir()
    ]
    assert sorted(scores) == pytest.approx(sorted([result["mean"], result["baseline_mean"]]))


@pytest.mark.parametrize("metric", ["matthews", "pearson", "spearman"])
def test_metrics_that_lists_of_classes_do_not_have(metric: str, tmp_path: Path, base: Path, coldctl: Run) -> None:
    write(tmp_path / "data" / "train.jsonl", topical(60))
    ran = evaluated(coldctl, base, base, tmp_path, metric=metric)
    assert ran.code == 2
    assert "lists of classes" in ran.stderr
    assert "macro_f1" in ran.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=f"which {metric} cannot score"):
        load(tmp_path / "data", metric=metric)


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", "spearman"), ("pearson", "pearson")])
def test_numbers_are_probed(metric: str, expected: str, tmp_path: Path, base: Path, coldctl: Run) -> None:
    generator = np.random.default_rng(0)
    rows = []
    for number in range(300):
        count = int(generator.integers(0, 9))
        words = ["great"] * count + ["sad"] * (8 - count)
        rows.append({"text": f"{' '.join(words)} {number}", "label": count / 8})
    write(tmp_path / "data" / "train.jsonl", rows)
    ran = evaluated(coldctl, base, base, tmp_path, metric=metric)
    assert ran.code == 0, ran.stderr
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert result["metric"] == expected
    assert result["mean"] > 90
    assert result["gain"] == 0


def test_scores_of_lists_are_those_of_the_library() -> None:
    from sklearn import metrics

    generator = np.random.default_rng(0)
    truth = (generator.random((200, 5)) < 0.3).astype(np.uint8)
    predictions = truth ^ (generator.random((2, 200, 5)) < [[[0.05]], [[0.1]]])
    baseline = truth ^ (generator.random((2, 200, 5)) < 0.3)
    library: dict[str, Callable[[Any, Any], float]] = {
        "accuracy": metrics.accuracy_score,
        "macro_f1": lambda real, found: metrics.f1_score(real, found, average="macro"),
    }
    for metric, computed in library.items():
        expected = [100 * computed(truth, row) for row in (*predictions, *baseline)]
        found = [scoring.score(metric, truth, row) for row in (*predictions, *baseline)]
        assert found == pytest.approx(expected)
        gains = scoring.resampled_gains(scoring.Outcome(metric, truth, predictions, baseline), 0)
        assert gains.shape == (scoring.RESAMPLES,)
        assert gains.mean() == pytest.approx((expected[0] + expected[1] - expected[2] - expected[3]) / 2, abs=1.5)
        # The spread is that of resampling by hand.
        draws = generator.integers(0, 200, (300, 200)), generator.integers(0, 2, (300, 2))
        slow = [
            np.mean([100 * (computed(truth[i], predictions[s][i]) - computed(truth[i], baseline[s][i])) for s in seeds])
            for i, seeds in zip(*draws, strict=True)
        ]
        assert gains.std() == pytest.approx(np.std(slow), rel=0.25)
    rare, guessed = np.array([[1, 0], [0, 0]], np.uint8), np.array([[1, 0], [0, 1]], np.uint8)
    assert scoring.score("macro_f1", rare, guessed) == 100  # the truth never has the second class
    absent = np.zeros((4, 2), np.uint8)
    assert scoring.score("macro_f1", absent, absent) == 0
    assert scoring.score("accuracy", absent, absent) == 100


def test_classes_that_never_vary_are_predicted_as_they_are() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 6))
    labels = np.stack([features[:, 0] > 0, np.ones(200), np.zeros(200), features[:, 1] > 1], 1).astype(np.uint8)
    train, validation, test = (slice(0, 120), slice(120, 160), slice(160, 200))
    found, strength, reached = probe.probe(
        (features[train], labels[train]),
        (features[validation], labels[validation]),
        features[test],
        lambda truth, predictions: scoring.score("accuracy", truth, predictions),
    )
    assert found.dtype == np.uint8
    assert found.shape == (40, 4)
    assert found[:, 1].all()
    assert not found[:, 2].any()
    assert scoring.score("accuracy", labels[test], found) > 80
    assert strength in probe.GRID
    assert reached > 80


@pytest.mark.parametrize("name", ["dev", "valid", "val"])
def test_a_validation_file_may_have_its_other_usual_names(name: str, tmp_path: Path) -> None:
    folder = tiny.make_dataset(tmp_path / "data")
    whole = load_dataset(config_from_reference(str(folder), DatasetConfig("", "")), Limits(), 0)
    (folder / "validation.jsonl").rename(folder / f"{name}.jsonl")
    renamed = load_dataset(config_from_reference(str(folder), DatasetConfig("", "")), Limits(), 0)
    assert renamed.fingerprint == whole.fingerprint
