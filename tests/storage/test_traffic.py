"""Contributions that are written small: differences from the base, adapters, bodies alone; and what is fused of them."""

import json
import shutil
from collections.abc import Callable
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
    from coldctl.checkpoints.formats import open_contribution
    from coldctl.storage.local import LocalFolder

    found = open_contribution(LocalFolder(sent / send), send, open_checkpoint(LocalFolder(base), "base"))
    for name, tensor in found.body.items():
        whole = found.read(name).reshape(-1)
        for start, stop in ((0, 1), (3, 5), (7, tensor.size - 2), (tensor.size - 1, tensor.size)):
            if 0 <= start < stop <= tensor.size:
                np.testing.assert_array_equal(found.floats(name, start, stop), whole[start:stop], err_msg=name)


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
    assert coldctl("fuse", sent, "--base", base, "--output", tmp_path / "fused").code == 0
    for name in DELTAS:
        rest = [sent / other for other in ("full", *DELTAS, "lora") if other != name]
        assert coldctl("fuse", *rest, "--base", base, "--output", tmp_path / f"no-{name}").code == 0
        ran = coldctl(
            "fuse", tmp_path / "fused", sent, "--without", name, "--base", base, "--output", tmp_path / f"x-{name}"
        )
        assert ran.code == 0, ran.stderr
        assert digest(tmp_path / f"x-{name}") == digest(tmp_path / f"no-{name}")


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


def test_what_is_sent_is_part_of_what_it_is(tmp_path: Path, base: Path, dataset: Path, coldctl: Run) -> None:
    output = trained(coldctl, dataset, base, tmp_path / "out", "--send", "delta-bf16")
    before = (output / "coldctl.json").read_bytes()
    trained(coldctl, dataset, base, output, "--send", "delta-bf16")
    assert (output / "coldctl.json").read_bytes() == before
    common = ("finetune", dataset, "--base", base, "--output", output, "--name", "mine", *FAST)
    assert coldctl(*common, "--send", "delta-int8").code == 2
    ran = coldctl(*common, "--overwrite", "--send", "delta-bf16", "--lora-rank", 2)
    assert ran.code == 2
    assert "--send lora" in ran.stderr
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
    from coldctl.storage.local import LocalFolder

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


def test_differences_that_an_encoding_cannot_hold(tmp_path: Path) -> None:
    import torch

    from coldctl.checkpoints.checkpoint import open_checkpoint
    from coldctl.checkpoints.deltas import write_delta
    from coldctl.common.errors import CheckpointError
    from coldctl.storage.local import LocalFolder

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
