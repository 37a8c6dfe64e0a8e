"""Fusing through the command line: exact, order-blind, and refusing what it should."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import Ran
from helpers import tiny
from helpers.bodies import body, digest, poison

Run = Callable[..., Ran]


def fuse(coldctl: Run, output: Path, base: Path, *inputs: object) -> Ran:
    ran = coldctl("fuse", *inputs, "--base", base, "--output", output, "--json")
    assert ran.code == 0, ran.stderr
    return ran


def test_the_mean_is_the_mean(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    fuse(coldctl, tmp_path / "fused", base, contributions)
    parts = [body(child) for child in sorted(contributions.iterdir())]
    for name, value in body(tmp_path / "fused").items():
        expected = np.mean([part[name].astype(np.float64) for part in parts], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-7, atol=1e-12)
    assert json.loads((tmp_path / "fused" / "coldctl.json").read_text())["body_digest"] == digest(tmp_path / "fused")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_copies_are_returned_bit_for_bit(dtype: str, count: int, tmp_path: Path, coldctl: Run) -> None:
    base = tiny.make_base("bert", tmp_path / "base", dtype="float32" if dtype == "float64" else dtype)
    if dtype == "float64":
        import torch

        for file, (tensors, metadata) in tiny._load(base).items():
            noise = torch.Generator().manual_seed(0)
            wide = [
                (
                    name,
                    t.double() + torch.randn(t.shape, generator=noise, dtype=torch.float64)
                    if t.is_floating_point()
                    else t,
                )
                for name, t in tensors.items()
            ]
            tiny.write_tensors(file, wide, metadata)
    model = tmp_path / "model"
    tiny.perturb(base, model, seed=3) if dtype != "float64" else shutil.copytree(base, model)
    copies = [shutil.copytree(model, tmp_path / f"copy-{number}") for number in range(count)]
    fuse(coldctl, tmp_path / "fused", base, *copies)
    assert digest(tmp_path / "fused") == digest(model)


def test_order_prefix_and_shards_change_no_bit(tmp_path: Path, base: Path, coldctl: Run) -> None:
    models = [tiny.perturb(base, tmp_path / f"model-{number}", seed=number) for number in range(5)]
    fuse(coldctl, tmp_path / "fused", base, *models)
    fuse(coldctl, tmp_path / "reversed", base, *reversed(models))
    for number, model in enumerate(models):
        tiny.reshard(model, tmp_path / "other" / model.name, shards=1 + number, prefix="bert.", reverse=number % 2 == 0)
    fuse(coldctl, tmp_path / "resharded", base, tmp_path / "other")
    one = (tmp_path / "fused" / "model.safetensors").read_bytes()
    assert one == (tmp_path / "reversed" / "model.safetensors").read_bytes()
    assert one == (tmp_path / "resharded" / "model.safetensors").read_bytes()


def test_equal_names_are_ordered_by_their_bodies(tmp_path: Path, base: Path, coldctl: Run) -> None:
    places = [tmp_path / side / "model" for side in ("left", "middle", "right")]
    for seed, place in enumerate(places):
        tiny.perturb(base, place, seed=seed, scale=10.0**seed)
    fuse(coldctl, tmp_path / "a", base, *places)
    ran = fuse(coldctl, tmp_path / "b", base, places[2], places[0], places[1])
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert [item["name"] for item in ran.json["contributions"]] == ["model", "model-2", "model-3"]


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("head", ["sequence", "token", "question", "masked-lm"])
def test_heads_of_every_kind_are_dropped(kind: str, head: str, tmp_path: Path, coldctl: Run) -> None:
    base = tiny.make_base(kind, tmp_path / "base")
    try:
        other = tiny.make_base(kind, tmp_path / "other", seed=1, head=head)  # type: ignore[arg-type]
    except ValueError:
        pytest.skip("transformers has no such class")
    fuse(coldctl, tmp_path / "fused", base, other, other)
    fused, expected, start = body(tmp_path / "fused"), body(other), body(base)
    for name, value in fused.items():
        np.testing.assert_array_equal(value, expected.get(name, start[name]))
    assert set(fused) == set(start)


def test_sharded_output(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    from transformers import AutoModel

    fuse(coldctl, tmp_path / "one", base, contributions)
    fuse(coldctl, tmp_path / "many", base, contributions, "--max-shard-size", "20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert digest(tmp_path / "many") == digest(tmp_path / "one")
    _, report = AutoModel.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not report["missing_keys"]


def test_mixed_dtypes_and_output_dtype(tmp_path: Path, base: Path, coldctl: Run) -> None:
    half = tiny.make_base("bert", tmp_path / "half", seed=1, dtype="bfloat16")
    full = tiny.perturb(base, tmp_path / "full", seed=2)
    fuse(coldctl, tmp_path / "fused", base, half, full)
    name = "embeddings.word_embeddings.weight"
    expected = (body(half)[name].astype(np.float64) + body(full)[name].astype(np.float64)) / 2
    np.testing.assert_array_equal(body(tmp_path / "fused")[name], expected.astype(np.float32))
    fuse(coldctl, tmp_path / "small", base, half, full, "--dtype", "bfloat16")
    assert body(tmp_path / "small")[name].dtype == "bfloat16"


def test_tensors_of_unlike_widths(tmp_path: Path, base: Path, coldctl: Run) -> None:
    """The file goes by width and the digest by name: the digest is taken from what was written."""
    tensors, metadata = tiny.read_tensors(base / "model.safetensors")
    mixed = Path(shutil.copytree(base, tmp_path / "mixed"))
    wide = {
        name: value.double() if number % 3 else value for number, (name, value) in enumerate(sorted(tensors.items()))
    }
    tiny.write_tensors(mixed / "model.safetensors", list(wide.items()), metadata)
    gifts = [tiny.perturb(mixed, tmp_path / f"gift-{seed}", seed=seed) for seed in (1, 2)]
    fuse(coldctl, tmp_path / "fused", mixed, *gifts)
    found, parts = body(tmp_path / "fused"), [body(gift) for gift in gifts]
    assert {value.dtype.name for value in found.values()} == {"float32", "float64"}
    for name, value in found.items():
        mean = (parts[0][name].astype(np.float64) + parts[1][name].astype(np.float64)) / 2
        np.testing.assert_allclose(value, mean, rtol=1e-6, atol=1e-7)
    assert coldctl("check", tmp_path / "fused", "--deep").code == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(value: float, tmp_path: Path, base: Path, coldctl: Run) -> None:
    good = [tiny.perturb(base, tmp_path / f"good-{number}", seed=number) for number in range(3)]
    bad = poison(good[0], tmp_path / "bad", value)
    ran = coldctl("fuse", *good, bad, "--base", base, "--output", tmp_path / "fused")
    assert ran.code == 2
    assert "bad: embeddings.word_embeddings.weight" in ran.stderr
    assert not (tmp_path / "fused").exists()
    assert not (tmp_path / ".fused.partial").exists()
    ran = coldctl("fuse", *good, bad, "--base", base, "--output", tmp_path / "fused", "--screen", "reject", "--json")
    assert ran.code == 0, ran.stderr
    assert [item["status"] for item in ran.json["contributions"]] == ["rejected", "fused", "fused", "fused"]
    fuse(coldctl, tmp_path / "clean", base, *good)
    assert digest(tmp_path / "fused") == digest(tmp_path / "clean")
    ran = coldctl("fuse", *good, bad, "--base", base, "--output", tmp_path / "s", "--screen", "reject", "--strict")
    assert ran.code == 3
    assert not (tmp_path / "s").exists()
    ran = coldctl("fuse", good[0], bad, "--base", base, "--output", tmp_path / "t", "--screen", "reject")
    assert ran.code == 2
    assert "only 1 of 2" in ran.stderr
    bad_base = poison(base, tmp_path / "bad-base", value)
    ran = coldctl("fuse", *good, "--base", bad_base, "--output", tmp_path / "u")
    assert ran.code == 2
    assert "embeddings.word_embeddings.weight holds a not-a-number or infinity: take a sound base model" in ran.stderr


def test_what_does_not_fit_is_listed_in_full(tmp_path: Path, base: Path, coldctl: Run) -> None:
    good = tiny.perturb(base, tmp_path / "good", seed=1)
    roberta = tiny.make_base("roberta", tmp_path / "roberta")
    lacking = tmp_path / "lacking"
    shutil.copytree(good, lacking)
    tensors, metadata = tiny.read_tensors(lacking / "model.safetensors")
    tensors.pop("encoder.layer.0.attention.self.query.weight")
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][:-1].clone()
    tiny.write_tensors(lacking / "model.safetensors", list(tensors.items()), metadata)
    odd = Path(shutil.copytree(good, tmp_path / "odd"))
    tensors, metadata = tiny.read_tensors(odd / "model.safetensors")
    last = "encoder.layer.1.output.dense"
    tensors |= {f"{last}.bias": tensors[f"{last}.bias"][:-1].clone(), f"{last}.weight": tensors[f"{last}.weight"].int()}
    tiny.write_tensors(odd / "model.safetensors", list(tensors.items()), metadata)
    ran = coldctl("fuse", good, roberta, lacking, odd, "--base", base, "--output", tmp_path / "fused", "--json")
    assert ran.code == 2
    details = ran.json["details"]
    assert any("is a roberta model" in line for line in details)
    assert any("lacks encoder.layer.0.attention.self.query.weight" in line for line in details)
    assert any("another vocabulary" in line for line in details)
    assert any(f"{last}.bias is 15, the base's is 16: another shape" in line for line in details)
    assert any(f"{last}.weight is stored as I32, the base's as F32" in line for line in details)
    assert not (tmp_path / "fused").exists()


def test_another_base_is_refused(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    other = tiny.perturb(base, tmp_path / "other-base", seed=9)
    ran = coldctl("fuse", contributions, "--base", other, "--output", tmp_path / "fused")
    assert ran.code == 2
    assert "another base" in ran.stderr
    assert "iteration 1" in ran.stderr
    fuse(coldctl, tmp_path / "fused", other, contributions, "--allow-other-base")


def test_changed_contribution_is_noticed(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    for victim in ("model.safetensors", "config.json", "tokenizer.json", "coldctl.json"):
        folder = tmp_path / victim
        shutil.copytree(contributions, folder)
        path = folder / "two" / victim
        data = bytearray(path.read_bytes())
        where = data.index(b'"') + 1 if victim == "coldctl.json" else len(data) - 3
        data[where] ^= 0x01
        path.write_bytes(bytes(data))
        ran = coldctl("fuse", folder, "--base", base, "--output", tmp_path / "fused")
        assert ran.code == 2, victim
        assert "two: " in ran.stderr
        assert not (tmp_path / "fused").exists()
    unproven = (
        "fuse",
        tmp_path / "model.safetensors",
        "--base",
        base,
        "--no-verify",
        "--output",
        tmp_path / "unproven",
    )
    ran = coldctl(*unproven, "--json")
    assert ran.code == 0, ran.stderr
    assert not any(item["verified"] for item in ran.json["contributions"])
    for name, words in (("special_tokens_map.json", "is missing"), ("training.png", "is a link to outside")):
        folder = Path(shutil.copytree(contributions, tmp_path / f"without-{name}"))
        (folder / "two" / name).rename(tmp_path / name)
        fuse = ("fuse", folder, "--base", base, "--screen", "reject", "--json", "--output")
        if name == "training.png":  # a picture need not be there
            statuses = [item["status"] for item in coldctl(*fuse, tmp_path / "less").json["contributions"]]
            assert statuses == ["fused"] * 3
            (folder / "two" / name).symlink_to(tmp_path / name)
            assert words in coldctl("check", folder / "two", "--deep", "--json").stdout
        records = coldctl(*fuse, tmp_path / words).json["contributions"]
        assert sorted(item["status"] for item in records) == ["fused", "fused", "rejected"]
        (reason,) = (item["reason"] for item in records if item["status"] == "rejected")
        assert words in reason


def test_a_pooler_that_one_side_lacks(tmp_path: Path, base: Path, coldctl: Run) -> None:
    poolerless = tmp_path / "poolerless"
    tiny.perturb(base, poolerless, seed=1)
    tensors, metadata = tiny.read_tensors(poolerless / "model.safetensors")
    rest = [(name, tensor) for name, tensor in tensors.items() if not name.startswith("pooler.")]
    tiny.write_tensors(poolerless / "model.safetensors", rest, metadata)
    other = tiny.perturb(base, tmp_path / "other", seed=2)
    fuse(coldctl, tmp_path / "fused", base, poolerless, other)
    name = "pooler.dense.weight"
    expected = (body(base)[name].astype(np.float64) + body(other)[name].astype(np.float64)) / 2
    np.testing.assert_array_equal(body(tmp_path / "fused")[name], expected.astype(np.float32))
    fuse(coldctl, tmp_path / "bare", poolerless, base, other)
    assert name not in body(tmp_path / "bare")


def test_old_norm_names_count_as_the_new_ones(tmp_path: Path, base: Path, coldctl: Run) -> None:
    old = tmp_path / "old"
    tiny.perturb(base, old, seed=1)
    new_digest = digest(old)
    tensors, metadata = tiny.read_tensors(old / "model.safetensors")
    renamed = [
        (name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"), tensor)
        for name, tensor in tensors.items()
    ]
    tiny.write_tensors(old / "model.safetensors", renamed, metadata)
    assert digest(old) == new_digest
    fuse(coldctl, tmp_path / "fused", base, old)
    assert digest(tmp_path / "fused") == new_digest


def test_skipped_children_are_said(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(contributions, folder)
    (folder / "notes").mkdir()
    shutil.copytree(folder / "one", folder / ".four.partial")
    ran = coldctl("fuse", folder, "--base", base, "--output", tmp_path / "fused")
    assert ran.code == 0
    assert "skipped notes" in ran.stderr
    assert "skipped .four.partial" in ran.stderr


def test_check_sees_what_fuse_refuses(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    assert coldctl("check", contributions, "--base", base).code == 0
    roberta = tiny.make_base("roberta", tmp_path / "roberta")
    ran = coldctl("check", contributions, roberta, "--base", base, "--json")
    assert ran.code == 3
    assert [bool(item["problems"]) for item in ran.json["checked"]].count(True) == 1
    assert ran.json["not_examined"]
    bad = poison(tiny.perturb(base, tmp_path / "good", seed=1), tmp_path / "bad", float("nan"))
    assert coldctl("check", bad, "--base", base).code == 0
    ran = coldctl("check", bad, "--base", base, "--deep")
    assert ran.code == 3
    assert "infinity" in ran.stderr


def test_every_flipped_bit_is_found(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    """One bit anywhere in the weights: header, head or body, at its ends and at seeded places between."""
    folder = tmp_path / "folder"
    shutil.copytree(contributions, folder)
    path = folder / "two" / "model.safetensors"
    data = path.read_bytes()
    places = [0, 8, 9, len(data) - 1, *np.random.default_rng(0).integers(0, len(data), 40).tolist()]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(changed))
        ran = coldctl("fuse", folder, "--base", base, "--output", tmp_path / "fused", "--screen", "off")
        assert ran.code == 2, place
        assert not (tmp_path / "fused").exists()
    path.write_bytes(data)
    fuse(coldctl, tmp_path / "fused", base, folder)
