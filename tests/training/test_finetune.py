"""Finetune: what it learns, what it leaves behind, and that stopping it anywhere changes nothing."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from coldctl.common.errors import DeclinedError
from coldctl.common.progress import SILENT
from coldctl.config.settings import FinetuneConfig
from coldctl.training import model as models
from coldctl.training import snapshot
from coldctl.training.batches import Examples, collate, length_batches
from coldctl.training.loop import Task, TrainingContext, predict, train
from conftest import FAST, Ran
from helpers import tiny

Run = Callable[..., Ran]


def without_dropout(folder: Path, probability: float = 0.0) -> Path:
    """The same checkpoint with every dropout probability at 0 (or next to it), so that two ways to compute it must agree."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in config.items():
        if "dropout" in key and isinstance(value, float):
            config[key] = probability
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def alike(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    """Tensors that differ by more than rounding does after some steps of AdamW.

    The bias of attention's keys is left out: its gradient is zero but for rounding, which AdamW blows up.
    """
    assert one.keys() == two.keys()
    keys = re.compile(r"\.k(ey|ey_proj|_lin)?\.bias$")
    return [
        name
        for name, value in one.items()
        if not keys.search(name) and not torch.allclose(two[name], value, rtol=2e-3, atol=2e-4)
    ]


def learn(
    base: Path, data: Path, scratch: Path, *, shortcuts: bool = True, hook: Any = None, **settings: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """Train without the command line: the weights, and the predictions on the training examples."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    names = sorted({row["label"] for row in rows})
    tokenizer = models.load_tokenizer(base)
    model = models.load_classifier(base, names, 0)
    encoded = models.encode(tokenizer, [row["text"] for row in rows], None, 64)
    examples = Examples(encoded, np.array([names.index(row["label"]) for row in rows]))
    if hook is not None:
        model.register_forward_pre_hook(hook, with_kwargs=True)
    config = FinetuneConfig(**({"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "validate_every": 4} | settings))
    context = TrainingContext(torch.device("cpu"), tokenizer.pad_token_id, scratch, SILENT, "x", shortcuts=shortcuts)
    task = Task(model, examples, examples, lambda found: float(np.mean(found == examples.labels)) * 100)
    trained = train([task], config, context, seed=1)
    return dict(model.state_dict()), (trained, predict(model, encoded, context))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_shortcuts_change_nothing_but_the_time(kind: str, tmp_path: Path) -> None:
    base = without_dropout(tiny.make_base(kind, tmp_path / "base"), 1e-7)  # all its code runs, and drops nothing
    data = tiny.make_dataset(tmp_path / "data", train=24)
    fast, (first, _) = learn(base, data, tmp_path / "fast")
    plain, (second, _) = learn(base, data, tmp_path / "plain", shortcuts=False)
    assert first.curve == pytest.approx(np.array(second.curve), rel=1e-3)
    assert alike(plain, fast) == []


def test_dropout_drops_its_share_and_scales_the_rest() -> None:
    from coldctl.training.cpu_shortcuts import fast_dropout

    layer = torch.nn.Dropout(0.1)
    model = torch.nn.Sequential(layer)
    model.config = object()  # type: ignore[assignment]
    with fast_dropout([model]) as masks:
        masks.seed(1, 2)
        first = model(torch.ones(400, 1000))
        masks.seed(1, 2)
        assert torch.equal(first, model(torch.ones(400, 1000)))
        masks.seed(1, 3)
        assert not torch.equal(first, model(torch.ones(400, 1000)))
    assert type(layer) is torch.nn.Dropout
    assert abs(float((first == 0).float().mean()) - 0.1) < 0.003
    assert torch.allclose(first[first != 0], torch.tensor(1 / 0.9))


def test_a_mask_hides_the_same_whether_it_is_added_or_not() -> None:
    from coldctl.training.cpu_shortcuts import attention, fast_dropout

    module = torch.nn.Sequential(torch.nn.Dropout(0.1))
    module.config = object()  # type: ignore[assignment]
    states = torch.randn((1, 2, 5, 4), generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([True, True, True, False, False]).expand(1, 1, 5, 5)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with fast_dropout([module]) as masks:
        module.coldctl_masks = masks  # type: ignore[assignment]
        found = []
        for mask in (seen, added):
            masks.seed(1, 2)
            found.append(attention(module, states, states, states, mask, dropout=0.1)[0])
    assert torch.allclose(found[0], found[1])


def test_batches_are_drawn_by_seed_and_hold_alike_lengths() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 1003)
    batches = list(length_batches(lengths, 16, 7, 2))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    again = list(length_batches(lengths, 16, 7, 2))
    assert all(np.array_equal(one, two) for one, two in zip(batches, again, strict=True))
    assert not np.array_equal(batches[0], next(length_batches(lengths, 16, 7, 3)))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded < 1.1 * lengths.sum()  # in random batches it is about 1.8 times


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bits(tmp_path: Path, base: Path, coldctl: Run) -> None:
    data = tiny.make_dataset(tmp_path / "data", train=160)
    flags = ("--epochs", 6, "--batch-size", 16, "--learning-rate", 1e-4, "--patience", 999, "--name", "same")
    assert coldctl("finetune", data, "--base", base, "--output", tmp_path / "whole", *flags, "--jobs", 1).code == 0
    command = [sys.executable, "-m", "coldctl", "finetune", data, "--base", base, "--output", tmp_path / "cut", *flags]
    state = tmp_path / ".cut.partial" / "training" / "state.safetensors"
    resumed = []
    for attempt in range(4):
        process = subprocess.Popen([*map(str, command), "--checkpoint-seconds", "0"], stderr=subprocess.PIPE, text=True)
        before = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None and attempt < 3:
            if state.exists() and state.stat().st_mtime_ns != before:
                time.sleep(0.05 * attempt)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        _, said = process.communicate(timeout=120)
        resumed += re.findall(r"going on from step (\d+) of 60", said)
    steps = [int(step) for step in resumed]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    for name in ("model.safetensors", "config.json", "training.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "cut" / "training").exists()
    assert not state.parent.parent.exists()


def test_a_checkpoint_that_is_not_whole_is_not_used(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    flags = ("finetune", dataset, "--base", base, *FAST, "--name", "same", "--jobs", 1)
    assert coldctl(*flags, "--output", tmp_path / "whole").code == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "coldctl", *map(str, flags), "--output", str(tmp_path / "cut")], stderr=subprocess.PIPE
    )
    folder = tmp_path / ".cut.partial"
    while not folder.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (folder / "training").mkdir(exist_ok=True)
    (folder / "training" / "state.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    ran = coldctl(*flags, "--output", tmp_path / "cut")
    assert ran.code == 0, ran.stderr
    assert "going on" not in ran.stderr
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_low_rank_contributions_are_fused_as_products(tmp_path: Path, base: Path, coldctl: Run) -> None:
    for seed, name in enumerate(("one", "two")):
        data = tiny.make_dataset(tmp_path / f"data-{name}", seed=seed)
        ran = coldctl("finetune", data, "--base", base, "--output", tmp_path / "c" / name, "--name", name,
                      "--lora-rank", 2, *FAST)  # fmt: skip
        assert ran.code == 0, ran.stderr
        written = tmp_path / "c" / name
        assert not (written / "model.safetensors").exists()
        assert str(base) not in (written / "adapter_config.json").read_text()
        modules = json.loads((written / "adapter_config.json").read_text())["target_modules"]
        assert modules == sorted(modules)  # the same bytes in each process
        assert json.loads((written / "coldctl.json").read_text())["encoding"] == "adapter"
    ran = coldctl("fuse", tmp_path / "c", "--base", base, "--output", tmp_path / "fused", "--strict", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.stderr.count("verified") >= 2
    assert "unverified" not in ran.stderr
    start, fused = load_file(base / "model.safetensors"), load_file(tmp_path / "fused" / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    steps = []
    for folder in ("one", "two"):
        adapter = load_file(tmp_path / "c" / folder / "adapter_model.safetensors")
        inside = f"base_model.model.bert.{name.removesuffix('.weight')}"
        steps.append(adapter[f"{inside}.lora_B.weight"] @ adapter[f"{inside}.lora_A.weight"] * 2)
    assert float(steps[0].abs().max()) > 0
    torch.testing.assert_close(fused[name], start[name] + (steps[0] + steps[1]) / 2)
    bare = tiny.make_base("distilbert", tmp_path / "distilbert")  # a body without a pooler
    ran = coldctl("finetune", data, "--base", bare, "--output", tmp_path / "bare", "--lora-rank", 2, *FAST)
    assert ran.code == 0, ran.stderr
    assert coldctl("check", tmp_path / "bare", "--base", bare, "--deep").code == 0
    ran = coldctl("finetune", data, "--base", base, "--output", tmp_path / "x", "--lora-rank", 2, "--fisher", *FAST)
    assert ran.code == 2
    assert "--fisher" in ran.stderr


def test_fisher_information_feeds_the_fisher_method(tmp_path: Path, base: Path, coldctl: Run) -> None:
    for seed, name in enumerate(("one", "two")):
        data = tiny.make_dataset(tmp_path / f"data-{name}", seed=seed)
        place = tmp_path / "c" / name
        ran = coldctl("finetune", data, "--base", base, "--output", place, "--name", name, "--fisher", *FAST)
        assert ran.code == 0, ran.stderr
    information = load_file(tmp_path / "c" / "one" / "fisher.safetensors")
    assert all(float(value.min()) >= 0 for value in information.values())
    assert float(information["encoder.layer.0.output.dense.weight"].max()) > 0
    ran = coldctl("fuse", tmp_path / "c", "--base", base, "--output", tmp_path / "fused", "--method", "fisher")
    assert ran.code == 0, ran.stderr


@pytest.mark.parametrize("numbers", [False, True])
def test_the_fisher_diagonal_is_the_mean_of_squared_gradients(numbers: bool, tmp_path: Path) -> None:
    from coldctl.training.fisher import write_fisher

    base = tiny.make_base("bert", tmp_path / "base")
    model = models.load_classifier(base, [] if numbers else ["no", "yes"], 0)
    tokenizer = models.load_tokenizer(base)
    encoded = models.encode(tokenizer, ["a good day", "bad", "very bad"], None, 64)
    labels = np.array([1.5, 0.0, -3.0] if numbers else [1, 0, 0])
    examples = Examples(encoded, labels)
    context = TrainingContext(torch.device("cpu"), tokenizer.pad_token_id, tmp_path, SILENT, "x")
    models.body_of(model).register_parameter("spare", torch.nn.Parameter(torch.ones(3)))  # no output depends on it
    write_fisher(model, examples, context, tmp_path, 0)
    assert load_file(tmp_path / "fisher.safetensors")["spare"].tolist() == [0, 0, 0]
    expected = torch.zeros(())
    weight = model.bert.encoder.layer[0].output.dense.weight  # type: ignore[union-attr, index]
    for index, label in enumerate(labels.tolist()):
        logits = model(**collate(encoded, [index], tokenizer.pad_token_id, context.device)).logits
        # Numbers are taken as normally distributed around what the model says, as widely as they are spread themselves.
        chance = (
            -((logits[0, 0] - label) ** 2) / (2 * labels.var()) if numbers else torch.log_softmax(logits, -1)[0, label]
        )
        (gradient,) = torch.autograd.grad(chance, weight)
        expected = expected + gradient**2 / 3
    torch.testing.assert_close(
        load_file(tmp_path / "fisher.safetensors")["encoder.layer.0.output.dense.weight"], expected
    )


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "mpnet", "modernbert"])
def test_what_is_frozen_stays(kind: str, tmp_path: Path, dataset: Path, coldctl: Run) -> None:
    base = tiny.make_base(kind, tmp_path / "base")
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--freeze-layers", 1, *FAST)
    assert ran.code == 0, ran.stderr
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    prefix = tiny.PREFIXES[kind]
    changed = {
        name for name, value in before.items()
        if f"{prefix}.{name}" in after and not torch.equal(after[f"{prefix}.{name}"], value)
    }  # fmt: skip
    assert any(".1." in name for name in changed)
    assert all(".1." in name or name.startswith(("pooler", "final_norm")) for name in changed), changed
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "no", "--freeze-layers", 99, *FAST)
    assert ran.code == 2
    assert "2 layers" in ran.stderr


def test_an_anchor_keeps_the_body_near_its_base(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    before = load_file(base / "model.safetensors")
    distances = []
    for name, flags in (("free", ()), ("held", ("--anchor", 100))):
        ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / name, *FAST, "--epochs", 3, *flags)
        assert ran.code == 0, ran.stderr
        after = load_file(tmp_path / name / "model.safetensors")
        distances.append(sum(float((after[f"bert.{key}"] - value).square().sum()) for key, value in before.items()))
    assert distances[1] < 0.5 * distances[0]


def test_out_of_memory_halves_what_is_computed_at_once(tmp_path: Path) -> None:
    base = without_dropout(tiny.make_base("bert", tmp_path / "base"))
    data = tiny.make_dataset(tmp_path / "data", train=24)

    def small_device(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if len(inputs["input_ids"]) > (3 if torch.is_grad_enabled() else 5):
            raise torch.OutOfMemoryError("tried to allocate too much")

    small, (trained, found) = learn(base, data, tmp_path / "small", hook=small_device)
    whole, (expected, same) = learn(base, data, tmp_path / "whole")
    assert trained.steps == expected.steps
    assert np.array_equal(found, same)
    assert alike(whole, small) == []
    for training, words in ((True, "with one example at a time: lower --max-length"), (False, "beside the batch")):

        def full_device(_: Any, __: Any, ___: Any, training: bool = training) -> None:
            if torch.is_grad_enabled() == training:
                raise torch.OutOfMemoryError("tried to allocate too much")

        with pytest.raises(DeclinedError, match=words):
            learn(base, data, tmp_path / words[:4], hook=full_device)


def test_compiled_it_learns_the_same(tmp_path: Path) -> None:
    base = without_dropout(tiny.make_base("bert", tmp_path / "base"))
    data = tiny.make_dataset(tmp_path / "data", train=24)
    plain, _ = learn(base, data, tmp_path / "plain", shortcuts=False, epochs=1)
    with torch.compiler.set_stance("force_eager"):  # without the compiler's own minute
        compiled, _ = learn(base, data, tmp_path / "compiled", compile=True, epochs=1)
    assert all(torch.equal(plain[name], value) for name, value in compiled.items())


def test_a_checkpoint_of_other_weights_is_not_gone_on_from(tmp_path: Path) -> None:
    base = without_dropout(tiny.make_base("bert", tmp_path / "base"))
    data = tiny.make_dataset(tmp_path / "data", train=24)
    anew, _ = learn(base, data, tmp_path / "anew", epochs=1)
    (tmp_path / "other").mkdir()
    snapshot.write(tmp_path / "other" / "state.safetensors", {"parameter.x": torch.zeros(1)}, {"best_step": 0})
    found, _ = learn(base, data, tmp_path / "other", epochs=1)
    assert all(torch.equal(anew[name], value) for name, value in found.items())


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    base = without_dropout(tiny.make_base("roberta", tmp_path / "base"))
    data = tiny.make_dataset(tmp_path / "data", train=30, labels=("food", "sport", "music"))
    settings: dict[str, Any] = {"class_weights": "balanced", "label_smoothing": 0.1}
    parts, _ = learn(base, data, tmp_path / "parts", micro_batch=3, **settings)
    whole, _ = learn(base, data, tmp_path / "whole", **settings)
    assert alike(whole, parts) == []


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node 2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0",
}


@pytest.mark.parametrize("launcher", ["torchrun"])  # accelerate: tests/scale
@pytest.mark.usefixtures("traced_children")
def test_several_processes_take_the_steps_of_one(launcher: str, tmp_path: Path, coldctl: Run) -> None:
    """The same losses step by step, the same weights, at the same size of the whole batch."""
    base = without_dropout(tiny.make_base("bert", tmp_path / "base"))
    data = tiny.make_dataset(tmp_path / "data", train=37)  # the last batch of each epoch is smaller than the team
    common = ("finetune", data, "--base", base, "--name", "same", "--epochs", 2, "--batch-size", 9, "--learning-rate", 1e-3,
              "--log", "jsonl")  # fmt: skip
    assert coldctl(*common, "--output", tmp_path / "one", "--log-folder", tmp_path / "log-one", "--jobs", 1).code == 0
    launched = [sys.executable, "-m", *LAUNCHERS[launcher].split(), "-m", "--", "coldctl", *map(str, common)]
    launched += ["--output", str(tmp_path / "two"), "--log-folder", str(tmp_path / "log-two")]
    ran = subprocess.run([*launched, "--json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["name"] == "same"  # said once, by the process that leads
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert alike(one, two) == []
    curves = [losses(tmp_path / name / "same.jsonl") for name in ("log-one", "log-two")]
    assert len(curves[0]) > 2
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    again = subprocess.run(launched, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("left alone") == 1


def losses(log: Path) -> dict[tuple[int, str], float]:
    """The learning curve that a training logged, by step."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {(line["step"], key): line[key] for line in lines for key in ("loss", "mean_loss") if key in line}


def test_several_labels_at_once(tmp_path: Path, base: Path, coldctl: Run) -> None:
    words = {"food": tiny.THEMES["food"], "sport": tiny.THEMES["sport"], "music": tiny.THEMES["music"]}
    generator = np.random.default_rng(0)
    for split, count in (("train", 240), ("validation", 30), ("test", 30)):
        rows = []
        for _ in range(count):
            chosen = [name for name in words if generator.random() < 0.5]
            text = " ".join(["the", *(str(generator.choice(words[name])) for name in chosen for _ in range(2)), "day"])
            rows.append({"text": text, "label": chosen})
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = coldctl("finetune", tmp_path / "data", "--base", base, "--output", tmp_path / "out", "--epochs", 20,
                  "--batch-size", 8, "--learning-rate", 3e-3, "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert ran.json["manifest"]["metrics"]["test"]["accuracy"] > 50  # all three right; by chance 12.5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert sorted(config["label2id"]) == ["food", "music", "sport"]


def test_logs_stand_outside_the_contribution(
    tmp_path: Path, base: Path, dataset: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "warm.toml").write_text("[finetune]\nwarmup = 0.7\n")
    ran = coldctl("finetune", dataset, "--base", base, "--output", "out", "--name", "mine", "--log", "jsonl", *FAST,
                  "--config", "warm.toml")  # fmt: skip
    assert ran.code == 0, ran.stderr
    lines = [json.loads(line) for line in (tmp_path / "coldctl-logs" / "mine.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1
    assert lines[0]["learning_rate"] == pytest.approx(1e-3 / 2)  # of three steps two lead up to it
    assert {"loss", "learning_rate", "validation", "test"} <= {key for line in lines for key in line}
    assert not list((tmp_path / "out").rglob("*log*"))
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    ran = coldctl("finetune", dataset, "--base", base, "--output", "no", "--log", "paper", *FAST)
    assert ran.code == 2
    assert "jsonl, tensorboard, wandb" in ran.stderr


class Recorder:
    """Stands in for the libraries of TensorBoard and of Weights & Biases, and keeps what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def SummaryWriter(self, folder: str, purge_step: int) -> "Recorder":  # noqa: N802  their name
        self.told.append(("begin", folder, purge_step))
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def close(self) -> None:
        self.told.append(("end",))

    def init(self, **options: Any) -> "Recorder":
        self.told.append(("begin", options["dir"], options["name"], options["config"]["batch_size"]))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.told += [(name, value, step) for name, value in values.items()]

    finish = close


@pytest.mark.parametrize(
    ("kind", "library", "remedy"),
    [("tensorboard", "torch.utils.tensorboard", "'coldctl[log]'"), ("wandb", "wandb", "pip install wandb")],
)
def test_logs_of_other_libraries(
    kind: str, library: str, remedy: str, tmp_path: Path, base: Path, dataset: Path, coldctl: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = ("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--name", "mine", *FAST, "--jobs", 1,
               "--log", kind, "--log-folder", tmp_path / "logs")  # fmt: skip
    monkeypatch.setitem(sys.modules, library, None)
    ran = coldctl(*command)
    assert ran.code == 2
    assert remedy in ran.stderr
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, library, recorder)
    odd = shutil.copytree(base, tmp_path / "odd")  # what cannot be trained leaves no log
    tokenizer = json.loads((odd / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["the"] = 99_999
    (odd / "tokenizer.json").write_text(json.dumps(tokenizer))
    ran = coldctl(*command[:3], odd, *command[4:])
    assert ran.code == 2
    assert "gives token 99999" in ran.stderr
    assert recorder.told == []
    ran = coldctl(*command)
    assert ran.code == 0, ran.stderr
    logs = tmp_path / "logs"
    begun = (str(logs / "mine"), 1) if kind == "tensorboard" else (str(logs), "mine", 16)
    assert recorder.told[0] == ("begin", *begun)
    assert recorder.told[-1] == ("end",)
    assert {"loss", "learning_rate", "validation", "test"} <= {item[0] for item in recorder.told}
    assert max(item[2] for item in recorder.told if item[0] == "loss") <= 3


def test_shots_count_in_all_or_in_each_class(tmp_path: Path, base: Path, coldctl: Run) -> None:
    data = tiny.make_dataset(tmp_path / "data", train=60, labels=("food", "sport", "music"))
    for flags, expected in ((("--shots", 10), 10), (("--shots", 10, "--shots-per-class"), 30)):
        output = tmp_path / f"out-{expected}"
        ran = coldctl("finetune", data, "--base", base, "--output", output, *flags, *FAST, "--json")
        assert ran.code == 0, ran.stderr
        assert ran.json["manifest"]["dataset"]["num_train"] == expected
    ran = coldctl("finetune", data, "--base", base, "--output", tmp_path / "no", "--shots-per-class", *FAST)
    assert ran.code == 2
    assert "give --shots" in ran.stderr


def test_a_summary_says_scores_reason_and_time(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / "out", "--name", "mine",
                  "--epochs", 30, "--batch-size", 16, "--learning-rate", 1e-3, "--patience", 2)  # fmt: skip
    assert ran.code == 0, ran.stderr
    line = next(line for line in ran.stderr.splitlines() if line.startswith("mine: validation"))
    assert re.search(r"validation accuracy [\d.]+, test accuracy [\d.]+; no improvement in 2 validations; .* s: ", line)


def test_the_manifest_lists_what_is_there(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    for name, flags in (("full", ()), ("adapter", ("--lora-rank", 2))):
        ran = coldctl("finetune", dataset, "--base", base, "--output", tmp_path / name, *flags, *FAST)
        assert ran.code == 0, ran.stderr
        there = {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file()}
        assert set(json.loads((tmp_path / name / "coldctl.json").read_text())["files"]) == there - {"coldctl.json"}


def test_heads_on_one_body_go_on_with_the_same_bits(tmp_path: Path) -> None:
    base = tiny.make_base("bert", tmp_path / "base")
    tokenizer = models.load_tokenizer(base)

    def tasks() -> list[Task]:
        made = []
        for seed, labels in enumerate((("food", "sport"), ("music", "travel", "money"))):
            data = tiny.make_dataset(tmp_path / f"data-{seed}", seed=seed, train=40, labels=labels)
            rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
            encoded = models.encode(tokenizer, [row["text"] for row in rows], None, 64)
            examples = Examples(encoded, np.array([labels.index(row["label"]) for row in rows]))
            made.append(Task(models.load_classifier(base, labels, seed), examples, examples, lambda _: 50.0))
        models.share_body([task.model for task in made])
        return made

    class Listener:
        """Silent, but ends the training in the middle once."""

        left = 100

        def begin(self, task: str, total: int | None, unit: str) -> None: ...
        def end(self, task: str) -> None: ...
        def note(self, message: str) -> None: ...
        def advance(self, task: str, steps: int, detail: str = "") -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    config = FinetuneConfig(epochs=3, batch_size=4, learning_rate=1e-3, validate_every=7)
    context = TrainingContext(torch.device("cpu"), tokenizer.pad_token_id, tmp_path / "whole", SILENT, "x")
    whole = tasks()
    train(whole, config, context, seed=3)
    listener = Listener()
    cut = TrainingContext(
        torch.device("cpu"), tokenizer.pad_token_id, tmp_path / "cut", listener, "x", checkpoint_seconds=0
    )
    for listener.left in (3, 33):  # first of all before the second head has learned anything
        with pytest.raises(KeyboardInterrupt):
            train(tasks(), config, cut, seed=3)
    resumed = tasks()
    train(resumed, config, cut, seed=3)
    for one, two in zip(whole, resumed, strict=True):
        for name, value in one.model.state_dict().items():
            assert torch.equal(two.model.state_dict()[name], value), name


def test_numbers_far_from_zero_are_learned_as_well(tmp_path: Path, base: Path, coldctl: Run) -> None:
    data = tiny.make_dataset(tmp_path / "data", train=200, labels=("food", "sport"))
    for split in tiny.SPLITS:
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            row["label"] = 1000.5 + (row["label"] == "food") + 0.001 * (number % 7)
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = coldctl("finetune", data, "--base", base, "--output", tmp_path / "out", "--epochs", 8, "--batch-size", 8,
                  "--learning-rate", 3e-3, "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert ran.json["manifest"]["metrics"]["test"]["spearman"] > 50
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        found = float(model(**tokenizer("apple bread butter", return_tensors="pt")).logits)
    assert 1000 < found < 1003  # in the labels' own units


def test_a_log_ends_where_the_training_does(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    common = ("finetune", dataset, "--base", base, "--name", "mine", "--log", "jsonl", *FAST)
    for name in ("one", "two"):  # the second training begins the log anew
        ran = coldctl(*common, "--output", tmp_path / name, "--log-folder", tmp_path / "logs")
        assert ran.code == 0, ran.stderr
    lines = [json.loads(line) for line in (tmp_path / "logs" / "mine.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert len([line for line in lines if "test" in line]) == 1
    for place, folder in (("in", tmp_path / "in" / "logs"), ("mine", tmp_path)):
        ran = coldctl(*common[:-6], *FAST, "--log", "jsonl", "--name", "mine", "--output", tmp_path / place,
                      "--log-folder", folder)  # fmt: skip
        assert ran.code == 2
        assert "--log-folder" in ran.stderr
    (tmp_path / "file").write_text("")
    ran = coldctl(*common, "--output", tmp_path / "x", "--log-folder", tmp_path / "file")
    assert ran.code == 2
    assert "--log-folder" in ran.stderr


def test_processes_that_see_different_data_say_so(tmp_path: Path, base: Path) -> None:
    one, two = (tiny.make_dataset(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    command = f'exec {sys.executable} -m coldctl finetune $([ "$RANK" = 0 ] && echo {one} || echo {two}) --name same '
    command += f"--base {base} --output {tmp_path / 'out'} --epochs 1"
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "sh", "-c",
         command], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode != 0
    assert ran.stderr.count("error: the processes see different data or bases") == 1
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_are_refused(tmp_path: Path, base: Path, coldctl: Run) -> None:
    numbers = tiny.make_dataset(tmp_path / "data")
    for split in tiny.SPLITS:
        rows = [json.loads(line) for line in (numbers / f"{split}.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            row["label"] = number + 0.5
        (numbers / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for flags in (("--class-weights", "balanced"), ("--label-smoothing", 0.1), ("--lora-rank", 4000)):
        ran = coldctl("finetune", numbers, "--base", base, "--output", tmp_path / "out", *flags, *FAST)
        assert ran.code == 2, flags
        assert str(flags[0]) in ran.stderr
        assert not (tmp_path / "out").exists()
