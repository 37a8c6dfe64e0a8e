"""Everything a person can get wrong: one line that says what, where and what to do; exit code 2; nothing half written."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coldctl.common.digests import digest_of
from coldctl.common.errors import ConfigError
from conftest import FAST, Ran, suite_text
from helpers import tiny

Run = Callable[..., Ran]


def refused(ran: Ran, output: Path, *words: str) -> None:
    assert ran.code == 2, (ran.code, ran.stderr)
    assert "Traceback" not in ran.stderr
    lines = ran.stderr.strip().splitlines()
    assert sum(line.startswith("error:") for line in lines) == 1, ran.stderr
    for word in words:
        assert word in ran.stderr, (word, ran.stderr)
    assert not output.exists()


def write_rows(folder: Path, **splits: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


GOOD: list[dict[str, object]] = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]

DATA: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "missing": (lambda path: path / "nowhere", ("no data at", "nowhere")),
    "empty folder": (lambda path: write_rows(path / "empty"), ("holds no data", "train.jsonl")),
    "empty file": (lambda path: write_rows(path / "d", train=[], test=GOOD), ("train split", "empty")),
    "no train": (lambda path: write_rows(path / "d", test=GOOD), ("no train split", "'test'")),
    "one class": (lambda path: write_rows(path / "d", train=[{"text": "x", "label": "a"}] * 9, test=GOOD), ("one class",)),
    "no label column": (lambda path: write_rows(path / "d", train=[{"text": "x"}] * 9), ("no column 'label'", "--label")),
    "no text column": (
        lambda path: write_rows(path / "d", train=[{"x": "x", "label": 1}, {"x": "x", "label": 0}] * 9),
        ("no column 'text'",),
    ),
    "null label": (lambda path: write_rows(path / "d", train=[*GOOD, {"text": "x", "label": None}]), ("no usable label", "21")),
    "text no text": (
        lambda path: write_rows(path / "d", train=[*GOOD, {"text": 7, "label": "a"}], test=GOOD),
        ("int, not text",),
    ),
    "new label in test": (
        lambda path: write_rows(path / "d", train=GOOD, test=[*GOOD, {"text": "x", "label": "c"}]),
        ("label 'c' in test", "never occurs in train"),
    ),
    "two few": (lambda path: write_rows(path / "d", train=GOOD[:3]), ("too few",)),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_datasets(case: str, tmp_path: Path, base: Path, coldctl: Run) -> None:
    make, words = DATA[case]
    ran = coldctl("finetune", make(tmp_path), "--base", base, "--output", tmp_path / "out", *FAST)
    refused(ran, tmp_path / "out", *words)
    assert not (tmp_path / ".out.partial").exists()


def test_files(tmp_path: Path, base: Path, coldctl: Run) -> None:
    def attempt(name: str, content: bytes, *words: str) -> None:
        (tmp_path / name).write_bytes(content)
        ran = coldctl("finetune", tmp_path / name, "--base", base, "--output", tmp_path / "out", *FAST)
        refused(ran, tmp_path / "out", *words)

    attempt("latin.csv", "text,label\ncafé,a\nthé,b\n".encode("latin-1"), "not UTF-8", "iconv")
    attempt("broken.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', "line 2", "not valid JSON")
    attempt("list.jsonl", b"[1, 2]\n", "line 1", "not a JSON object")
    attempt("ragged.csv", b"text,label\na,b,c\n", "line 2", "columns")
    attempt("short.tsv", b"text\tlabel\na\n", "line 2", "columns")
    attempt("data.txt", b"hello", "unknown format", ".parquet")
    attempt("bad.parquet", b"PAR1 no", "not a readable parquet")
    ran = coldctl("finetune", "hf:org/nothing", "--base", base, "--output", tmp_path / "out", *FAST)
    refused(ran, tmp_path / "out", "cannot load hf:org/nothing from the Hub", "check the name and the network")
    (tmp_path / "folder" / "train.csv").mkdir(parents=True)
    ran = coldctl("finetune", tmp_path / "folder", "--base", base, "--output", tmp_path / "out", *FAST)
    refused(ran, tmp_path / "out", "train.csv: Is a directory")
    both = tmp_path / "both"
    write_rows(both, train=GOOD)
    (both / "train.csv").write_text("text,label\n")
    ran = coldctl("finetune", both, "--base", base, "--output", tmp_path / "out", *FAST)
    refused(ran, tmp_path / "out", "both train.csv and train.jsonl")


def test_models(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    def attempt(model: object, *words: str) -> None:
        ran = coldctl("finetune", dataset, "--base", model, "--output", tmp_path / "out", *FAST)
        refused(ran, tmp_path / "out", *words)

    attempt("./nowhere", "no directory", "check the path")
    attempt("org/some-model", "could not be fetched from the Hub", "HF_HUB_OFFLINE")
    attempt("no such/model/at all", "no directory")
    attempt(dataset, "no config.json")
    attempt(dataset / "train.jsonl", "is a file")
    decoder = shutil.copytree(base, tmp_path / "decoder")
    config = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(
        json.dumps({**config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    attempt(decoder, "not a text encoder", "gpt2")
    pickled = shutil.copytree(base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    attempt(pickled, "pickled", "safetensors")
    mute = shutil.copytree(base, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "special*"))
    attempt(mute, "no tokenizer", "copy the base")
    tensors, metadata = tiny.read_tensors(base / "model.safetensors")
    partial = shutil.copytree(base, tmp_path / "part")
    rest = [(name, tensor) for name, tensor in tensors.items() if "layer.1" not in name]
    tiny.write_tensors(partial / "model.safetensors", rest, metadata)
    attempt(partial, "lacks", "body tensors")
    padless = Path(shutil.copytree(base, tmp_path / "padless"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (padless / name).exists():
            (padless / name).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    attempt(padless, "its tokenizer has no padding token", "tokenizer_config.json")
    table = "embeddings.word_embeddings.weight"
    small = Path(shutil.copytree(base, tmp_path / "small"))
    few = [(name, tensor[:20].clone() if name == table else tensor) for name, tensor in tensors.items()]
    tiny.write_tensors(small / "model.safetensors", few, metadata)
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    attempt(small, "the model has 20: they do not belong together")
    vast = Path(shutil.copytree(base, tmp_path / "vast"))
    rest = [(name, tensor) for name, tensor in tensors.items() if name != table]
    tiny.write_tensors(vast / "model.safetensors", rest, metadata)
    (vast / "config.json").write_text(json.dumps({**config, "vocab_size": 10**9}))
    attempt(vast, "its config describes 160000", "weights, it holds")


def test_configs(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    def attempt(text: str, *words: str) -> None:
        (tmp_path / "c.toml").write_text(text)
        ran = coldctl(
            "finetune", dataset, "--base", base, "--output", tmp_path / "out", "--config", tmp_path / "c.toml"
        )
        refused(ran, tmp_path / "out", *words)

    attempt("[finetune]\nepoch = 3\n", "unknown key 'epoch'", "'epochs'")
    attempt("[finetun]\n", "unknown key 'finetun'", "'finetune'")
    attempt('[finetune]\nepochs = "3"\n', "epochs", "must be a whole number")
    attempt("[finetune]\nepochs = 0\n", "out of range")
    attempt("[finetune]\nlearning_rate = -1.0\n", "out of range")
    attempt("[finetune]\nlearning_rate = nan\n", "out of range")
    attempt("[finetune\n", "not valid TOML")
    attempt('[[dataset]]\nname = "a"\n', "'path' is missing")
    attempt('[[dataset]]\nname = "a/b"\npath = "x"\n', "cannot name a directory")
    attempt('[[dataset]]\nname = "a"\npath = "x"\n' * 2, "two datasets are called 'a'")
    attempt('[[dataset]]\nname = "a"\npath = "x"\nmetric = "acc"\n', "choose one of accuracy")
    attempt('[[dataset]]\nname = "a"\npath = "x"\ntrain = []\n', "train = []", "wrong type")
    attempt('[[dataset]]\nname = "a"\npath = "x"\ncontributors = 2\npart = 3\n', "part = 3", "there are 2 contributors")
    attempt("[dataset]\n", "[[dataset]]")
    attempt("[finetune]\nlora_rank = 100000\n", "lora_rank = 100000 is out of range: it must be 0 to 4096")
    attempt("[finetune]\nlabel_smoothing = 1.0\n", "it must be 0 to below 1")
    attempt("[finetune]\nlabel_smoothing = 1.5\n", "it must be 0 to below 1")
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--config", tmp_path / "none.toml")
    refused(ran, tmp_path / "out", "no configuration file")
    ran = coldctl("finetune", "--base", base, "--output", tmp_path / "out")
    refused(ran, tmp_path / "out", "either DATA or --suite")
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--engine", "dask")
    refused(ran, tmp_path / "out", "--engine dask")


def test_usage_errors_end_with_2(coldctl: Run) -> None:
    assert coldctl("fuse").code == 2
    assert coldctl("nonsense").code == 2
    assert coldctl("finetune", "x", "--base").code == 2


def test_a_run_that_has_only_been_planned(tmp_path: Path, base: Path, coldctl: Run) -> None:
    (tmp_path / "c.toml").write_text(f'[run]\nbase = "{base}"\n')
    ran = coldctl("plan", tmp_path / "run", "--config", tmp_path / "c.toml", "--iterations", 2, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json == {"run": str(tmp_path / "run"), "iterations": [1, 2]}
    ran = coldctl("status", tmp_path / "run", "--evaluation")
    assert ran.code == 2
    assert "has no evaluation of a promoted model yet: run `make iterate` first" in ran.stderr
    assert coldctl("status", tmp_path / "run", "--pretrained").stdout.strip().endswith(base.name)


def test_a_team_runs_no_other_engine(
    tmp_path: Path, base: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Run
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--engine", "ray")
    refused(ran, tmp_path / "out", "--engine ray does not go with torchrun: leave one of them out")


def test_a_regression_can_end_a_script(tmp_path: Path, base: Path, coldctl: Run) -> None:
    """The results are written and said in any case; the exit code tells that the model is worse."""
    data = tiny.make_dataset(tmp_path / "red", train=64, test=60)
    (tmp_path / "suite.toml").write_text(f'[[dataset]]\nname = "red"\npath = "{data}"\n')
    tensors, metadata = tiny.read_tensors(base / "model.safetensors")
    blank = Path(shutil.copytree(base, tmp_path / "blank"))  # what it says of a text does not depend on the text
    tiny.write_tensors(blank / "model.safetensors", [(name, value * 0) for name, value in tensors.items()], metadata)
    ran = coldctl(
        "evaluate", blank, "--baseline", base, "--suite", tmp_path / "suite.toml", "--output", tmp_path / "out",
        "--protocol", "linear-probe", "--jobs", 1, "--fail-on-regression", "--json",
    )  # fmt: skip
    assert ran.code == 3, ran.stderr
    assert "error: the average gain is negative beyond doubt" in ran.stderr
    assert "blank by linear-probe: -" in ran.stderr
    assert ran.json["averages"]
    assert (tmp_path / "out" / "coldctl.json").exists()


def test_a_store_without_an_account_is_an_error_in_words(
    tmp_path: Path, base: Path, contributions: Path, monkeypatch: pytest.MonkeyPatch, coldctl: Run
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = f"s3://nobodys-{tmp_path.name}"
    ran = coldctl("status", f"{store}/run")
    refused(ran, tmp_path / "out", f"cannot read {store}/run/run.json: Unable to locate credentials")
    ran = coldctl("fuse", contributions, "--base", base, "--output", f"{store}/out")
    refused(ran, tmp_path / "out", "the store does not answer as it should (Unable to locate credentials)")


def test_errors_keep_their_findings_on_the_way_from_another_process() -> None:
    found = pickle.loads(pickle.dumps(ConfigError("what", ["one", "two"])))
    assert (type(found), found.message, found.details) == (ConfigError, "what", ("one", "two"))


def test_fuse_and_others(tmp_path: Path, base: Path, contributions: Path, suite: Path, coldctl: Run) -> None:
    out = tmp_path / "out"
    (tmp_path / "void").mkdir()
    refused(coldctl("fuse", tmp_path / "void", "--base", base, "--output", out), out, "holds no checkpoint")
    refused(coldctl("fuse", tmp_path / "gone", "--base", base, "--output", out), out, "no directory")
    refused(
        coldctl("fuse", contributions, "--base", base, "--output", out, "--method", "average"),
        out,
        "choose one of mean",
    )
    refused(
        coldctl("fuse", contributions, "--base", base, "--output", out, "--max-shard-size", "big"), out, "not a size"
    )
    refused(coldctl("publish", base, "--to", out), out, "no licence")
    refused(
        coldctl("publish", base, "--to", out, "--license", "mit", "--evaluation", base), out, "`coldctl evaluate` wrote"
    )
    refused(coldctl("lineage", base), out, "does not say where it came from")
    refused(coldctl("status", base), out, "not a run")
    refused(coldctl("evaluate", base, "--suite", suite, "--output", out), out, "--baseline")
    (tmp_path / "empty.toml").write_text("")
    refused(coldctl("evaluate", base, "--suite", tmp_path / "empty.toml", "--output", out), out, "[[dataset]]")
    text = suite.read_text().replace("./", f"{suite.parent}/").replace('path = "', f'path = "{suite.parent}/')
    (tmp_path / "unseen.toml").write_text(text.replace('"seen"', '"unseen"'))
    train = ("finetune", "--base", base, "--output", out, "--suite")
    refused(coldctl(*train, tmp_path / "unseen.toml"), out, "no seen dataset")
    refused(coldctl(*train, suite, "--only", "blue"), out, "no seen dataset is called 'blue'", "has red, green")
    (tmp_path / "rootless.toml").write_text(text.replace("base =", "# base ="))
    refused(coldctl("plan", out, "--config", tmp_path / "rootless.toml"), out, "[run] names no base")
    run = tmp_path / "run"
    assert coldctl("plan", run, "--config", suite).code == 0
    refused(coldctl("evaluate", run, "--suite", suite, "--output", out), out, "no fused model yet: run `coldctl fuse`")
    refused(coldctl("lineage", run, "--signer", "alice"), out, "no fused model yet: fuse its first iteration")
    refused(coldctl("promote", run), out, "fused is not complete: fuse iteration 1 first")
    alone = tmp_path / "alone"
    alone.mkdir()  # an empty directory may become an output
    assert coldctl("fuse", contributions / "one", "--base", base, "--output", alone).code == 0
    ran = coldctl("fuse", alone, "--without", "data-one", "--base", base, "--output", out)
    refused(ran, out, "'data-one' is the only contribution")
    refused(coldctl("evaluate", alone, "--suite", suite, "--output", out), out, "was not found from here", "--baseline")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious.txt").write_text("mine")
    ran = coldctl("fuse", contributions, "--base", base, "--output", foreign)
    assert ran.code == 2
    assert "files that coldctl did not write" in ran.stderr
    assert (foreign / "precious.txt").read_text() == "mine"
    assert coldctl("fuse", contributions, "--base", base, "--output", foreign, "--overwrite").code == 2
    assert (foreign / "precious.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    ran = coldctl("fuse", contributions, "--base", base, "--output", tmp_path / "file")
    assert ran.code == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_an_evaluation_of_another_model_is_not_published(
    tmp_path: Path, base: Path, contributions: Path, suite: Path, coldctl: Run
) -> None:
    assert coldctl("fuse", contributions, "--base", base, "--output", tmp_path / "fused").code == 0
    ran = coldctl("evaluate", base, "--baseline", base, "--suite", suite, "--output", tmp_path / "e", "--jobs", 1)
    assert ran.code == 0, ran.stderr
    ran = coldctl(
        "publish", tmp_path / "fused", "--to", tmp_path / "p", "--license", "mit", "--evaluation", tmp_path / "e"
    )
    refused(ran, tmp_path / "p", "not this model's body")


def test_one_failure_of_a_suite_stops_no_other(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    write_rows(tmp_path / "bad", train=[{"text": "x", "label": "a"}] * 9)
    shutil.copytree(dataset, tmp_path / "good")
    path = tmp_path / "suite.toml"
    path.write_text(
        "[finetune]\nepochs = 1\nbatch_size = 16\n"
        + "".join(f'[[dataset]]\nname = "{n}"\npath = "{n}"\n' for n in ("bad", "good"))
    )
    ran = coldctl("finetune", "--suite", path, "--base", base, "--output", tmp_path / "c", "--jobs", 1, "--json")
    assert ran.code == 3
    assert "--only bad" in ran.stderr
    assert ran.json["failed"] == ["bad"]
    assert (tmp_path / "c" / "good" / "coldctl.json").exists()
    assert not (tmp_path / "c" / "bad").exists()


def test_two_commands_on_one_output(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    import fcntl

    partial = tmp_path / ".fused.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    ran = coldctl("fuse", contributions, "--base", base, "--output", tmp_path / "fused")
    refused(ran, tmp_path / "fused", "another command")
    os.close(lock)
    assert coldctl("fuse", contributions, "--base", base, "--output", tmp_path / "fused").code == 0


def test_names_cannot_command_the_terminal(tmp_path: Path, base: Path, coldctl: Run) -> None:
    good = tiny.perturb(base, tmp_path / "evil\x1b[2J[red]name", seed=1)
    ran = coldctl("fuse", good, "--base", base, "--output", tmp_path / "fused")
    assert ran.code == 0
    assert "\x1b[2J" not in ran.stderr
    assert "[red]name" in ran.stderr


def test_ctrl_c_says_how_to_go_on_and_the_next_call_does(tmp_path: Path, base: Path) -> None:
    for name in ("red", "green", "blue"):
        tiny.make_dataset(tmp_path / name, train=400)
    shutil.copytree(base, tmp_path / "base")
    suite = tmp_path / "suite.toml"
    suite.write_text(
        suite_text("base").replace("epochs = 1", "epochs = 40").replace("[finetune]", "[finetune]\npatience = 999")
    )
    command = [
        sys.executable,
        "-m",
        "coldctl",
        "finetune",
        "--suite",
        suite,
        "--base",
        base,
        "--output",
        tmp_path / "c",
    ]
    process = subprocess.Popen([*map(str, command), "--jobs", "1"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "c").glob(".*.partial")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in error
    assert not (tmp_path / "c" / "green" / "coldctl.json").exists()
    suite.write_text(suite_text("base"))
    again = subprocess.run(
        [*map(str, command), "--jobs", "1", "--overwrite"], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "c" / "green" / "coldctl.json").exists()


def test_ctrl_c_before_a_stage_has_begun() -> None:
    code = (
        "import sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'coldctl.cli.screen': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "sys.argv = ['coldctl', 'status', 'run']\n"
        "from coldctl.cli.app import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "interrupted: run the same command again to go on; what was complete is not repeated\n"


def test_no_output_ever_replaces_an_input(
    tmp_path: Path, base: Path, dataset: Path, contributions: Path, suite: Path, coldctl: Run
) -> None:
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    start = Path(shutil.copytree(base, tmp_path / "base"))
    gifts = Path(shutil.copytree(contributions, tmp_path / "gifts"))
    commands: list[tuple[object, ...]] = [
        ("finetune", data, "--base", start, "--output", data),
        ("finetune", data, "--base", start, "--output", data / "inside"),
        ("finetune", data / "train.jsonl", "--base", start, "--output", data),
        ("finetune", data, "--base", start, "--output", start),
        ("fuse", gifts, "--base", start, "--output", gifts / "one"),
        ("fuse", gifts / "one", "--base", start, "--output", gifts),
        ("fuse", gifts, "--base", start, "--output", start),
        ("publish", gifts / "one", "--to", gifts / "one", "--license", "mit"),
        ("evaluate", start, "--baseline", gifts / "one", "--suite", suite, "--output", start),
        ("evaluate", start, "--baseline", gifts / "one", "--suite", suite, "--output", gifts / "one"),
    ]
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    for command in commands:
        ran = coldctl(*command, "--overwrite")
        assert ran.code == 2, command
        assert "overwrite its own input" in ran.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_all_findings_are_listed_at_once_by_place(
    tmp_path: Path, base: Path, contributions: Path, coldctl: Run
) -> None:
    from helpers.bodies import poison

    folder = Path(shutil.copytree(contributions, tmp_path / "folder"))
    (folder / "one" / "coldctl.json").write_text("{")
    data = bytearray((folder / "two" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "two" / "model.safetensors").write_bytes(bytes(data))
    poison(base, folder / "four", float("nan"))
    ran = coldctl("fuse", folder, "--base", base, "--output", tmp_path / "out", "--json")
    assert ran.code == 2
    for name in ("one", "two", "four"):
        assert any(line.startswith(f"{folder / name}: ") for line in ran.json["details"]), ran.json
    ran = coldctl(
        "fuse", folder, "--base", base, "--output", tmp_path / "out", "--screen", "reject", "--min-contributions", 1
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    manifest = (tmp_path / "out" / "coldctl.json").read_text()
    assert str(tmp_path) not in manifest
    assert manifest.count('"rejected"') == 3


def test_names_stay_inside_their_folder(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    for name in ("../x", "a/b", ".hidden"):
        ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--name", name, *FAST)
        refused(ran, tmp_path / "out", "cannot name a directory")


def test_a_mistake_is_blamed_where_it_was_made(tmp_path: Path, base: Path, suite: Path, coldctl: Run) -> None:
    ran = coldctl(
        "evaluate", base, "--baseline", base, "--suite", suite, "--output", tmp_path / "o", "--protocol", "probe"
    )
    refused(ran, tmp_path / "o", "arguments", "linear-probe")


def test_one_directory_counts_once(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    ran = coldctl("fuse", contributions, contributions / "one", "--base", base, "--output", tmp_path / "f", "--json")
    assert ran.code == 0
    assert "counts once" in ran.stderr
    assert len(ran.json["contributions"]) == 3


def test_usage_errors_are_one_line_and_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coldctl", "fuse", "--nonsense", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "coldctl fuse --help" in done.stderr
    assert json.loads(done.stdout)["exit_code"] == 2


def test_unicode_and_line_ends_in_data(tmp_path: Path, base: Path, coldctl: Run) -> None:
    rows = "".join(f'"{"ab"[i % 2]}","one line\u2028still the same {i}"\n' for i in range(20))
    (tmp_path / "data.csv").write_text("label,text\n" + rows)
    ran = coldctl("finetune", tmp_path / "data.csv", "--base", base, "--output", tmp_path / "out", *FAST, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["manifest"]["dataset"]["labels"] == ["a", "b"]
    write_rows(tmp_path / "half", train=[*GOOD, {"text": "cut \ud83d", "label": "a"}])
    ran = coldctl("finetune", tmp_path / "half", "--base", base, "--output", tmp_path / "x", *FAST)
    refused(ran, tmp_path / "x", "half a surrogate pair")


def test_a_diverged_training_is_no_contribution(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    flags = ("--learning-rate", 1e30, "--epochs", 3, "--batch-size", 8)
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", *flags)
    assert ran.code == 3
    assert "diverged" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_strangers_manifests(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:

    fused = tmp_path / "fused"
    assert coldctl("fuse", contributions, "--base", base, "--output", fused).code == 0
    changes: list[dict[str, object]] = [
        {"kind": "\x1b[2J"}, {"name": "a/b"}, {"name": ".."}, {"ancestors": ["x"]}, {"contributions": ["x"]},
        {"contributions": [{"name": 3}]}, {"ancestors": [{"contributions": 3}]}, {"files": {"../x": "y"}},
    ]  # fmt: skip
    for change in changes:
        document = {**json.loads((fused / "coldctl.json").read_text()), **change}
        document.pop("manifest_digest")
        document["manifest_digest"] = digest_of(document)
        evil = tmp_path / "evil"
        shutil.rmtree(evil, ignore_errors=True)
        shutil.copytree(fused, evil)
        (evil / "coldctl.json").write_text(json.dumps(document))
        for command in (("lineage", evil), ("publish", evil, "--to", tmp_path / "p", "--license", "mit")):
            ran = coldctl(*command)
            assert ran.code == 2, (change, command)
            assert "Traceback" not in ran.stderr
        assert coldctl("check", evil, "--base", base).code == 3


def test_an_adapter_beside_a_model_is_not_loaded(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    both = Path(shutil.copytree(base, tmp_path / "both"))
    (both / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    ran = coldctl("finetune", dataset, "--base", both, "--output", tmp_path / "out", *FAST)
    refused(ran, tmp_path / "out", "an adapter beside the model")


def test_flags_that_would_be_ignored_are_refused(
    tmp_path: Path, base: Path, suite: Path, dataset: Path, coldctl: Run
) -> None:
    out = tmp_path / "out"
    refused(
        coldctl("finetune", "--suite", suite, "--base", base, "--output", out, "--license", "mit"), out, "go with DATA"
    )
    refused(coldctl("finetune", dataset, "--base", base, "--output", out, "--only", "red"), out, "go with --suite")


@pytest.mark.parametrize(
    ("module", "words", "flags"),
    [
        ("pyarrow", "needs pyarrow: pip install 'coldctl[data]'", ("finetune", "d.parquet")),
        ("datasets", "needs the datasets library: pip install 'coldctl[data]'", ("finetune", "hf:org/name")),
        ("peft", "--lora-rank needs PEFT: pip install 'coldctl[lora]'", ("finetune", "reviews", "--lora-rank", 2)),
        ("cryptography.hazmat.primitives", "need the cryptography library", ("fuse", "one", "--trusted-keys", "keys")),
    ],
)
def test_libraries_that_are_not_there(
    module: str, words: str, flags: tuple[object, ...], tmp_path: Path, base: Path, dataset: Path, contributions: Path,
    coldctl: Run, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "alice.pem").write_text("-----BEGIN PUBLIC KEY-----")
    (tmp_path / "reviews").symlink_to(dataset)
    (tmp_path / "one").symlink_to(contributions / "one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    refused(coldctl(*flags, "--base", base, "--output", tmp_path / "out"), tmp_path / "out", words)


def test_a_launcher_that_says_nonsense(
    tmp_path: Path, base: Path, dataset: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "first"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", *FAST)
    refused(ran, tmp_path / "out", "must be whole numbers: start with torchrun, or unset them")
