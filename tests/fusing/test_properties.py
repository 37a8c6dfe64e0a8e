"""Properties of `coldctl fuse` on generated checkpoints, through the command: any shapes, dtypes, shards, block sizes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coldctl.fusing import blocks
from conftest import run_coldctl
from helpers import tiny

Tensors = Mapping[str, torch.Tensor]
NAMES = ("embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight", "encoder.layer.0.dense.bias", "scalar")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
commands = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    """What is fused: a base, its contributions, and the elements per block."""

    base: Tensors
    contributions: tuple[Tensors, ...]
    block: int


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    """Bodies of one to four tensors; a contribution's dtype may differ from the base's."""
    shapes = {
        name: draw(st.lists(st.integers(1, 5), max_size=2).map(tuple)) for name in NAMES[: draw(st.integers(1, 4))]
    }
    shapes[NAMES[0]] = (draw(st.integers(1, 9)), 3)
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    count = draw(st.integers(1, 6))

    def body(dtype: torch.dtype) -> Tensors:
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            .mul(10.0 ** draw(st.integers(-3, 3)))
            .to(dtype)
            for name, shape in shapes.items()
        }

    base = body(draw(st.sampled_from(dtypes)))
    contributions = tuple(body(draw(st.sampled_from(dtypes))) for _ in range(count))
    return Case(base, contributions, draw(st.sampled_from([1, 2, 3, 7, 1 << 18])))


def save(folder: Path, body: Tensors, *, prefix: str = "", shards: int = 1, reverse: bool = False) -> Path:
    """A checkpoint with this body and a head of its own."""
    folder.mkdir(parents=True)
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification" if prefix else "BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {prefix + name: tensor for name, tensor in body.items()}
    if prefix:
        tensors["classifier.weight"] = torch.full((2, 3), float(hash(folder.name) % 97))
    tiny.write_tensors(folder / "model.safetensors", tensors.items(), {"format": "pt"})
    if shards > 1 or reverse:
        tiny.reshard(
            folder, folder.with_name(f"{folder.name}-again"), shards=min(shards, len(tensors)), reverse=reverse
        )
        return folder.with_name(f"{folder.name}-again")
    return folder


class Workbench:
    """Checkpoints of a case on disk, and fuses of them."""

    def __init__(self, root: Path, case: Case) -> None:
        self.root, self.case = root, case
        self.base = save(root / "base", case.base)
        self.models = [save(root / f"model-{index}", body) for index, body in enumerate(case.contributions)]
        self._made = 0

    def fuse(self, *flags: object, models: list[Path] | None = None, block: int | None = None) -> Path:
        """The fused model's directory; `block` elements at a time."""
        self._made += 1
        output = self.root / f"fused-{self._made}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "_LARGEST", block or self.case.block)
            inputs = self.models if models is None else models
            ran = run_coldctl("fuse", *inputs, "--base", self.base, "--output", output, "--screen", "off", *flags)
        assert ran.code == 0, ran.stderr
        return output


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def values(body: Tensors) -> NDArray[np.float64]:
    return np.concatenate([body[name].to(torch.float64).numpy().reshape(-1) for name in sorted(body)])


def read(folder: Path) -> Tensors:
    return tiny.read_tensors(folder / "model.safetensors")[0]


def on_workbench(case: Case, check: Any) -> None:
    with TemporaryDirectory() as root:
        check(Workbench(Path(root), case))


@commands
@given(cases(), st.integers(1, 7))
def test_averaging_copies_is_the_identity(case: Case, count: int) -> None:
    def check(bench: Workbench) -> None:
        copies = [save(bench.root / f"copy-{number}", case.base, prefix="bert.") for number in range(count)]
        assert values(read(bench.fuse(models=copies))).tobytes() == values(case.base).tobytes()

    on_workbench(case, check)


@commands
@given(cases(), st.randoms(use_true_random=False), st.integers(1, 3), st.booleans(), st.integers(1, 9))
def test_layout_order_and_blocks_change_no_bit(case: Case, random: Any, shards: int, reverse: bool, block: int) -> None:
    def check(bench: Workbench) -> None:
        first = weights(bench.fuse())
        again = [
            save(bench.root / f"other-{index}" / f"model-{index}", body, prefix="bert.", shards=shards, reverse=reverse)
            for index, body in enumerate(case.contributions)
        ]
        random.shuffle(again)
        for length in (block, 1 << 18):
            assert weights(bench.fuse(models=again, block=length)) == first

    on_workbench(case, check)


@commands
@given(cases())
def test_the_mean_is_the_mean_and_lies_inside_its_inputs(case: Case) -> None:
    def check(bench: Workbench) -> None:
        found = values(read(bench.fuse()))
        parts = np.stack([values(body) for body in case.contributions])
        dtype = next(iter(case.base.values())).dtype
        low, high = (
            torch.from_numpy(edge).to(dtype).to(torch.float64).numpy()
            for edge in (parts.min(axis=0), parts.max(axis=0))
        )
        assert (low <= found).all()
        assert (found <= high).all()
        tolerance = torch.finfo(dtype).eps
        np.testing.assert_allclose(found, parts.mean(axis=0), rtol=tolerance, atol=4 * tolerance * np.abs(parts).max())

    on_workbench(case, check)


@commands
@given(cases(), st.floats(-3, 8).filter(lambda scale: abs(scale) > 1e-3))
def test_the_step_starts_at_the_base_and_passes_through_the_mean(case: Case, scale: float) -> None:
    def check(bench: Workbench) -> None:
        assert values(read(bench.fuse("--scale", 0))).tobytes() == values(case.base).tobytes()
        assert weights(bench.fuse("--scale", 1)) == weights(bench.fuse())
        found = values(read(bench.fuse("--scale", scale)))
        start, mean = values(case.base), np.stack([values(body) for body in case.contributions]).mean(axis=0)
        tolerance = torch.finfo(next(iter(case.base.values())).dtype).eps
        largest = max(np.abs(start).max(), np.abs(mean).max(), 1e-3) * (1 + abs(scale)) * 2
        np.testing.assert_allclose(found, start + scale * (mean - start), rtol=tolerance, atol=4 * tolerance * largest)

    on_workbench(case, check)


@commands
@given(cases((torch.float32,)), st.data())
def test_weights_may_sum_to_anything(case: Case, data: st.DataObject) -> None:
    def check(bench: Workbench) -> None:
        count = len(case.contributions)
        shares = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count).filter(any))
        factor = data.draw(st.sampled_from([0.5, 2.0, 64.0, 2.0**-20]))  # powers of two: the shares stay the same
        found = []
        for scaled in (1.0, factor):
            table = bench.root / f"weights-{scaled}.json"
            names = [path.name for path in bench.models]
            table.write_text(json.dumps(dict(zip(names, (scaled * share for share in shares), strict=True))))
            found.append(bench.fuse("--weights", table))
        assert weights(found[0]) == weights(found[1])
        parts = np.stack([values(body) for body in case.contributions])
        expected = np.asarray(shares, np.float64) @ parts / sum(shares)
        np.testing.assert_allclose(values(read(found[0])), expected, rtol=1e-6, atol=1e-6 * np.abs(parts).max())
        manifest = json.loads((found[0] / "coldctl.json").read_text())
        assert sum(record["weight"] for record in manifest["contributions"]) == pytest.approx(1)
        digest = hashlib.sha256(weights(found[0])).hexdigest()
        assert manifest["files"]["model.safetensors"] == f"sha256:{digest}"

    on_workbench(case, check)
