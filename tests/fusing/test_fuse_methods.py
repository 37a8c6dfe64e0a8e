"""Every merge method through the command line, against whole-model computations that share no code with it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coldctl.common.digests import digest_of
from coldctl.common.errors import ConfigError
from coldctl.fusing import methods
from coldctl.fusing.recipe import normalised
from conftest import Ran
from helpers import tiny
from helpers.bodies import body, digest, poison

Run = Callable[..., Ran]
Body = dict[str, NDArray[Any]]
COUNT = 7


@pytest.fixture(scope="module")
def models(workshop: Path, base: Path) -> list[Path]:
    folder = workshop / "method-inputs"
    return [tiny.perturb(base, folder / f"model-{number}", seed=number, scale=0.02) for number in range(COUNT)]


def fused(coldctl: Run, output: Path, base: Path, models: Sequence[Path], *flags: object) -> Body:
    ran = coldctl("fuse", *models, "--base", base, "--output", output, *flags)
    assert ran.code == 0, ran.stderr
    return body(output)


def manifest(output: Path) -> Any:
    return json.loads((output / "coldctl.json").read_text())


def flat(part: Body) -> NDArray[np.float64]:
    return np.concatenate([part[name].astype(np.float64).reshape(-1) for name in sorted(part)])


def close(found: Body, expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(flat(found), expected, rtol=2e-6, atol=1e-8)


def test_scale(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    start, parts = flat(body(base)), np.stack([flat(body(model)) for model in models])
    mean = parts.mean(0)
    fused(coldctl, tmp_path / "mean", base, models)
    for flags in (("--scale", 1), ("--method", "task-arithmetic"), ("--weights", "equal")):
        fused(coldctl, tmp_path / str(flags), base, models, *flags)
        assert digest(tmp_path / str(flags)) == digest(tmp_path / "mean")
    fused(coldctl, tmp_path / "zero", base, models, "--scale", 0)
    assert digest(tmp_path / "zero") == digest(base)
    close(fused(coldctl, tmp_path / "two", base, models, "--scale", 2.5), start + 2.5 * (mean - start))
    updates = parts - start
    wanted = np.linalg.norm(updates, axis=1).mean()
    for name, factor in (("auto", 1.0), ("0.5*auto", 0.5)):
        found = flat(fused(coldctl, tmp_path / name.replace("*", "x"), base, models, "--scale", name))
        assert np.linalg.norm(found - start) == pytest.approx(factor * wanted, rel=1e-4)
    scale = manifest(tmp_path / "auto")["config"]["effective_scale"]
    assert scale == pytest.approx(wanted / np.linalg.norm(mean - start), rel=1e-5)
    fused(coldctl, tmp_path / "still", base, [base, base], "--scale", "auto")
    assert digest(tmp_path / "still") == digest(base)


@pytest.mark.parametrize("method", ["median", "trimmed-mean", "ties", "dare", "geometric-median", "multi-krum"])
def test_auto_scale_gives_any_method_the_mean_norm(
    method: str, tmp_path: Path, base: Path, models: list[Path], coldctl: Run
) -> None:
    start = flat(body(base))
    norms = [np.linalg.norm(flat(body(model)) - start) for model in models]
    found = flat(fused(coldctl, tmp_path / "out", base, models, "--method", method, "--scale", "auto"))
    assert np.linalg.norm(found - start) == pytest.approx(np.mean(norms), rel=0.02)


def test_weights(tmp_path: Path, base: Path, models: list[Path], contributions: Path, coldctl: Run) -> None:
    table = {model.name: float(index) for index, model in enumerate(models)}
    parts = np.stack([flat(body(model)) for model in models])
    (tmp_path / "w.json").write_text(json.dumps(table))
    (tmp_path / "w.toml").write_text("".join(f"{name} = {7 * value}\n" for name, value in table.items()))
    one = fused(coldctl, tmp_path / "json", base, models, "--weights", tmp_path / "w.json")
    close(one, np.average(parts, axis=0, weights=list(table.values())))
    found = {item["name"]: item["weight"] for item in manifest(tmp_path / "json")["contributions"]}
    assert sum(found.values()) == pytest.approx(1)
    assert found["model-6"] == pytest.approx(6 / 21)
    assert str(tmp_path) not in (tmp_path / "json" / "coldctl.json").read_text()
    two = fused(coldctl, tmp_path / "toml", base, models, "--weights", tmp_path / "w.toml")
    np.testing.assert_allclose(flat(two), flat(one), rtol=1e-6)
    ran = coldctl("fuse", contributions, "--base", base, "--output", tmp_path / "e", "--weights", "examples", "--json")
    assert [item["weight"] for item in ran.json["contributions"]] == pytest.approx([1 / 3] * 3)
    ran = coldctl("fuse", *models, "--base", base, "--output", tmp_path / "no", "--weights", "examples")
    assert ran.code == 2
    assert "how many training examples" in ran.stderr
    for text, words in (("{}", "gives no weight"), ('{"model-0": "x"}', "name = weight"), ("{", "cannot be read")):
        (tmp_path / "bad.json").write_text(text)
        ran = coldctl("fuse", *models, "--base", base, "--output", tmp_path / "no", "--weights", tmp_path / "bad.json")
        assert ran.code == 2
        assert words in ran.stderr


@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e6), min_size=1, max_size=12), st.floats(0.05, 1))
def test_normalised_weights(shares: list[float], largest: float) -> None:
    try:
        weights = normalised(shares, largest)
    except ConfigError:
        assert sum(shares) <= 0 or largest * np.count_nonzero(shares) < 1
        return
    assert weights.sum() == pytest.approx(1)
    assert weights.max() <= largest * (1 + 1e-9)
    order = np.argsort(shares, kind="stable")
    assert np.all(np.diff(weights[order]) >= -1e-12)


def test_median_and_trimmed_mean(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    parts = np.stack([flat(body(model)) for model in models])
    close(fused(coldctl, tmp_path / "odd", base, models, "--method", "median"), np.median(parts, axis=0))
    close(fused(coldctl, tmp_path / "even", base, models[:4], "--method", "median"), np.median(parts[:4], axis=0))
    trimmed = np.sort(parts, axis=0)[2:5].mean(0)
    close(fused(coldctl, tmp_path / "trim", base, models, "--method", "trimmed-mean", "--trim", 0.3), trimmed)


def test_ties(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    start, parts = body(base), [body(model) for model in models]
    found = fused(coldctl, tmp_path / "ties", base, models, "--method", "ties", "--density", 0.3, "--scale", 1.5)
    for name, origin in start.items():
        updates = np.stack([part[name].astype(np.float64) - origin for part in parts]).reshape(COUNT, -1)
        kept = max(1, int(0.3 * updates.shape[1]))
        for row in updates:
            row[np.argsort(-np.abs(row), kind="stable")[kept:]] = 0
        sign = np.where(updates.sum(0) >= 0, 1, -1)
        agree = np.sign(updates) == sign
        step = (updates * agree).sum(0) / np.maximum(agree.sum(0), 1)
        np.testing.assert_allclose(found[name].reshape(-1), origin.reshape(-1) + 1.5 * step, rtol=2e-6, atol=1e-8)


def test_dare(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    start, parts = flat(body(base)), np.stack([flat(body(model)) for model in models])
    flags = ("--method", "dare", "--density", 0.5)
    one = fused(coldctl, tmp_path / "one", base, models, *flags)
    again = fused(coldctl, tmp_path / "again", base, list(reversed(models)), *flags)
    assert digest(tmp_path / "one") == digest(tmp_path / "again")
    other = fused(coldctl, tmp_path / "other", base, models, *flags, "--seed", 1)
    assert not np.array_equal(flat(one), flat(other))
    np.testing.assert_array_equal(flat(one), flat(again))
    updates = 2 * (parts - start)
    one_model = flat(fused(coldctl, tmp_path / "single", base, models[:1], *flags)) - start
    dropped = np.isclose(one_model, 0, atol=1e-7)
    assert 0.48 < dropped.mean() < 0.52
    np.testing.assert_allclose(one_model[~dropped], updates[0][~dropped], rtol=1e-3, atol=1e-6)
    close(fused(coldctl, tmp_path / "all", base, models, "--method", "dare", "--density", 1), parts.mean(0))


def test_dares_draws_do_not_depend_on_blocks() -> None:
    generator = np.random.default_rng(0)
    base, part = generator.normal(size=100), generator.normal(size=100)
    weights = np.ones(1)
    whole = methods.dare([part], base, weights, 0.5, ["k"], "t", 0, 3)
    pieces = [
        methods.dare([part[a:b]], base[a:b], weights, 0.5, ["k"], "t", a, 3)
        for a, b in ((0, 1), (1, 7), (7, 50), (50, 100))
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_model_stock_and_slerp(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    start, parts = body(base), [body(model) for model in models[:3]]
    found = fused(coldctl, tmp_path / "stock", base, models[:3], "--method", "model-stock")
    for name, origin in start.items():
        updates = [(part[name].astype(np.float64) - origin).reshape(-1) for part in parts]
        cosine = np.mean([
            a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for i, a in enumerate(updates) for b in updates[i + 1 :]
        ])  # fmt: skip
        share = np.clip(3 * cosine / (1 + 2 * cosine), 0, 1)
        mean = np.mean([part[name].astype(np.float64) for part in parts], axis=0)
        np.testing.assert_allclose(found[name], share * mean + (1 - share) * origin, rtol=1e-5, atol=1e-7)
    far = [tiny.perturb(base, tmp_path / f"far-{seed}", seed=seed, scale=1.0) for seed in (1, 2)]
    found = fused(coldctl, tmp_path / "slerp", base, far, "--method", "slerp", "--position", 0.25)
    one, two = (body(path) for path in far)
    for name, value in found.items():
        a, b = (part[name].astype(np.float64).reshape(-1) for part in (one, two))
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        angle = np.arccos(cosine)
        expected = (np.sin(0.75 * angle) * a + np.sin(0.25 * angle) * b) / np.sin(angle)
        if abs(cosine) > 0.9995:
            expected = 0.75 * a + 0.25 * b
        np.testing.assert_allclose(value.reshape(-1), expected, rtol=1e-4, atol=1e-6)
    ran = coldctl("fuse", *models, "--base", base, "--output", tmp_path / "x", "--method", "slerp")
    assert ran.code == 2
    assert "two contributions" in ran.stderr


def test_krum_leaves_attackers_out(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    evil = [tiny.perturb(base, tmp_path / f"evil-{seed}", seed=90 + seed, scale=1.0) for seed in range(2)]
    flags = ("--method", "multi-krum", "--byzantine", 2, "--screen", "report")
    fused(coldctl, tmp_path / "krum", base, [*models, *evil], *flags)
    weights = {item["name"]: item["weight"] for item in manifest(tmp_path / "krum")["contributions"]}
    assert weights["evil-0"] == weights["evil-1"] == 0
    assert sorted(weights.values())[-5:] == pytest.approx([1 / 5] * 5)
    kept = [path for path in models if weights[path.name]]
    fused(coldctl, tmp_path / "kept", base, kept)
    assert digest(tmp_path / "kept") == digest(tmp_path / "krum")
    ran = coldctl("fuse", *models[:4], "--base", base, "--output", tmp_path / "x", *flags)
    assert ran.code == 2
    assert "needs 7 contributions" in ran.stderr


def test_whom_screening_drops_krum_need_not_bear(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    """Seven offered, one of them not a number: of two attackers that are expected one is left, and six are enough."""
    broken = poison(models[5], tmp_path / "broken", float("nan"))
    odd = tiny.perturb(base, tmp_path / "odd", seed=91, scale=0.027)  # too little for screening
    flags = ("--method", "multi-krum", "--byzantine", 2, "--screen", "reject")
    ran = coldctl("fuse", *models[:5], broken, odd, "--base", base, "--output", tmp_path / "krum", *flags)
    assert ran.code == 0, ran.stderr
    assert "dropped 1, who count among the attackers of --byzantine 2: 1 are left" in ran.stderr
    made = manifest(tmp_path / "krum")
    assert made["config"]["byzantine"] == 1
    weights = {item["name"]: item.get("weight") for item in made["contributions"] if item["status"] == "fused"}
    assert (len(weights), weights["odd"], sum(map(bool, weights.values()))) == (6, 0, 3)
    fused(coldctl, tmp_path / "again", base, [*models[:5], odd], "--method", "multi-krum", "--byzantine", 1)
    assert digest(tmp_path / "again") == digest(tmp_path / "krum")
    fewer = ("fuse", tmp_path / "krum", "--without", models[0].name, *models[:5], odd, "--base", base)
    ran = coldctl(*fewer, "--output", tmp_path / "fewer")
    assert ran.code == 0, ran.stderr


def test_fuse_leaves_its_output_alone_after_screening_dropped_an_attacker(
    tmp_path: Path, base: Path, models: list[Path], coldctl: Run
) -> None:
    broken = poison(models[5], tmp_path / "broken", float("nan"))
    flags = ("--method", "multi-krum", "--byzantine", 2, "--screen", "reject")
    command = ("fuse", *models[:6], broken, "--base", base, "--output", tmp_path / "out", *flags)
    assert coldctl(*command).code == 0
    again = coldctl(*command)
    assert again.code == 0, again.stderr
    assert "left alone" in again.stderr


def test_geometric_median(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    evil = tiny.perturb(base, tmp_path / "evil", seed=99, scale=5.0)
    inputs = [*models, evil]
    found = flat(fused(coldctl, tmp_path / "gm", base, inputs, "--method", "geometric-median"))
    parts = np.stack([flat(body(model)) for model in inputs])
    guess = parts.mean(0)
    for _ in range(500):
        inverse = 1 / np.linalg.norm(parts - guess, axis=1)
        guess = inverse @ parts / inverse.sum()
    np.testing.assert_allclose(found, guess, rtol=1e-3, atol=1e-5)
    assert np.linalg.norm(found - parts[:-1].mean(0)) < 0.1 * np.linalg.norm(parts.mean(0) - parts[:-1].mean(0))


def test_fisher(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    import torch

    copies = [Path(shutil.copytree(model, tmp_path / model.name)) for model in models[:3]]
    ran = coldctl("fuse", *copies, "--base", base, "--output", tmp_path / "x", "--method", "fisher")
    assert ran.code == 2
    assert "fisher.safetensors is missing" in ran.stderr
    information = []
    for seed, copy in enumerate(copies):
        generator = np.random.default_rng(seed)
        diagonal = {name: generator.random(value.shape).astype(np.float32) for name, value in body(copy).items()}
        diagonal["pooler.dense.bias"][:] = 0
        tiny.write_tensors(
            copy / "fisher.safetensors", [(k, torch.from_numpy(v)) for k, v in diagonal.items()], {"format": "pt"}
        )
        information.append(diagonal)
    found = fused(coldctl, tmp_path / "fisher", base, copies, "--method", "fisher")
    parts = [body(copy) for copy in copies]
    for name, value in found.items():
        weights = np.stack([diagonal[name] for diagonal in information]).astype(np.float64)
        if name == "pooler.dense.bias":
            weights[:] = 1
        expected = (weights * np.stack([part[name] for part in parts])).sum(0) / weights.sum(0)
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
def test_the_outer_optimizer_over_two_iterations(
    optimizer: str, tmp_path: Path, base: Path, models: list[Path], coldctl: Run
) -> None:
    flags = ("--outer-optimizer", optimizer, "--outer-lr", 0.5, "--outer-momentum", 0.8)
    theta = flat(body(base))
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    start = base
    for number, inputs in enumerate((models[:3], models[3:])):
        where = tmp_path / f"fused-{number}"
        found = fused(coldctl, where, start, inputs, *flags)
        gradient = theta - np.mean([flat(body(model)) for model in inputs], axis=0)
        if optimizer == "adam":
            first, second = 0.8 * first + 0.2 * gradient, 0.99 * second + 0.01 * gradient**2
            theta = theta - 0.5 * first / (np.sqrt(second) + 1e-3)
        else:
            first = 0.8 * first + gradient
            theta = theta - 0.5 * (gradient + 0.8 * first if optimizer == "nesterov" else first)
        np.testing.assert_allclose(flat(found), theta, rtol=1e-4, atol=1e-6)
        start = where
    copied = Path(shutil.copytree(tmp_path / "fused-0", tmp_path / "elsewhere"))
    fused(coldctl, tmp_path / "continued", copied, models[3:], *flags)
    assert digest(tmp_path / "continued") == digest(tmp_path / "fused-1")
    state = "outer_momentum.safetensors"
    assert (tmp_path / "continued" / state).read_bytes() == (tmp_path / "fused-1" / state).read_bytes()
    from transformers import AutoModel

    _, report = AutoModel.from_pretrained(tmp_path / "fused-1", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_a_plain_outer_step_is_the_mean(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    mean = fused(coldctl, tmp_path / "mean", base, models)
    step = fused(
        coldctl, tmp_path / "sgd", base, models, "--outer-optimizer", "sgd", "--outer-lr", 1, "--outer-momentum", 0
    )
    np.testing.assert_allclose(flat(step), flat(mean), rtol=1e-7)
    ran = coldctl("fuse", *models, "--base", base, "--output", tmp_path / "x", "--scale", 2, "--outer-lr", 1)
    assert ran.code == 2
    assert "exclude each other" in ran.stderr


def test_outliers_are_flagged_and_rejected(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    long = tiny.perturb(base, tmp_path / "long", seed=50, scale=2.0)
    inputs = [*models, long]
    ran = coldctl("fuse", *inputs, "--base", base, "--output", tmp_path / "report", "--json")
    assert "long stands out" in ran.stderr
    notes = {item["name"]: item["notes"] for item in ran.json["contributions"]}
    assert [name for name, found in notes.items() if any("outlier" in note for note in found)] == ["long"]
    shares = ran.json["contributions"][0]["update_share"]
    assert sum(shares.values()) == pytest.approx(1)
    assert {"embeddings", "layer 0", "layer 1"} <= set(shares)
    assert (tmp_path / "report" / "fuse.png").read_bytes().startswith(b"\x89PNG")
    ran = coldctl("fuse", *inputs, "--base", base, "--output", tmp_path / "reject", "--screen", "reject", "--json")
    assert {item["name"]: item["status"] for item in ran.json["contributions"]}["long"] == "rejected"
    fused(coldctl, tmp_path / "clean", base, models)
    assert digest(tmp_path / "clean") == digest(tmp_path / "reject")
    fused(coldctl, tmp_path / "scaled", base, inputs, "--screen", "reject", "--scale", "auto")
    fused(coldctl, tmp_path / "scaled-clean", base, models, "--scale", "auto")
    assert digest(tmp_path / "scaled") == digest(tmp_path / "scaled-clean")
    ran = coldctl(
        "fuse", *models[:3], long, "--base", base, "--output", tmp_path / "few", "--screen", "reject", "--json"
    )
    assert {item["status"] for item in ran.json["contributions"]} == {"fused"}  # no verdict below five
    fused(coldctl, tmp_path / "off", base, inputs, "--screen", "off")
    assert manifest(tmp_path / "off")["contributions"][0]["update_norm"] is None
    assert not (tmp_path / "off" / "fuse.png").exists()


def test_withdrawing(tmp_path: Path, base: Path, contributions: Path, coldctl: Run) -> None:
    run = tmp_path / "iteration-001"
    shutil.copytree(contributions, run / "contributions")
    fused(coldctl, run / "fused", base, [run / "contributions"])
    rest = [child for child in sorted(contributions.iterdir()) if child.name != "two"]
    fused(coldctl, tmp_path / "expected", base, rest)
    two = manifest(contributions / "two")["name"]
    ran = coldctl("fuse", run / "fused", "--without", two, "--base", base, "--output", tmp_path / "exact")
    assert ran.code == 0, ran.stderr
    assert "exactly" in ran.stderr
    assert digest(tmp_path / "exact") == digest(tmp_path / "expected")
    moved = Path(shutil.copytree(run / "fused", tmp_path / "moved"))
    old = manifest(moved)  # of a version that could leave each one out in turn
    old["config"]["leave_one_out"] = True
    del old["manifest_digest"]
    old["manifest_digest"] = digest_of(old)
    (moved / "coldctl.json").write_text(json.dumps(old))
    near = ("fuse", moved, contributions, "--without", two, "--base", base, "--output", tmp_path / "elsewhere")
    ran = coldctl(*near)
    assert ran.code == 0, ran.stderr
    assert digest(tmp_path / "elsewhere") == digest(tmp_path / "expected")
    assert "left alone" in coldctl(*near).stderr
    one = manifest(contributions / "one")["name"]
    next_one = ("fuse", tmp_path / "exact", contributions, "--without", one, "--base", base)
    assert coldctl(*next_one, "--output", tmp_path / "both").code == 0
    assert digest(tmp_path / "both") == digest(contributions / "three")
    ran = coldctl("fuse", moved, contributions / "two", "--without", two, "--base", base, "--output", tmp_path / "x")
    assert ran.code == 2
    assert "not found to be fused again: data-one, data-three. Give the folders" in ran.stderr
    ran = coldctl("fuse", moved, "--without", two, "--base", base, "--output", tmp_path / "x")
    assert ran.code == 2
    assert "cannot be withdrawn" in ran.stderr
    ran = coldctl("fuse", moved, "--without", "nobody", "--base", base, "--output", tmp_path / "x")
    assert ran.code == 2
    assert "no contribution 'nobody'" in ran.stderr


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_lora_adapters(kind: str, tmp_path: Path, coldctl: Run) -> None:
    """The mean of the products B·A·scale, mixed with full contributions; not the product of the means."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForSequenceClassification

    base = tiny.make_base(kind, tmp_path / "base")
    merged, adapters = [], []
    for seed in range(3):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        settings = peft.LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=8 + seed, target_modules=["query", "value", "word_embeddings"],
            use_rslora=seed == 1, alpha_pattern={"layer.0.attention.self.query": 3} if seed == 2 else {},
        )  # fmt: skip
        wrapped = peft.get_peft_model(model, settings)
        torch.manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapters.append(tmp_path / f"adapter-{seed}")
        wrapped.save_pretrained(adapters[-1])
        whole = wrapped.merge_and_unload()
        whole.save_pretrained(tmp_path / f"merged-{seed}")
        merged.append(tmp_path / f"merged-{seed}")
    found = fused(coldctl, tmp_path / "from-adapters", base, adapters)
    expected = fused(coldctl, tmp_path / "from-merged", base, merged)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-5, atol=1e-7)
    assert not np.allclose(flat(found), flat(body(base)))
    mixed = fused(coldctl, tmp_path / "mixed", base, [adapters[0], merged[1], adapters[2]])
    np.testing.assert_allclose(flat(mixed), flat(expected), rtol=1e-5, atol=1e-7)
    assert coldctl("check", *adapters, "--base", base, "--deep").code == 0
    ran = coldctl("check", *adapters)
    assert ran.code == 3
    assert "give --base" in ran.stderr
    settings_file = adapters[0] / "adapter_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "use_dora": True}))
    ran = coldctl("fuse", *adapters, "--base", base, "--output", tmp_path / "x")
    assert ran.code == 2
    assert "use_dora" in ran.stderr
    other = tiny.make_base("distilbert", tmp_path / "other")
    assert coldctl("fuse", adapters[1], "--base", other, "--output", tmp_path / "x").code == 2


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickles_only_where_asked_for_and_weights_only(
    tmp_path: Path, base: Path, models: list[Path], coldctl: Run
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    pickled = []
    for model in models[:2]:
        folder = Path(shutil.copytree(model, tmp_path / model.name))
        state = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        torch.save({**state, "classifier.weight": torch.zeros(2, 16)}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        pickled.append(folder)
    ran = coldctl("fuse", *pickled, "--base", base, "--output", tmp_path / "no")
    assert ran.code == 2
    assert "--allow-pickle" in ran.stderr
    fused(coldctl, tmp_path / "yes", base, pickled, "--allow-pickle")
    fused(coldctl, tmp_path / "same", base, models[:2])
    assert digest(tmp_path / "yes") == digest(tmp_path / "same")
    for kind, folders in (("plain", models[:1]), ("pickled", pickled[:1])):  # half as wide, in either form
        halves = Path(shutil.copytree(folders[0], tmp_path / kind / "half"))
        narrow = {name: value.to(torch.bfloat16) for name, value in load_file(models[0] / "model.safetensors").items()}
        if kind == "plain":
            save_file(narrow, halves / "model.safetensors", {"format": "pt"})
        else:
            torch.save(narrow, halves / "pytorch_model.bin")
        fused(coldctl, tmp_path / f"{kind}-half", base, [halves], "--allow-pickle")
    assert digest(tmp_path / "plain-half") == digest(tmp_path / "pickled-half")
    torch.save({"x": Evil(tmp_path / "ran")}, pickled[0] / "pytorch_model.bin")
    ran = coldctl("fuse", *pickled, "--base", base, "--output", tmp_path / "no", "--allow-pickle")
    assert ran.code == 2
    assert "not plain weights" in ran.stderr
    assert not (tmp_path / "ran").exists()


def test_a_vocabulary_that_grew(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    import torch

    name = "embeddings.word_embeddings.weight"
    for rows in (5, -5):
        other = Path(shutil.copytree(models[0], tmp_path / f"rows{rows}"))
        tensors, metadata = tiny.read_tensors(other / "model.safetensors")
        table = tensors[name]
        tensors[name] = (
            torch.cat([table, torch.full((rows, table.shape[1]), 9.0)]) if rows > 0 else table[:rows].clone()
        )
        tiny.write_tensors(other / "model.safetensors", list(tensors.items()), metadata)
        ran = coldctl("fuse", other, models[1], "--base", base, "--output", tmp_path / "x")
        assert ran.code == 2
        assert "--common-rows" in ran.stderr
        assert f"{table.shape[0] + rows}×16" in ran.stderr
        found = fused(coldctl, tmp_path / f"out{rows}", base, [other, models[1]], "--common-rows")
        plain = fused(coldctl, tmp_path / f"plain{rows}", base, [models[0], models[1]])
        common = table.shape[0] + min(rows, 0)
        np.testing.assert_array_equal(found[name][:common], plain[name][:common])
        if rows < 0:
            lone = (body(base)[name].astype(np.float64) + body(models[1])[name])[common:] / 2
            np.testing.assert_array_equal(found[name][common:], lone.astype(np.float32))
        record = next(item for item in manifest(tmp_path / f"out{rows}")["contributions"] if item["name"] == other.name)
        assert record["body_digest"] == digest(other)


def test_a_large_vocabulary_that_grew(tmp_path: Path, base: Path, coldctl: Run) -> None:
    """It is read in several blocks, and the contribution ends long before the last one."""
    import torch

    name = "embeddings.word_embeddings.weight"
    tensors, metadata = tiny.read_tensors(base / "model.safetensors")
    rows = len(tensors[name])
    large = Path(shutil.copytree(base, tmp_path / "large"))
    tensors[name] = torch.randn((40_000, 16), generator=torch.Generator().manual_seed(1))
    tiny.write_tensors(large / "model.safetensors", list(tensors.items()), metadata)
    config = json.loads((base / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "vocab_size": 40_000}))
    other, small = tiny.perturb(large, tmp_path / "other", seed=1), tiny.perturb(base, tmp_path / "small", seed=2)
    found = fused(coldctl, tmp_path / "out", large, [other, small], "--common-rows")[name]
    parts = {place: body(place)[name].astype(np.float64) for place in (large, other, small)}
    whole = np.concatenate([parts[small], parts[large][rows:]])
    np.testing.assert_array_equal(found, ((parts[other] + whole) / 2).astype(np.float32))


@pytest.mark.parametrize("flags", [(), ("--method", "dare", "--screen", "reject")])
def test_without_proofs_files_stand_for_bodies(
    flags: tuple[str, ...], tmp_path: Path, base: Path, models: list[Path], coldctl: Run
) -> None:
    command = ("fuse", *models[:2], "--base", base, "--output", tmp_path / "out", "--no-verify", *flags)
    assert coldctl(*command).code == 0
    again = coldctl(*command)
    assert again.code == 0
    assert "left alone" in again.stderr
    other = coldctl("fuse", *models[1:3], *command[3:])
    assert other.code == 2
    assert "--overwrite" in other.stderr


def test_settings_that_do_not_go_together(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--scale", "fast"), "a multiple such as"),
        (("--scale", "inf"), "a multiple such as"),
        (("--scale", "1-2*auto"), "a multiple such as"),
        (("--scale", "auto", "--method", "model-stock"), "finds its own length"),
        (("--weights", "examples", "--method", "median"), "takes no --weights"),
        (("--outer-optimizer", "sgd", "--scale", "2"), "exclude each other"),
        (("--method", "trimmed-mean", "--trim", 0.6), "leaves nothing"),
        (("--density", 1.5), "must be 0 to 1"),
        (("--dtype", "int8"), "choose one of"),
        (("--position", 2), "must be 0 to 1"),
        (("--weights", "nowhere.json"), "a file that exists"),
        (("--weights", "examples", "--max-share", 0.01), "how many training"),
    ]
    for flags, words in cases:
        ran = coldctl("fuse", *models, "--base", base, "--output", tmp_path / "x", *flags)
        assert ran.code == 2, flags
        assert words in ran.stderr, (flags, ran.stderr)
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("method", ["median", "ties", "geometric-median", "model-stock", "dare"])
def test_every_method_refuses_values_that_are_not_finite(
    method: str, tmp_path: Path, base: Path, models: list[Path], coldctl: Run
) -> None:
    bad = poison(models[0], tmp_path / "bad", float("nan"))
    ran = coldctl("fuse", *models[1:], bad, "--base", base, "--output", tmp_path / "x", "--method", method)
    assert ran.code == 2
    assert "bad: embeddings.word_embeddings.weight" in ran.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "method", ["median", "trimmed-mean", "ties", "geometric-median", "model-stock", "task-arithmetic"]
)
def test_copies_stay_themselves_under_every_method(
    method: str, tmp_path: Path, base: Path, models: list[Path], coldctl: Run
) -> None:
    copies = [shutil.copytree(models[0], tmp_path / f"copy-{number}") for number in range(5)]
    flags = ("--density", 1) if method == "ties" else ()
    found = fused(coldctl, tmp_path / "out", base, copies, "--method", method, *flags)
    np.testing.assert_allclose(flat(found), flat(body(models[0])), rtol=2e-7, atol=1e-12)


def test_a_base_without_the_pooler_that_contributions_have(
    tmp_path: Path, base: Path, dataset: Path, coldctl: Run
) -> None:
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    tensors, metadata = tiny.read_tensors(bare / "model.safetensors")
    rest = [(name, tensor) for name, tensor in tensors.items() if not name.startswith("pooler.")]
    tiny.write_tensors(bare / "model.safetensors", rest, metadata)
    flags = ("--epochs", 1, "--batch-size", 16)
    assert coldctl("finetune", dataset, "--base", bare, "--output", tmp_path / "one", *flags).code == 0
    ran = coldctl("fuse", tmp_path / "one", "--base", bare, "--output", tmp_path / "fused", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["contributions"][0]["verified"] is True


def test_a_refused_contribution_hides_no_outlier(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    long = tiny.perturb(base, tmp_path / "long", seed=50, scale=10.0)
    bad = poison(models[0], tmp_path / "bad", float("nan"))
    ran = coldctl(
        "fuse", *models, long, bad, "--base", base, "--output", tmp_path / "f", "--screen", "reject", "--json"
    )
    assert ran.code == 0, ran.stderr
    assert {item["name"] for item in ran.json["contributions"] if item["status"] == "rejected"} == {"long", "bad"}
    for method in ("mean", "dare"):
        fused(coldctl, tmp_path / f"{method}-reject", base, [*models, bad], "--method", method, "--screen", "reject")
        fused(coldctl, tmp_path / f"{method}-clean", base, models, "--method", method)
        assert digest(tmp_path / f"{method}-reject") == digest(tmp_path / f"{method}-clean")


def test_a_light_weight_is_no_outlier(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    table = {model.name: 0.1 if index == 0 else 1.0 for index, model in enumerate(models)}
    (tmp_path / "w.json").write_text(json.dumps(table))
    flags = ("--weights", tmp_path / "w.json", "--screen", "reject")
    ran = coldctl("fuse", *models, "--base", base, "--output", tmp_path / "f", *flags, "--json")
    assert {item["status"] for item in ran.json["contributions"]} == {"fused"}


def test_withdrawing_takes_the_recorded_weights_again(
    tmp_path: Path, base: Path, models: list[Path], coldctl: Run
) -> None:
    withdraw = ("--without", models[0].name, "--base", base, "--output", tmp_path / "x")
    (tmp_path / "w.json").write_text(json.dumps({model.name: float(i + 1) for i, model in enumerate(models[:3])}))
    weights = ("--weights", tmp_path / "w.json")
    fused(coldctl, tmp_path / "weighted", base, models[:3], *weights)
    ran = coldctl("fuse", tmp_path / "weighted", *models[:3], *withdraw)
    assert "give that file with --weights" in ran.stderr
    assert coldctl("fuse", tmp_path / "weighted", *models[:3], *withdraw, *weights).code == 0
    fused(coldctl, tmp_path / "expected", base, models[1:3], *weights)
    assert digest(tmp_path / "x") == digest(tmp_path / "expected")


def test_when_nothing_sound_is_left(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    bad = [poison(model, tmp_path / f"bad-{number}", float("nan")) for number, model in enumerate(models[:6])]
    ran = coldctl("fuse", *bad, "--base", base, "--output", tmp_path / "x", "--screen", "reject")
    assert ran.code == 2
    assert "only 0 of 6" in ran.stderr


def test_another_outer_optimizer_starts_anew(tmp_path: Path, base: Path, models: list[Path], coldctl: Run) -> None:
    fused(coldctl, tmp_path / "one", base, models[:3], "--outer-optimizer", "nesterov")
    ran = coldctl(
        "fuse", *models[3:], "--base", tmp_path / "one", "--output", tmp_path / "two", "--outer-optimizer", "adam"
    )
    assert ran.code == 0, ran.stderr
    assert "adam starts anew" in ran.stderr
    (tmp_path / "two" / "outer_variance.safetensors").unlink()
    ran = coldctl("fuse", *models, "--base", tmp_path / "two", "--output", tmp_path / "x", "--outer-optimizer", "adam")
    assert ran.code == 2
    assert "outer_variance.safetensors is missing" in ran.stderr
