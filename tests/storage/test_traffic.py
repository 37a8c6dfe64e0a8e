"""Contributions that are written small: differences from the base, adapters, bodies alone; and what is fused of them."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coldctl.common.digests import digest_of
from conftest import FAST, Ran, run_coldctl
from helpers import tiny
from helpers.bodies import body, digest

Run = Callable[..., Ran]
Body = dict[str, NDArray[Any]]
DELTAS = ("delta-bf16", "delta-int8")


def manifest(folder: Path) -> Any:
    return json.loads((folder / "coldctl.json").read_text())


def trained(coldctl: Run, data: Path, base: Path | str, output: Path, *flags: object, name: str = "mine") -> Path:
    ran = coldctl("finetune", data, "--base", base, "--output", output, "--name", name, *FAST, *flags)
    assert ran.code == 0, ran.stderr
    return output


def decoded(folder: Path, base: Path) -> Body:
    """A contribution's body, computed from its files without the project's code."""
    start = body(base)
    tensors, metadata = tiny.read_tensors(folder / "delta.safetensors")
    assert metadata == {"format": "pt"}
    found: Body = {}
    for name, origin in start.items():
        if name not in tensors:
            continue
        step = tensors[name].double().numpy()
        if f"{name}.scale" in tensors:
            scale = tensors[f"{name}.scale"].double().numpy()
            step = step * scale.reshape(-1, *[1] * (origin.ndim - 1)) if origin.ndim > 1 else step * scale
        found[name] = (origin.astype(np.float64) + step).astype(
            np.float64 if origin.dtype == np.float64 else np.float32
        )
    return found


def written_out(folder: Path, base: Path, output: Path) -> Path:
    """The full checkpoint that a difference stands for."""
    import torch

    output.mkdir(parents=True)
    for file in ("config.json", "tokenizer.json"):
        shutil.copy2(base / file, output / file)
    tensors = [(name, torch.from_numpy(value)) for name, value in decoded(folder, base).items()]
    tiny.write_tensors(output / "model.safetensors", tensors, {"format": "pt"})
    return output


@pytest.fixture(scope="module")
def sent(workshop: Path, base: Path) -> Path:
    """A contribution in every encoding, on data of its own each."""
    folder = workshop / "sent"
    for seed, send in enumerate(("full", *DELTAS, "lora")):
        data = tiny.make_dataset(workshop / f"data-{send}", seed=seed)
        trained(run_coldctl, data, base, folder / send, "--send", send, name=send)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_difference_is_the_update_to_its_encodings_precision(
    dtype: str, tmp_path: Path, dataset: Path, coldctl: Run
) -> None:
    base = tiny.make_base("roberta", tmp_path / "base", dtype=dtype)
    whole = trained(coldctl, dataset, base, tmp_path / "whole")
    start, full = body(base), body(whole)
    assert start.keys() - full.keys() == {
        name for name in start if name.startswith("pooler.") or "position_ids" in name
    }
    for send in DELTAS:
        small = trained(coldctl, dataset, base, tmp_path / send, "--send", send)
        assert sorted(path.name for path in small.iterdir()) == ["coldctl.json", "delta.safetensors", "training.png"]
        assert manifest(small)["encoding"] == send
        assert manifest(small)["metrics"] == manifest(whole)["metrics"]
        found = decoded(small, base)
        assert found.keys() == full.keys()
        for name, value in full.items():
            update = value.astype(np.float64) - start[name].astype(np.float64)
            error = np.abs(found[name].astype(np.float64) - value)
            allowed = 2.0**-8 * np.abs(update)
            if send == "delta-int8":
                largest = np.abs(update).max(
                    axis=tuple(range(1, update.ndim)) if update.ndim > 1 else None, keepdims=True
                )
                allowed = np.broadcast_to(1.001 * largest / 127 / 2, update.shape)
            assert np.all(error <= allowed + 2.0**-23 * np.abs(value) + 1e-44), (send, name)
        assert manifest(small)["body_digest"] == digest(written_out(small, base, tmp_path / f"{send}-decoded"))


@pytest.mark.parametrize("flags", [(), ("--method", "ties"), ("--dtype", "float64")])
def test_a_mixed_fuse_is_that_of_what_the_encodings_stand_for(
    flags: tuple[str, ...], tmp_path: Path, base: Path, sent: Path, coldctl: Run
) -> None:
    # The order of summation is that of the digests in manifests, else of the names.
    out = [written_out(sent / send, base, tmp_path / manifest(sent / send)["body_digest"]) for send in DELTAS]
    plain = [sent / "full", sent / "lora", *out]
    ran = coldctl("fuse", sent, "--base", base, "--output", tmp_path / "mixed", *flags, "--json")
    assert ran.code == 0, ran.stderr
    assert [item["verified"] for item in ran.json["contributions"]] == [True] * 4
    assert coldctl("fuse", *plain, "--base", base, "--output", tmp_path / "plain", *flags).code == 0
    one, two = (tmp_path / name / "model.safetensors" for name in ("mixed", "plain"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("send", [*DELTAS, "lora"])
def test_any_range_is_decoded_as_the_whole_is(send: str, base: Path, sent: Path) -> None:
    from coldctl.checkpoints.checkpoint import open_checkpoint
    from coldctl.checkpoints.deltas import elements
    from coldctl.checkpoints.formats import open_contribution
    from coldctl.storage.files import LocalFolder

    found = open_contribution(LocalFolder(sent / send), send, open_checkpoint(LocalFolder(base), "base"))
    for name, tensor in found.body.items():
        whole = found.read(name).reshape(-1)
        for start, stop in ((0, 1), (3, 5), (7, tensor.size - 2), (tensor.size - 1, tensor.size)):
            if 0 <= start < stop <= tensor.size:
                np.testing.assert_array_equal(elements(found, name, start, stop), whole[start:stop], err_msg=name)


def test_differences_are_looked_at_and_withdrawn_as_others_are(
    tmp_path: Path, base: Path, sent: Path, coldctl: Run
) -> None:
    assert coldctl("check", sent, "--base", base, "--deep").code == 0
    ran = coldctl("check", sent)
    assert ran.code == 3
    assert ran.stderr.count("can decode") == 3
    assert coldctl("lineage", sent / "delta-int8").code == 0
    ran = coldctl("evaluate", sent / "delta-int8", "--suite", tmp_path / "x.toml", "--output", tmp_path / "e")
    assert ran.code == 2
    assert coldctl("fuse", sent, "--base", base, "--output", tmp_path / "fused", "--leave-one-out").code == 0
    for name in DELTAS:
        rest = [sent / other for other in ("full", *DELTAS, "lora") if other != name]
        assert coldctl("fuse", *rest, "--base", base, "--output", tmp_path / f"no-{name}").code == 0
        ran = coldctl(
            "fuse", tmp_path / "fused", sent, "--without", name, "--base", base, "--output", tmp_path / f"x-{name}"
        )
        assert ran.code == 0, ran.stderr
        assert digest(tmp_path / f"x-{name}") == digest(tmp_path / f"no-{name}")
        left_out = tmp_path / "fused" / "leave-one-out" / name
        np.testing.assert_allclose(
            np.concatenate([value.reshape(-1) for value in body(left_out).values()]),
            np.concatenate([value.reshape(-1) for value in body(tmp_path / f"no-{name}").values()]),
            rtol=1e-6, atol=1e-8,
        )  # fmt: skip


def test_a_difference_from_another_base_is_refused(tmp_path: Path, base: Path, sent: Path, coldctl: Run) -> None:
    other = tiny.perturb(base, tmp_path / "other", seed=9)
    for flags in ((), ("--allow-other-base",), ("--allow-other-base", "--no-verify")):
        ran = coldctl("fuse", sent / "delta-bf16", "--base", other, "--output", tmp_path / "out", *flags)
        assert ran.code == 2
        lines = [line for line in ran.stderr.splitlines() if line.startswith("  - ")]
        assert len(lines) == 1, ran.stderr
        assert "was finetuned from another base" in lines[0]
        assert lines[0].endswith("as --base")
        assert not (tmp_path / "out").exists()
    ran = coldctl("check", sent / "delta-int8", "--base", other, "--deep", "--json")
    assert ran.code == 3
    assert len(ran.json["checked"][0]["problems"]) == 1
    assert coldctl("fuse", sent / "delta-int8", "--base", tiny.make_base("bert", tmp_path / "x", seed=2),
                   "--output", tmp_path / "out").code == 2  # fmt: skip


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a difference with other tensors and a manifest that is whole, as a stranger could make it."""
    from coldctl.artifacts import manifest as manifests

    shutil.copytree(source, target)
    tensors, metadata = tiny.read_tensors(target / "delta.safetensors")
    change(tensors)
    tiny.write_tensors(target / "delta.safetensors", list(tensors.items()), metadata)
    document = manifest(target)
    document["files"]["delta.safetensors"] = manifests.digest_of_file(target / "delta.safetensors")
    document.pop("outside_body")
    document["manifest_digest"] = digest_of({k: v for k, v in document.items() if k != "manifest_digest"})
    (target / "coldctl.json").write_text(json.dumps(document))
    return target


LAYER = "encoder.layer.0.output.dense.weight"
FORGED: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "not a number": ("delta-bf16", lambda found: found[LAYER].fill_(float("nan")), f"{LAYER} holds a not-a-number"),
    "infinite scale": (
        "delta-int8",
        lambda found: found[f"{LAYER}.scale"].fill_(float("inf")),
        f"{LAYER} holds a not-a-n",
    ),
    "missing": ("delta-int8", lambda found: found.pop(LAYER), f"has no {LAYER}"),
    "without its scale": ("delta-int8", lambda found: found.pop(f"{LAYER}.scale"), f"has no {LAYER}.scale"),
    "another shape": (
        "delta-bf16",
        lambda found: found.update({LAYER: found[LAYER].T.contiguous()}),
        "BF16 [32, 16], not",
    ),
    "another dtype": (
        "delta-bf16",
        lambda found: found.update({LAYER: found[LAYER].float()}),
        "F32 [16, 32], not BF16",
    ),
    "more": (
        "delta-bf16",
        lambda found: found.update({"classifier.weight": found[LAYER]}),
        "'classifier.weight', which",
    ),
    "another value": ("delta-int8", lambda found: found[LAYER].add_(1), "its body is sha256:"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_bad_difference_is_named(case: str, tmp_path: Path, base: Path, sent: Path, coldctl: Run) -> None:
    send, change, words = FORGED[case]
    bad = rewritten(sent / send, tmp_path / "bad", change)
    ran = coldctl("fuse", bad, sent / "full", "--base", base, "--output", tmp_path / "out")
    assert ran.code == 2
    assert words in ran.stderr, ran.stderr
    assert str(bad) in ran.stderr
    assert not (tmp_path / "out").exists()
    assert coldctl("check", bad, "--base", base, "--deep").code == 3


def test_a_difference_needs_its_manifest(tmp_path: Path, base: Path, sent: Path, coldctl: Run) -> None:

    bad = Path(shutil.copytree(sent / "delta-bf16", tmp_path / "bad"))
    document = {**manifest(bad), "encoding": "delta-int4"}
    document["manifest_digest"] = digest_of({k: v for k, v in document.items() if k != "manifest_digest"})
    (bad / "coldctl.json").write_text(json.dumps(document))
    ran = coldctl("fuse", bad, "--base", base, "--output", tmp_path / "out")
    assert ran.code == 2
    assert "has the encoding 'delta-int4', this program knows delta-bf16, delta-int8: update coldctl" in ran.stderr
    (bad / "coldctl.json").unlink()
    shutil.copy(base / "config.json", bad)
    ran = coldctl("fuse", bad, "--base", base, "--output", tmp_path / "out")
    assert ran.code == 2
    assert "has no coldctl.json, which says from what it differs: fetch it again" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_difference_that_was_damaged_is_named(tmp_path: Path, base: Path, sent: Path, coldctl: Run) -> None:
    for number, damage in enumerate(("cut", "changed")):
        bad = Path(shutil.copytree(sent / "delta-int8", tmp_path / f"bad-{number}"))
        data = (bad / "delta.safetensors").read_bytes()
        (bad / "delta.safetensors").write_bytes(data[:-7] + (b"\x55" + data[-6:] if damage == "changed" else b""))
        ran = coldctl("fuse", bad, sent / "full", "--base", base, "--output", tmp_path / "out")
        assert ran.code == 2
        assert str(bad) in ran.stderr
        ran = coldctl("fuse", bad, sent / "full", sent / "lora", "--base", base, "--screen", "reject",
                      "--output", tmp_path / f"out-{number}", "--json")  # fmt: skip
        assert ran.code == 0, ran.stderr
        assert sorted(item["status"] for item in ran.json["contributions"]) == ["fused", "fused", "rejected"]


def test_what_is_sent_is_part_of_what_it_is(
    tmp_path: Path, base: Path, dataset: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = trained(coldctl, dataset, base, tmp_path / "out", "--send", "delta-bf16")
    before = (output / "coldctl.json").read_bytes()
    trained(coldctl, dataset, base, output, "--send", "delta-bf16")
    assert (output / "coldctl.json").read_bytes() == before
    common = ("finetune", dataset, "--base", base, "--output", output, "--name", "mine", *FAST)
    assert coldctl(*common, "--send", "delta-int8").code == 2
    ran = coldctl(*common, "--overwrite", "--send", "delta-bf16", "--lora-rank", 2)
    assert ran.code == 2
    assert "--send lora" in ran.stderr
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COLDCTL_STATE", str(tmp_path / "file"))
    ran = coldctl(*common, "--overwrite", "--send", "delta-int8")
    assert ran.code == 2
    assert "set COLDCTL_STATE" in ran.stderr
    assert not (tmp_path / ".out.partial").exists()  # it was seen before the training
    ran = coldctl(*common, "--send", "int4")
    assert ran.code == 2
    assert "delta-bf16, delta-int8, lora" in ran.stderr
    again = trained(coldctl, dataset, base, tmp_path / "again", "--send", "delta-bf16")
    assert (again / "delta.safetensors").read_bytes() == (output / "delta.safetensors").read_bytes()


def test_rows_that_stand_still_and_empty_tensors(tmp_path: Path, coldctl: Run) -> None:
    """Through the library, for no base of ours has such tensors."""
    import torch

    from coldctl.checkpoints.checkpoint import open_checkpoint
    from coldctl.checkpoints.deltas import open_delta, write_delta
    from coldctl.storage.files import LocalFolder

    names = {"a": (3, 4), "a-b": (3,), "none": (0, 4), "hollow": (4, 0), "one": (), "cube": (2, 3, 2), "tiny": (2, 2)}
    folders = []
    for number, name in enumerate(("base", "new")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
        tensors = {
            key: torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape) for key, shape in names.items()
        }
        if number:
            tensors = {key: value + torch.arange(value.numel()).reshape(value.shape) for key, value in tensors.items()}
            tensors["a"][0] = torch.arange(4)  # a row that stood still
        tensors["tiny"] = torch.full((2, 2), 1e-44 * number)  # too small to be divided by 127
        tiny.write_tensors(folder / "model.safetensors", list(tensors.items()), {"format": "pt"})
        folders.append(open_checkpoint(LocalFolder(folder), name))
    start, new = folders
    for send, tolerance in (("delta-bf16", 2.0**-8), ("delta-int8", 1 / 127)):
        output = tmp_path / send
        output.mkdir()
        write_delta(new, start, output, send)
        found = open_delta(LocalFolder(output), "x", start, send)
        assert list(found.body) == sorted(names)
        for name in names:
            np.testing.assert_allclose(found.read(name), new.read(name), rtol=tolerance, atol=1e-43, err_msg=name)
    # A base that was given other tensors meanwhile: what is owed counts where there is a place for it.
    owed = replace(new, body={name: tensor for name, tensor in new.body.items() if name != "cube"})
    output = tmp_path / "owed"
    output.mkdir()
    write_delta(new, start, output, "delta-bf16", owed=[owed])
    found = open_delta(LocalFolder(output), "x", start, "delta-bf16")
    np.testing.assert_allclose(found.read("one"), 2 * new.read("one"), rtol=2.0**-8)
    np.testing.assert_allclose(found.read("cube"), new.read("cube"), rtol=2.0**-8)


def test_differences_that_an_encoding_cannot_hold(tmp_path: Path) -> None:
    import torch

    from coldctl.checkpoints.checkpoint import open_checkpoint
    from coldctl.checkpoints.deltas import write_delta
    from coldctl.common.errors import CheckpointError
    from coldctl.storage.files import LocalFolder

    folders = []
    for sign, name in ((-1, "base"), (1, "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
        tensors = [("a", torch.full((2, 2), sign * 3e38)), ("a.scale", torch.ones(2))]
        tiny.write_tensors(tmp_path / name / "model.safetensors", tensors, {"format": "pt"})
        folders.append(open_checkpoint(LocalFolder(tmp_path / name), name))
    start, new = folders
    with pytest.raises(
        CheckpointError, match="new: a differs from the base by what is no finite number: lower --learning-r"
    ):
        write_delta(new, start, tmp_path, "delta-bf16")
    with pytest.raises(CheckpointError, match=r"has both a and a\.scale: take delta-bf16"):
        write_delta(new, start, tmp_path, "delta-int8")
    assert not (tmp_path / "delta.safetensors").exists()


def steps(coldctl: Run, data: Path, base: Path, folder: Path, count: int) -> tuple[Body, Body]:
    """Iterations of one contributor with 8 bits: what it learned in all, and where the base model ended."""
    learned = {name: np.zeros(value.shape) for name, value in body(base).items()}
    for number in range(1, count + 1):
        small = trained(coldctl, data, base, folder / f"small-{number}", "--send", "delta-int8")
        full = body(trained(coldctl, data, base, folder / f"full-{number}"))
        for name, value in body(base).items():
            learned[name] += full[name].astype(np.float64) - value
        ran = coldctl("fuse", small, "--base", base, "--output", folder / f"fused-{number}")
        assert ran.code == 0, ran.stderr
        base = folder / f"fused-{number}"
    return learned, body(base)


def test_what_rounding_loses_is_sent_the_next_time(
    tmp_path: Path, base: Path, dataset: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setenv("COLDCTL_STATE", str(state))
    learned, end = steps(coldctl, dataset, base, tmp_path / "runs", 3)
    tensors, _ = tiny.read_tensors(tmp_path / "runs" / "small-3" / "delta.safetensors")
    for name, origin in body(base).items():
        last = tensors[f"{name}.scale"].double().numpy()
        last = last.reshape(-1, *[1] * (origin.ndim - 1)) if origin.ndim > 1 else last
        error = np.abs(end[name] - (origin + learned[name]))
        rounding = 4 * 2.0**-24 * np.abs(end[name]) + 1e-9  # of the base models in between
        assert np.all(error <= 0.51 * last + rounding), name  # without feedback three errors add up
    kept = sorted(state.rglob("*.safetensors"))
    assert len(kept) == 2  # the last one, and that which it took in
    assert {path.stat().st_mode & 0o777 for path in state.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in state.rglob("*") if path.is_dir()} == {0o700}
    digests = {path.stem for path in kept}
    assert digests == {
        manifest(tmp_path / "runs" / f"small-{n}")["body_digest"].removeprefix("sha256:") for n in (2, 3)
    }
    assert sorted(path.name for path in (tmp_path / "runs" / "small-3").iterdir()) == [
        "coldctl.json", "delta.safetensors", "training.png",
    ]  # fmt: skip
    ran = coldctl("finetune", dataset, "--base", tmp_path / "runs" / "fused-2", "--output", tmp_path / "again",
                  "--name", "mine", "--send", "delta-int8", *FAST)  # fmt: skip
    assert "takes along what rounding left of 1 contribution" in ran.stderr
    again, before = (folder / "delta.safetensors" for folder in (tmp_path / "again", tmp_path / "runs" / "small-3"))
    assert again.read_bytes() == before.read_bytes()
    ran = coldctl("finetune", dataset, "--base", tmp_path / "runs" / "fused-2", "--output", tmp_path / "other",
                  "--name", "other", "--send", "delta-int8", *FAST)  # fmt: skip
    assert "takes along" not in ran.stderr


def test_interrupted_before_it_is_published_nothing_is_lost_or_taken_twice(
    tmp_path: Path, base: Path, dataset: Path, coldctl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(base_model: Path, name: str) -> Ran:
        return coldctl("finetune", dataset, "--base", base_model, "--output", tmp_path / name, "--name", "mine",
                       "--send", "delta-int8", *FAST)  # fmt: skip

    monkeypatch.setenv("COLDCTL_STATE", str(tmp_path / "undisturbed"))
    assert run(base, "one").code == 0
    assert coldctl("fuse", tmp_path / "one", "--base", base, "--output", tmp_path / "fused").code == 0
    assert run(tmp_path / "fused", "two").code == 0

    def interrupted(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial") and not path.name.startswith(".fused"):
            raise KeyboardInterrupt
        return renamed(path, target)

    renamed = Path.rename
    monkeypatch.setenv("COLDCTL_STATE", str(tmp_path / "disturbed"))
    for base_model, name in ((base, "first"), (tmp_path / "fused", "second")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", interrupted)
            assert run(base_model, name).code == 130
        assert not (tmp_path / name).exists()
        assert len(list((tmp_path / "disturbed").rglob("*.safetensors"))) == (1 if name == "first" else 2)
        ran = run(base_model, name)
        assert ran.code == 0, ran.stderr
        assert ("takes along" in ran.stderr) == (name == "second")
    for one, two in (("one", "first"), ("two", "second")):
        expected, found = (tmp_path / name / "delta.safetensors" for name in (one, two))
        assert found.read_bytes() == expected.read_bytes()
    kept = [sorted(path.relative_to(tmp_path / state) for path in (tmp_path / state).rglob("*"))
            for state in ("undisturbed", "disturbed")]  # fmt: skip
    assert kept[0] == kept[1]


def test_a_residual_is_owed_where_its_contribution_was_fused_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldctl.training import residuals

    monkeypatch.setenv("COLDCTL_STATE", str(tmp_path))

    def base(*generations: str, rejected: str = "-") -> Any:
        """A base model's manifest; each generation names the contributions fused in it by letters."""
        made = [
            {"contributions": [{"name": letter, "body_digest": f"sha256:{letter * 64}",
                                "status": "rejected" if letter in rejected else "fused"} for letter in letters]}
            for letters in generations
        ]  # fmt: skip
        return {**made[-1], "ancestors": made[:-1]} if made else None

    def contribute(on: Any, digest: str, letter: str, name: str = "me") -> str:
        with residuals.account(name, on, f"sha256:{digest * 64}") as own:
            own.draft.write_bytes(b"")
            own.settle(f"sha256:{letter * 64}")
            return "".join(sorted(path.stem[0] for path in own.owed))

    assert contribute(base(), "0", "a") == ""
    assert contribute(base(), "0", "b") == ""  # another run from the same base, under the same name
    assert contribute(base("b"), "1", "c") == "b"  # each run finds its own
    assert contribute(base("a"), "2", "d") == "a"
    assert contribute(base("a"), "2", "d") == "a"  # again, before it was fused
    assert contribute(base("a", "x"), "3", "e") == "a"  # d was not fused: a is still owed
    assert contribute(base("a", "x", "d", rejected="d"), "4", "f") == "a"
    assert contribute(base("a", "x", "e"), "5", "1") == "e"
    assert contribute(base("a", "x", "e1"), "6", "2") == "1"  # e was taken in
    assert contribute(base("a", "x", "e1"), "6", "3", name="you") == ""
    assert contribute(base("a", "c2"), "7", "4") == "2c"  # a late one of another line: both are owed
    for letter in "56789":
        contribute(base(), "9", letter)
    assert len(list((tmp_path / "residuals" / "me" / ("9" * 64)).glob("*.safetensors"))) == 4


def test_the_head_stays_at_home(tmp_path: Path, base: Path, coldctl: Run) -> None:
    """With `--body-only` neither the head nor a label's name leaves, and the body is the same."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel

    data = tiny.make_dataset(tmp_path / "data", labels=("zz_ill", "zz_well"))
    for send in ("full", "lora", "delta-bf16"):
        whole = trained(coldctl, data, base, tmp_path / "whole" / send, "--send", send, name=send)
        alone = trained(coldctl, data, base, tmp_path / "alone" / send, "--send", send, "--body-only", name=send)
        assert manifest(alone)["body_digest"] == manifest(whole)["body_digest"]
        assert manifest(alone)["dataset"]["num_labels"] == 2
        assert manifest(whole)["dataset"]["labels"] == ["zz_ill", "zz_well"]
        for path in alone.rglob("*"):
            assert b"zz_" not in path.read_bytes(), path
            if path.suffix == ".safetensors":
                assert not [name for name in tiny.read_tensors(path)[0] if "classifier" in name]
    assert manifest(tmp_path / "alone" / "full")["encoding"] == "body"
    model, report = AutoModel.from_pretrained(tmp_path / "alone" / "full", output_loading_info=True)
    assert not [name for name in report["missing_keys"] if not name.startswith("pooler.")]
    assert not report["unexpected_keys"]
    for name, value in body(tmp_path / "whole" / "full").items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), value)
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "alone" / "lora").merge_and_unload()
    ran = coldctl("fuse", tmp_path / "alone" / "lora", "--base", base, "--output", tmp_path / "one")
    assert ran.code == 0, ran.stderr
    for name, value in body(tmp_path / "one").items():
        torch.testing.assert_close(adapted.state_dict()[name], torch.from_numpy(value), rtol=1e-5, atol=1e-6)
    found = []
    for folder in ("whole", "alone"):
        ran = coldctl("fuse", tmp_path / folder, "--base", base, "--output", tmp_path / f"{folder}-fused", "--json")
        assert ran.code == 0, ran.stderr
        assert all(item["verified"] for item in ran.json["contributions"])
        found.append(ran.json["body_digest"])
    assert found[0] == found[1]


def test_a_base_in_a_store_is_as_good(tmp_path: Path, base: Path, sent: Path, workshop: Path, coldctl: Run) -> None:
    import fsspec

    fsspec.filesystem("memory").put(f"{base}/", "/traffic/base/", recursive=True)
    data = workshop / "data-delta-int8"
    there = trained(
        coldctl, data, "memory://traffic/base", tmp_path / "there", "--send", "delta-int8", name="delta-int8"
    )
    assert (there / "delta.safetensors").read_bytes() == (sent / "delta-int8" / "delta.safetensors").read_bytes()
    ran = coldctl("fuse", sent, there, "--base", "memory://traffic/base", "--output", tmp_path / "fused")
    assert ran.code == 0, ran.stderr


def test_residuals_that_cannot_be_kept_or_do_not_fit(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from coldctl.checkpoints.checkpoint import open_checkpoint
    from coldctl.common.errors import CheckpointError, OutputError
    from coldctl.storage.files import LocalFolder
    from coldctl.training import residuals

    monkeypatch.delenv("COLDCTL_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert residuals.folder() == tmp_path / "coldctl" / "residuals"
    with residuals.account("me", None, f"sha256:{'0' * 64}") as own:
        (own.place / ("0" * 64)).write_text("in the way")
        with pytest.raises(OutputError, match="set COLDCTL_STATE to a directory of your own"):
            own.settle(f"sha256:{'1' * 64}")
        (own.place / ("0" * 64)).unlink()
        for number in range(6):  # the clock went back: what is kept just now is not the newest
            own.draft.write_bytes(b"")
            os.utime(own.draft, (9 - number, 9 - number))
            own.settle(f"sha256:{str(number) * 64}")
            assert (own.place / ("0" * 64) / f"{str(number) * 64}.safetensors").exists()
        assert len(list((own.place / ("0" * 64)).iterdir())) == 5
        path = own.place / "odd.safetensors"
        tiny.write_tensors(path, [("embeddings.word_embeddings.weight", torch.zeros(3, 3))], {})
        own.owed.append(path)
        with pytest.raises(CheckpointError, match="which the base has not like this: remove the file"):
            own.opened(open_checkpoint(LocalFolder(base), "base"))
