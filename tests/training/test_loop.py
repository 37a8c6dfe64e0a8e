"""The training loop: its shortcuts change nothing, and stopping it anywhere changes nothing."""

import json
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
from coldctl.training.loop import Task, TrainingContext, train
from helpers import tiny
from helpers.training import alike, learn, without_dropout


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
