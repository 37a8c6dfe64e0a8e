"""What strangers may send to harm: every case here once ended in a traceback, a lost limit, or a file read outside."""

import json
import os
import re
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from coldctl.common import parsing
from conftest import FAST, Ran
from helpers import tiny
from helpers.forge import forge

Run = Callable[..., Ran]
SECONDS, MEGABYTES = 1.0, 200


@contextmanager
def bounded() -> Iterator[None]:
    """The block ends in time, and within the memory that any input may cost."""
    tracemalloc.start()
    started = time.process_time()
    yield
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 5 * SECONDS, seconds  # tracing takes most of it
    assert peak < MEGABYTES << 20, peak


def refused(ran: Ran, code: int, *words: str) -> None:
    assert ran.code == code, (ran.code, ran.stderr)
    said = ran.stderr + ran.stdout
    for word in words:
        assert word in said, (word, said)


# Documents ----------------------------------------------------------------------------------------------------

JSON_BOMBS = {
    "lists": b"[" + b"[]," * 5_000_000 + b"0]",
    "objects": b"[" + b"{}," * 5_000_000 + b"0]",
    "depth": b"[" * 400 + b"]" * 400,
    "very deep": b"[" * 5_000_000,
    "digits": b"[" + b"9" * 4000 + b"]",
    "more digits": b"[" + b"9" * 5_000_000 + b"]",
    "one value too many": b"[" + b"0," * parsing.MOST_VALUES + b"0]",
    "as many values as allowed, wide text": b'["\xf0\x9f\x92\xa3",' + b"[]," * (parsing.MOST_VALUES // 2 - 2) + b"0]",
    "long text": b'["\xf0\x9f\x92\xa3' + b"a" * (parsing.JSON_LIMIT - 9) + b'"]',
    "too long": b'"' + b"a" * parsing.JSON_LIMIT + b'"',
    "twice": b'{"a": 1, "a": 2}',
    "half a pair": b'{"\xed\xa0\x80": 1}',
}


@pytest.mark.parametrize("case", JSON_BOMBS)
def test_json_costs_little_whatever_it_says(case: str) -> None:
    data = JSON_BOMBS[case]
    with bounded():
        try:
            parsing.json_value(data)
        except ValueError as error:
            assert len(str(error)) < 200  # noqa: PT017
            return
    assert "allowed" in case or case == "long text"


TOML_BOMBS = {
    "dots": b"a" + b".a" * 100_000 + b" = 1",
    "quoted dots": b"'a'" + b" . 'a'" * 30_000 + b" = 1",
    "dots in a header": b"[a" + b".a" * 100_000 + b"]",
    "dots in braces": b"x = {a" + b".a" * 100_000 + b" = 1}",
    "a long word": b"a" * 250_000,
    "tables": b"[[a]]\n" * 40_000,
    "nested headers": b"".join(b"[[" + b".".join([b"a"] * depth) + b"]]\n" for depth in range(1, 60)),
    "braces": b"x = " + b"{a=" * 20_000,
    "brackets": b"x = " + b"[" * 100_000,
    "list": b"x = [" + b"[]," * 80_000 + b"]",
    "keys": b"".join(b"a%d=1\n" % number for number in range(28_000)),
    "digits": b"x = " + b"9" * 5000,
    "hexadecimal digits": b"x = 0x" + b"f" * 5000,
    "date": b"x = 1979-05-27",
    "time": b"x = 07:32:00",
    "not UTF-8": b"x = '\xff'",
    "quotes": b'"' * 250_000,
    "too long": b"#" * (parsing.TOML_LIMIT + 1),
}


@pytest.mark.parametrize("case", TOML_BOMBS)
def test_toml_costs_little_whatever_it_says(case: str) -> None:
    with bounded():
        try:
            parsing.toml_table(TOML_BOMBS[case])
        except ValueError as error:
            assert len(str(error)) < 200  # noqa: PT017
            return
    assert case in ("tables", "list", "keys")


TOML = [
    'epochs = 0xffffffffffffffffffffffff', "epochs = 1e400", "epochs = 1979-05-27", f"epochs = {'9' * 5000}",
    f"{'a' * 200_000} = 1", "epochs.a.a.a = 1", "x = inf",
]  # fmt: skip


@pytest.mark.parametrize("line", TOML)
def test_settings(line: str, tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    path = tmp_path / "c.toml"
    for text in (f"[finetune]\n{line}\n", f'[[dataset]]\nname = "a"\npath = "b"\n{line}\n', f"[fuse]\n{line}\n"):
        path.write_text(text)
        ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--config", path)
        refused(ran, 2)
        assert len(ran.stderr) < 600
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--epochs", "9" * 400)
    refused(ran, 2, "out of range")


WEIGHTS = {
    "deep.json": "[" * 100_000, "deep.toml": "a = " + "[" * 100_000, "large.json": f'{{"one": 1{"0" * 400}}}',
    "large.toml": f"one = 0x{'f' * 400}", "twice.json": '{"one": 1, "one": 2}', "text.json": '{"one": "1"}',
    "true.json": '{"one": true}',
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_files(name: str, tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    (tmp_path / name).write_text(WEIGHTS[name])
    ran = coldctl(
        "fuse", contributions, "--base", base, "--output", tmp_path / "out", "--weights", tmp_path / name, "--quiet"
    )
    refused(ran, 2, "--weights")


RUNS: list[dict[str, object] | str] = [
    "[" * 100_000, "[]", {"base": 3}, {"base": "./\x1b[31m"}, {"target": "9"}, {"iterations": [3]},
    {"iterations": [{"number": 1, "promoted": 1, "body_digest": "x"}]}, {"iterations": {}}, {"seed": 10**90},
]  # fmt: skip


@pytest.mark.parametrize("change", RUNS)
def test_run_files(change: dict[str, object] | str, tmp_path: Path, base: Path, coldctl: Run) -> None:
    good = {
        "schema": 1, "base": str(base), "revision": None, "config_digest": "x", "sample": 0, "seed": 0, "gate": False,
        "target": 1, "iterations": [],
    }  # fmt: skip
    (tmp_path / "run.json").write_text(change if isinstance(change, str) else json.dumps({**good, **change}))
    ran = coldctl("status", tmp_path)
    if change == {"seed": 10**90}:
        assert ran.code == 0
    else:
        refused(ran, 2, "run.json")
    assert "\x1b" not in ran.stderr


# Manifests ----------------------------------------------------------------------------------------------------

RECORD: dict[str, object] = {"name": "a", "weight": 1.0, "status": "fused", "body_digest": "x"}
MANIFESTS: list[dict[str, Any]] = [
    {"iteration": -1}, {"iteration": 10**60}, {"iteration": True}, {"name": "a" * 300}, {"base": []},
    {"base": {"name": 3, "body_digest": "x"}}, {"license": 3}, {"license": []}, {"files": {"": "x"}},
    {"files": {"a\0b": "x"}}, {"files": {"a/../../b": "x"}}, {"files": {"a": 3}}, {"files": {"x" * 2000: "x"}},
    {"environment": []}, {"environment": {"device": {}}}, {"config": []}, {"ancestors": [{"config": 3}]},
    {"ancestors": [{"environment": []}]}, {"ancestors": [{"iteration": "1"}]}, {"ancestors": [{"name": []}]},
    {"dataset": {"name": 3}}, {"dataset": {"labels": "abc"}}, {"dataset": {"num_train": "many"}},
    {"dataset": {"source": []}}, {"metrics": {"validation": 3}}, {"metrics": {"validation": {"accuracy": []}}},
    *[{"contributions": [{**RECORD, key: value}]} for key, value in (
        ("source", []), ("environment", "x"), ("training", []), ("training", {"epochs": {}}), ("num_train", "<b>"),
        ("weight", "1"), ("weight", True), ("update_norm", {}), ("notes", "x"), ("dataset", 3), ("signer", []),
    )],
]  # fmt: skip


@pytest.mark.parametrize("change", MANIFESTS, ids=str)
def test_manifests_of_other_types(
    change: dict[str, object], tmp_path: Path, base: Path, contributions: Path, coldctl: Run
) -> None:
    evil = forge(contributions / "one", tmp_path / "evil", **change)
    refused(coldctl("lineage", evil), 2, "coldctl.json")
    assert coldctl("check", evil, "--base", base).code == 3
    # One bad manifest does not spoil what is fused without it.
    ran = coldctl(
        "fuse", evil, contributions, "--base", base, "--output", tmp_path / "out", "--screen", "reject", "--quiet"
    )
    assert ran.code == 0, ran.stderr
    assert coldctl("lineage", tmp_path / "out").code == 0


# Checkpoints --------------------------------------------------------------------------------------------------


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


EMPTY = {"dtype": "F32", "data_offsets": [0, 0]}
HEADERS = {
    "a product that overflows": {"a": {**EMPTY, "shape": [1 << 61, 0]}, "b": {**EMPTY, "shape": [1 << 61, 8, 0]}},
    "half a surrogate pair": {"\ud800": {**EMPTY, "shape": [0]}},
    "NUL": {"a\0b": {**EMPTY, "shape": [0]}},
    "escape": {"\x1b[31m": {**EMPTY, "shape": [0]}},
    "long name": {"a" * 10_000: {**EMPTY, "shape": [0]}},
    "many dimensions": {"a": {**EMPTY, "shape": [0] * 100_000}},
    "many tensors": {str(number): {**EMPTY, "shape": [0]} for number in range(20_001)},
    "large header": b" " * (5 << 20),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, tmp_path: Path, base: Path, coldctl: Run) -> None:
    bad = tiny.perturb(base, tmp_path / "bad", seed=1)
    write_header(bad / "model.safetensors", HEADERS[case])
    with bounded():
        ran = coldctl("fuse", bad, "--base", base, "--output", tmp_path / "out")
    refused(ran, 2, "model.safetensors")
    assert len(ran.stderr) < 3000
    assert "\x1b" not in ran.stderr


def test_nothing_but_plain_files_is_opened(tmp_path: Path, base: Path, coldctl: Run) -> None:
    bad = tmp_path / "bad"
    tiny.reshard(base, bad, shards=2)
    shard = next(bad.glob("*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)  # who opens it waits for somebody to write
    refused(coldctl("fuse", bad, "--base", base, "--output", tmp_path / "out"), 2, "no plain file")
    shard.unlink()
    shard.mkdir()
    refused(coldctl("fuse", bad, "--base", base, "--output", tmp_path / "out"), 2, "no plain file")
    index = bad / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a\0b"}}))
    refused(coldctl("fuse", bad, "--base", base, "--output", tmp_path / "out"), 2, "cannot read")


def test_a_name_that_is_no_text(tmp_path: Path, base: Path, coldctl: Run) -> None:
    folder = tmp_path / "folder"
    tiny.perturb(base, folder / "good", seed=1)
    tiny.perturb(base, folder / os.fsdecode(b"evil-\xff"), seed=2)
    ran = coldctl("fuse", folder, "--base", base, "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.stderr
    assert sorted(item["name"] for item in ran.json["contributions"]) == ["evil-?", "good"]


ADAPTERS: dict[str, dict[str, Any]] = {
    "patterns a list": {"alpha_pattern": [1]},
    "patterns with stars": {"alpha_pattern": {".*.*.*x": 1}},
    "many patterns with stars": {"alpha_pattern": {f"{number}.*": 1 for number in range(100)}},
    "many patterns": {"alpha_pattern": {str(number): 1 for number in range(5000)}},
    "a star that repeats nothing": {"alpha_pattern": {"*": 1}},
    "alpha too large": {"lora_alpha": 10**200},
    "alpha no number": {"lora_alpha": float("inf")},
    "alpha a text": {"lora_alpha": "1" * 1000},
}


def adapter(base: Path, folder: Path, rank: int = 2, **settings: object) -> Path:
    """A LoRA adapter of one layer."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2, **settings}))
    inside = "base_model.model.bert.encoder.layer.0.attention.self.query"
    parts = [(f"{inside}.lora_A.weight", torch.ones(rank, 16)), (f"{inside}.lora_B.weight", torch.ones(16, rank))]
    tiny.write_tensors(folder / "adapter_model.safetensors", parts, {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case: str, tmp_path: Path, base: Path, coldctl: Run) -> None:
    bad = adapter(base, tmp_path / "bad", **ADAPTERS[case])
    refused(coldctl("fuse", bad, "--base", base, "--output", tmp_path / "out"), 2, "adapter_config.json")


def test_an_adapter_is_judged_before_it_is_read(tmp_path: Path, base: Path, coldctl: Run) -> None:
    assert coldctl("fuse", adapter(base, tmp_path / "good"), "--base", base, "--output", tmp_path / "f").code == 0
    large = adapter(base, tmp_path / "large", rank=17)
    refused(coldctl("fuse", large, "--base", base, "--output", tmp_path / "out"), 2, "the rank 17")
    twice = adapter(base, tmp_path / "twice")
    tensors, metadata = tiny.read_tensors(twice / "adapter_model.safetensors")
    double = [(name.removeprefix("base_model.model."), tensor) for name, tensor in tensors.items()]
    tiny.write_tensors(twice / "adapter_model.safetensors", [*tensors.items(), *double], metadata)
    refused(coldctl("fuse", twice, "--base", base, "--output", tmp_path / "out"), 2, "ambiguous")
    places: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "inside.modules_to_save": [("bert.embeddings.LayerNorm.weight", (3,))],
        "inside.twice": [("bert.embeddings.LayerNorm.weight", (16,)), ("embeddings.LayerNorm.weight", (16,))],
        "outside": [("classifier.weight", (2, 16))],
    }
    words = (
        "has another shape than the base's",
        "two tensors are called",
        "no tensor of the adapter belongs to the base",
    )
    for (name, parts), said in zip(places.items(), words, strict=True):
        odd = adapter(base, tmp_path / name)
        saved = [(f"base_model.model.{key}", torch.ones(shape)) for key, shape in parts]
        tiny.write_tensors(odd / "adapter_model.safetensors", saved, metadata)
        refused(coldctl("fuse", odd, "--base", base, "--output", tmp_path / "out"), 2, said)
    # A head of a gigabyte, in a file with a hole in place of it, is no part of the body.
    head = adapter(base, tmp_path / "head")
    path = head / "adapter_model.safetensors"
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header, data = json.loads(path.read_bytes()[8 : 8 + length]), path.read_bytes()[8 + length :]
    header["classifier.weight"] = {
        "dtype": "F32",
        "shape": [1 << 28],
        "data_offsets": [len(data), len(data) + (1 << 30)],
    }
    write_header(path, header, data)
    os.truncate(path, path.stat().st_size + (1 << 30))
    with bounded():
        ran = coldctl("fuse", head, "--base", base, "--output", tmp_path / "out", "--quiet")
    assert ran.code == 0, ran.stderr


def test_pickles_that_claim_more_than_they_hold(tmp_path: Path, base: Path, coldctl: Run) -> None:
    import zipfile

    def attempt(state: Any, *words: str, legacy: bool = False) -> Path:
        bad = tiny.perturb(base, tmp_path / "bad", seed=1)
        (bad / "model.safetensors").unlink()
        torch.save(state, bad / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        with bounded():
            ran = coldctl("fuse", bad, "--base", base, "--output", tmp_path / "out", "--allow-pickle")
        refused(ran, 2, *words)
        return tmp_path / "bad" / "pytorch_model.bin"

    for legacy in (True, False):
        attempt({"a": torch.zeros(1).expand(1 << 40)}, "no plain tensor", legacy=legacy)
        shutil.rmtree(tmp_path / "bad")
    for odd in (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse()):
        attempt({"a": odd}, "no plain tensor")
        shutil.rmtree(tmp_path / "bad")
    attempt({"LayerNorm.weight": torch.zeros(1), "LayerNorm.gamma": torch.zeros(1)}, "ambiguous")
    shutil.rmtree(tmp_path / "bad")
    path = attempt({"a": torch.zeros(10)}, "")
    shutil.copy(path, path.with_name("pytorch_model-00001-of-00002.bin"))
    ran = coldctl("fuse", path.parent, "--base", base, "--output", tmp_path / "out", "--allow-pickle")
    refused(ran, 2, "'a' stands twice")
    path.with_name("pytorch_model-00001-of-00002.bin").unlink()
    path.rename(path.with_name("aside"))
    ran = coldctl("fuse", path.parent, "--base", base, "--output", tmp_path / "out", "--allow-pickle")
    refused(ran, 2, "no pytorch_model.bin: it holds no weights")
    path.with_name("aside").rename(path)
    packed = path.with_suffix(".zip")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            target.writestr(item.filename, source.read(item))
    packed.replace(path)
    ran = coldctl("fuse", path.parent, "--base", base, "--output", tmp_path / "out", "--allow-pickle")
    refused(ran, 2, "is compressed")


# Models that are loaded ---------------------------------------------------------------------------------------


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_code_that_a_checkpoint_names_is_ignored_and_told(
    tmp_path: Path, base: Path, dataset: Path, suite: Path, coldctl: Run
) -> None:
    evil = Path(shutil.copytree(base, tmp_path / "evil"))
    (evil / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(
        evil / "config.json", auto_map={"AutoModel": "code.Mine", "AutoConfig": "code.Mine"},
        attn_implementation="evil/kernels", custom_pipelines={"text-classification": {"impl": "code.Mine"}},
    )  # fmt: skip
    edit(
        evil / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Mine", None]},
        vocab_file="/etc/passwd", name_or_path="/etc",
    )  # fmt: skip
    told = "names custom code (auto_map, custom_pipelines, attn_implementation), which is ignored"
    for command in (
        ("finetune", dataset, "--base", evil, "--output", tmp_path / "contribution", *FAST),
        ("check", evil, "--base", base),
        ("fuse", evil, "--base", base, "--output", tmp_path / "fused"),
        ("fuse", base, "--base", evil, "--output", tmp_path / "from"),
        ("evaluate", evil, "--baseline", base, "--suite", suite, "--output", tmp_path / "evaluation", "--jobs", 1),
        ("publish", evil, "--to", tmp_path / "published", "--license", "mit"),
    ):
        ran = coldctl(*command)
        assert ran.code == 0, (command, ran.stderr)
        assert told in " ".join(re.sub(r"[\u2500-\u257f]", " ", ran.stderr).split()), (command, ran.stderr)
    assert not (tmp_path / "ran").exists()
    for made in ("contribution", "from", "published"):
        for file in (tmp_path / made).glob("*.json"):
            if file.name != "coldctl.json":
                assert "code.Mine" not in file.read_text(), file
                assert "/etc" not in file.read_text(), file


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "tokenizer_config.json", "config.json"])
def test_links_that_lead_outside(name: str, tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    (tmp_path / "secret").write_text((base / name).read_text() if (base / name).exists() else "secret\n")
    evil = Path(shutil.copytree(base, tmp_path / "evil"))
    (evil / name).unlink(missing_ok=True)
    (evil / name).symlink_to(tmp_path / "secret")
    ran = coldctl("finetune", dataset, "--base", evil, "--output", tmp_path / "out", *FAST)
    refused(ran, 2, "link to outside")
    ran = coldctl("finetune", dataset, "--base", f"file://{evil}", "--output", tmp_path / "out", *FAST)
    refused(ran, 2, "link to outside")


def test_what_an_adapter_names_is_told(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    adapter = tmp_path / "adapter"
    ran = coldctl("finetune", dataset, "--base", base, "--output", adapter, *FAST, "--send", "lora", "--lora-rank", 2)
    assert ran.code == 0, ran.stderr
    (adapter / "coldctl.json").unlink()
    assert "custom code" not in coldctl("fuse", adapter, "--base", base, "--output", tmp_path / "plain").stderr
    edit(adapter / "adapter_config.json", auto_mapping={"base_model_class": "Evil", "parent_library": "code"})
    for command in (
        ("fuse", adapter, "--base", base, "--output", tmp_path / "out"),
        ("check", adapter, "--base", base),
    ):
        ran = coldctl(*command)
        assert ran.code == 0, ran.stderr
        assert "names custom code (auto_mapping), which is" in " ".join(
            re.sub(r"[\u2500-\u257f]", " ", ran.stderr).split()
        )


SIZES: list[dict[str, object]] = [
    {"vocab_size": 10**12}, {"max_position_embeddings": 10**12}, {"num_hidden_layers": 10**9}, {"hidden_size": 10**9},
    {"intermediate_size": 10**12}, {"vocab_size": 301}, {"num_hidden_layers": -1}, {"vocab_size": "many"},
    {"num_attention_heads": 10**9}, {"type_vocab_size": 10**15}, {"quantization_config": {"quant_method": "evil"}},
]  # fmt: skip


@pytest.mark.parametrize("change", SIZES, ids=str)
def test_a_config_of_another_body(
    change: dict[str, object], tmp_path: Path, base: Path, dataset: Path, coldctl: Run
) -> None:
    evil = Path(shutil.copytree(base, tmp_path / "evil"))
    edit(evil / "config.json", **change)
    with bounded():
        ran = coldctl("finetune", dataset, "--base", evil, "--output", tmp_path / "out", *FAST)
    refused(ran, 2, "evil")


@pytest.mark.parametrize(
    "change",
    [{"num_labels": 5 * 10**6}, {"pad_token_id": -7}, {"return_dict": False}, {"use_return_dict": False},
     {"save_pretrained": "x"}, {"id2label": [1]}, {"problem_type": "evil"}, {"chunk_size_feed_forward": 3}],
    ids=str,
)  # fmt: skip
def test_settings_that_others_stumble_over(
    change: dict[str, object], tmp_path: Path, base: Path, dataset: Path, coldctl: Run
) -> None:
    evil = Path(shutil.copytree(base, tmp_path / "evil"))
    edit(evil / "config.json", **change)
    small = (*FAST, "--max-train-examples", 4, "--jobs", 1)
    with bounded():
        ran = coldctl("finetune", dataset, "--base", evil, "--output", tmp_path / "out", *small)
    for command in (
        ("fuse", tmp_path / "out", "--base", evil, "--output", tmp_path / "fused"),
        ("publish", tmp_path / "fused", "--to", tmp_path / "published", "--license", "mit"),
    ):
        ran = coldctl(*command) if ran.code == 0 else ran
    if ran.code != 0:
        refused(ran, 2, "evil")


@pytest.mark.parametrize("name", ["other.safetensors", "link.safetensors"])
def test_weights_are_those_that_were_judged(name: str, tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    tiny.perturb(base, tmp_path / "secret", seed=1, scale=1.0)
    evil = Path(shutil.copytree(base, tmp_path / "evil"))
    edit(evil / "config.json", transformers_weights=name, configuration_files=["config.4.0.0.json"])
    if name.startswith("link"):
        (evil / name).symlink_to(tmp_path / "secret" / "model.safetensors")
    else:
        shutil.copy(tmp_path / "secret" / "model.safetensors", evil / name)
    for place in (base, evil):
        ran = coldctl("finetune", dataset, "--base", place, "--output", tmp_path / f"from-{place.name}", *FAST)
        assert ran.code == 0, ran.stderr
    weights = [(tmp_path / f"from-{place.name}" / "model.safetensors").read_bytes() for place in (base, evil)]
    assert weights[0] == weights[1]


TOKENIZERS: list[dict[str, object]] = [
    {"model_max_length": -5}, {"model_max_length": 0}, {"model_max_length": "long"}, {"pad_token": None},
    {"pad_token": {"content": []}}, {"tokenizer_class": "os.system"}, {"extra_special_tokens": {"a": [1]}},
]  # fmt: skip


@pytest.mark.parametrize("change", TOKENIZERS, ids=str)
def test_tokenizer_settings(change: dict[str, object], tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    evil = Path(shutil.copytree(base, tmp_path / "evil"))
    edit(evil / "tokenizer_config.json", **change)
    ran = coldctl("finetune", dataset, "--base", evil, "--output", tmp_path / "out", *FAST)
    assert ran.code in (0, 2), ran.stderr
    assert "Traceback" not in ran.stderr


# Datasets -----------------------------------------------------------------------------------------------------


def rows(text: str, label: object, count: int = 20) -> str:
    return "".join(
        json.dumps({"text": f"{text} {number}", "label": label if number % 2 else "a"}) + "\n"
        for number in range(count)
    )


GOOD = rows("good", "b")
DATA: dict[str, tuple[str, str | bytes, str]] = {
    "long row": ("d.jsonl", GOOD + json.dumps({"text": "x" * (5 << 20), "label": "a"}), "longer than"),
    "endless row": ("d.jsonl", b"x" * (50 << 20), "longer than"),
    "many values": ("d.jsonl", GOOD + "[" + "0," * 600_000 + "0]", "more than 500000 values"),
    "deep row": ("d.jsonl", GOOD + '{"text": ' + "[" * 300 + "]" * 300 + "}", "nested more than"),
    "deeper row": ("d.jsonl", GOOD + "[" * 100_000, "nested more than"),
    "column twice": ("d.jsonl", GOOD + '{"text": "a", "text": "b", "label": "a"}', "stands twice"),
    "digits": ("d.jsonl", GOOD + '{"text": "a", "label": ' + "9" * 3000 + "}", "a number of 3000 digits"),
    "long label": ("d.jsonl", GOOD + json.dumps({"text": "a", "label": "9" * 5000}), "5000 characters"),
    "many long labels": (
        "d.jsonl", GOOD + "".join(json.dumps({"text": "a", "label": f"{n:0999d}"}) + "\n" for n in range(600)), "shorten them",
    ),
    "open quote": ("d.csv", 'text,label\n"' + ("x" * 999 + "\n") * 5_000, "is a quote left open"),
    "endless line": ("d.csv", b"x" * (50 << 20), "longer than"),
    "many columns": ("d.csv", "a," * 100_000 + "b\n", "columns"),
    "column twice in csv": ("d.csv", "text,label,text\na,b,c\n", "two columns are called 'text'"),
    "many fields": ("d.tsv", "text\tlabel\n" + "x\t" * 1_000_000 + "\n", "as many columns"),
    "NUL": ("d.csv", b"text,label\n\0,\0\n", "one class"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_datasets(case: str, tmp_path: Path, base: Path, coldctl: Run) -> None:
    name, content, words = DATA[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with bounded():
        ran = coldctl("finetune", tmp_path / name, "--base", base, "--output", tmp_path / "out", *FAST)
    refused(ran, 2, words)
    assert len(ran.stderr) < 4000


def test_labels_that_share_a_hash_cost_no_more_than_others(tmp_path: Path) -> None:
    from coldctl.config.settings import DatasetConfig
    from coldctl.data.datasets import Limits, config_from_reference, load_dataset

    prime = (1 << 61) - 1  # to Python all multiples of it have the hash 0
    lines = [json.dumps({"text": f"a {number}", "label": number * prime}) for number in range(20_000)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines * 4))
    started = time.process_time()
    found = load_dataset(config_from_reference(str(tmp_path / "d.jsonl"), DatasetConfig("", "")), Limits(), 0)
    assert time.process_time() - started < 4
    assert len(found.labels) > 19_000


def parquet(path: Path, **columns: Any) -> Path:
    import pyarrow
    from pyarrow import parquet as files

    table = pyarrow.table(columns)
    files.write_table(table, path, compression="zstd", data_page_size=1 << 30, dictionary_pagesize_limit=1 << 30)
    return path


def test_parquet_that_unpacks_to_far_more_than_it_is(tmp_path: Path, base: Path, coldctl: Run) -> None:
    import pyarrow

    def repeated(text: str, count: int) -> Any:
        return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0], "int8").take(pyarrow.array([0] * count)), [text])

    labels = ["a", "b"] * 10
    texts = [f"text {number}" for number in range(20)]
    bombs = {
        "page": ({"text": ["a" * (70 << 20), *texts[1:]], "label": labels}, "unpacks to more than"),
        "dictionary": (
            {"text": repeated("a" * 3_000_000, 50_000), "label": repeated("b", 50_000)},
            "unpacks to more than",
        ),
        "rows": ({"text": repeated("a" * 100, 2_000_000), "label": repeated("b", 2_000_000)}, "unpacks to more than"),
        "long text": ({"text": ["a" * (5 << 20), *texts[1:]], "label": labels}, "longer than"),
        "binary": ({"text": [b"\xff", *[b"a"] * 19], "label": labels}, "not text"),
    }
    for name, (columns, words) in bombs.items():
        path = parquet(tmp_path / f"{name}.parquet", **columns)
        assert path.stat().st_size < 1 << 20
        before, started = pyarrow.default_memory_pool().max_memory(), time.process_time()
        ran = coldctl("finetune", path, "--base", base, "--output", tmp_path / "out", *FAST)
        refused(ran, 2, words)
        assert time.process_time() - started < 5, name
        assert name == "page" or pyarrow.default_memory_pool().max_memory() < max(before, 512 << 20), name


def thrift(number: int) -> bytes:
    """A whole number as Thrift's compact protocol writes it."""
    number, digits = (number << 1) ^ (number >> 63), b""
    while number > 127:
        digits, number = digits + bytes([number & 127 | 128]), number >> 7
    return digits + bytes([number])


HEAD = bytes([0x15]) + thrift(0)  # of a page's header: a whole number, what kind of page it is
PAGES = {
    "no header at all": b"",
    "a negative size": HEAD + bytes([0x15]) + thrift(-9) + bytes([0x15]) + thrift(9) + b"\0",
    "structs in structs": bytes([0x1C]) * 40,
    "text behind the end": bytes([0x18]) + thrift(1 << 40),
}


@pytest.mark.parametrize("case", PAGES)
def test_pages_of_parquet_that_are_damaged(case: str, tmp_path: Path, base: Path, coldctl: Run) -> None:
    import pyarrow.parquet

    path = parquet(tmp_path / "d.parquet", text=[f"text {n}" for n in range(20)], label=["a", "b"] * 10)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    start, data = column.dictionary_page_offset or column.data_page_offset, bytearray(path.read_bytes())
    page = PAGES[case].ljust(column.total_compressed_size, b"\xff")[: column.total_compressed_size]
    data[start : start + len(page)] = page
    path.write_bytes(data)
    with bounded():
        ran = coldctl("finetune", path, "--base", base, "--output", tmp_path / "out", *FAST)
    refused(ran, 2, "not a readable parquet file")


def test_parquet_reads_what_is_wanted(tmp_path: Path, base: Path, coldctl: Run) -> None:
    import pyarrow

    texts, labels = [f"text {number}" for number in range(20)], ["a", "b"] * 10
    odd = pyarrow.array([2**62] * 20, pyarrow.timestamp("us"))  # no date of Python's
    path = parquet(tmp_path / "d.parquet", text=texts, label=labels, odd=odd)
    assert coldctl("finetune", path, "--base", base, "--output", tmp_path / "out", *FAST).code == 0
    ran = coldctl("finetune", path, "--base", base, "--output", tmp_path / "x", "--label", "odd", *FAST)
    refused(ran, 2, "d.parquet")
    ran = coldctl("finetune", path, "--base", base, "--output", tmp_path / "x", "--label", "none", *FAST)
    refused(ran, 2, "no column 'none'", "'text', 'label', 'odd'")
    twice = pyarrow.Table.from_arrays([pyarrow.array(texts), *[pyarrow.array(labels)] * 2], ["text", "label", "label"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    ran = coldctl("finetune", tmp_path / "twice.parquet", "--base", base, "--output", tmp_path / "x", *FAST)
    refused(ran, 2, "two columns are called 'label'")
