"""The Python API: what it loads, which keywords it takes, what it returns, and that its types are current."""

import inspect
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

import coldctl
from coldctl.api.display import table_html
from coldctl.api.keywords import Common
from coldctl.common.progress import SILENT
from coldctl.config.fields import settings_of
from coldctl.config.settings import EvaluateConfig, FinetuneConfig, FuseConfig, PublishConfig
from coldctl.fusing.methods import METHODS
from conftest import suite_text
from helpers import tiny
from helpers.bodies import body

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def evaluation(suite: Path, base: Path, contributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "evaluation"
    coldctl.evaluate(contributions / "one", baseline=base, suite=suite, output=output, jobs=1, progress=False)
    return output


def test_import_loads_no_library() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'rich', 'typer', 'msgspec'}"
    code = f"import sys, coldctl; dir(coldctl); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_functions_load_no_torch() -> None:
    code = "import sys; from coldctl import *; print({'torch', 'transformers', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_an_unknown_attribute_is_an_error() -> None:
    assert set(coldctl.__all__) <= set(dir(coldctl))
    with pytest.raises(AttributeError, match="no attribute 'fusion'"):
        _ = coldctl.fusion  # type: ignore[attr-defined]


def test_the_types_are_current() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "api_stub.py"))
    assert script["PATH"].read_text() == script["stub_text"](), "run `make reference`"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("finetune", FinetuneConfig),
        ("finetune_suite", FinetuneConfig),
        ("fuse", FuseConfig),
        ("evaluate", EvaluateConfig),
        ("publish", PublishConfig),
    ],
)
def test_every_setting_is_a_keyword_with_help(name: str, kind: type) -> None:
    function = getattr(coldctl, name)
    assert set(settings_of(kind)) <= set(inspect.signature(function).parameters)
    for setting in settings_of(kind).values():
        assert f"    {setting.name}: {setting.help}" in function.__doc__


def test_keywords_win_over_the_file(tmp_path: Path, base: Path, contributions: Path) -> None:
    (tmp_path / "c.toml").write_text('[fuse]\nmethod = "median"\nscale = 2\n')
    fused = coldctl.fuse(
        contributions, base=base, output=tmp_path / "fused", config=tmp_path / "c.toml", scale="0.5", progress=False
    )
    assert (fused.manifest["config"]["method"], fused.manifest["config"]["scale"]) == ("median", "0.5")


def test_fuse_returns_what_it_wrote(tmp_path: Path, base: Path, contributions: Path) -> None:
    made = [contributions / name for name in ("one", "two")]
    fused = coldctl.fuse(made, base=str(base), output=tmp_path / "fused", progress=False)
    assert (fused.path, fused.unchanged) == (tmp_path / "fused", False)
    assert sorted(record["name"] for record in fused.contributions) == ["data-one", "data-two"]
    assert coldctl.fuse(made, base=base, output=tmp_path / "fused", progress=False).unchanged
    shown = fused._repr_html_()
    assert "<td style='text-align: right'>0.500</td>" in shown
    assert "data:image/png;base64," in shown
    left = coldctl.fuse([fused.path, *made], base=base, output=tmp_path / "left", without="data-one", progress=False)
    assert [record["name"] for record in left.contributions] == ["data-two"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dencity": 0.5}, r"fuse\(\): unknown key 'dencity': did you mean 'density'"),
        ({"density": 2}, "arguments: density = 2 is out of range: it must be 0 to 1"),
        ({"method": "tise"}, "did you mean 'ties'"),
        ({"scale": 2, "outer_lr": 1}, "exclude each other"),
    ],
)
def test_wrong_keywords_are_config_errors(
    keywords: dict[str, object], message: str, tmp_path: Path, base: Path, contributions: Path
) -> None:
    function = coldctl.fuse
    with pytest.raises(coldctl.ConfigError, match=message):
        function(contributions, base=base, output=tmp_path / "fused", progress=False, **keywords)  # type: ignore[arg-type]
    assert not (tmp_path / "fused").exists()


def test_a_missing_keyword_is_a_type_error(contributions: Path) -> None:
    with pytest.raises(TypeError, match="'base'"):
        coldctl.fuse(contributions, output="fused")  # type: ignore[call-arg]


def test_finetune_returns_path_scores_and_a_chart(tmp_path: Path, base: Path, dataset: Path) -> None:
    made = coldctl.finetune(dataset, base=base, output=tmp_path / "mine", name="mine", epochs=1, progress=False)
    assert (made.name, made.path, made.manifest["name"]) == ("mine", tmp_path / "mine", "mine")
    assert made.metrics["test"]["accuracy"] >= 0
    assert "<caption>mine</caption>" in made._repr_html_()
    assert "data:image/png;base64," in made._repr_html_()


def test_a_suite_error_holds_what_was_made(tmp_path: Path, base: Path) -> None:
    tiny.make_dataset(tmp_path / "red")
    (tmp_path / "suite.toml").write_text(suite_text(base.name))
    with pytest.raises(coldctl.SuiteError, match=r"1 of 2 contributions failed.*--only green") as raised:
        coldctl.finetune_suite(tmp_path / "suite.toml", base=base, output=tmp_path / "made", jobs=1, progress=False)
    assert [made.name for made in raised.value.contributions] == ["red"]
    assert isinstance(raised.value.failed["green"], coldctl.DataError)
    assert raised.value.exit_code == 3


def test_results_become_rows_and_a_pandas_table(evaluation: Path) -> None:
    pytest.importorskip("pandas")
    loaded = coldctl.load_results(evaluation)
    table = loaded.to_pandas()
    assert list(table["dataset"]) == ["red", "green", "blue"]
    assert (table["gain_low"] <= table["gain"]).all()
    assert [row["group"] for row in loaded.averages()] == ["all", "seen", "unseen"]
    assert loaded.regressions(margin=200) == []
    assert "blue (unseen)" in loaded._repr_html_()


def test_to_pandas_says_what_to_install(evaluation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(coldctl.ConfigError, match="pip install pandas"):
        coldctl.load_results(evaluation).to_pandas()


def test_load_results_refuses_a_changed_file(tmp_path: Path, evaluation: Path) -> None:
    for file in ("coldctl.json", "results.json"):
        (tmp_path / file).write_text((evaluation / file).read_text().replace('"gain"', '"gian"'))
    with pytest.raises(coldctl.ManifestError):
        coldctl.load_results(tmp_path)


def test_publish_lists_what_it_would_send(tmp_path: Path, base: Path, contributions: Path) -> None:
    fused = coldctl.fuse(contributions, base=base, output=tmp_path / "fused", progress=False)
    planned = coldctl.publish(fused.path, to=tmp_path / "p", license="mit", dry_run=True, progress=False)
    assert (planned.dry_run, (tmp_path / "p").exists()) == (True, False)
    assert "<td style='text-align: left'>model.safetensors</td>" in planned._repr_html_()


def test_check_and_lineage_show_what_they_know(base: Path, contributions: Path) -> None:
    report = coldctl.check([contributions / "one", contributions / "two"], base=base, progress=False)
    assert report.sound
    assert sorted(checked.name for checked in report.checked) == ["data-one", "data-two"]
    assert "sound" in report._repr_html_()
    ancestry = coldctl.lineage(contributions / "one")
    assert [generation.kind for generation in ancestry.generations] == ["base", "contribution"]
    assert ancestry._repr_html_().startswith("<ul><li><span style='font-weight: bold'>data-one</span>")


def test_progress_is_silent_or_a_listener(capfd: pytest.CaptureFixture[str], base: Path, dataset: Path) -> None:
    with Common(progress=False).listener() as silent:
        assert silent is SILENT
    heard: list[str] = []

    class Heard(type(SILENT)):  # type: ignore[misc]
        def note(self, message: str) -> None:
            heard.append(message)

    output = dataset.parent / "listened"
    coldctl.finetune(dataset, base=base, output=output, epochs=1, progress=Heard())
    assert any(str(output) in message for message in heard)
    coldctl.finetune(dataset, base=base, output=output, epochs=1, progress=False)
    assert capfd.readouterr().err == ""
    coldctl.finetune(dataset, base=base, output=output, epochs=1)
    assert "complete already" in capfd.readouterr().err


def test_html_escapes_what_strangers_wrote() -> None:
    table = Table("<b>name")
    table.add_row("[red]<script>[/]\nx")
    shown = table_html(table)
    assert "<th>&lt;b&gt;name</th>" in shown
    assert "<span style='color: firebrick'>&lt;script&gt;</span><br>x" in shown


@pytest.fixture
def own_method() -> Iterator[str]:
    yield "own-largest"
    METHODS.pop("own-largest", None)


def test_a_merge_method_of_ones_own_is_used_by_name(
    own_method: str, tmp_path: Path, base: Path, contributions: Path
) -> None:
    for _ in range(2):  # as a notebook's cell that runs again

        @coldctl.merge_method(own_method)
        def largest(contributions: np.ndarray, base: np.ndarray, weights: np.ndarray) -> np.ndarray:
            """Take the largest value."""
            return np.asarray(contributions.max(axis=0))

    assert METHODS[own_method].summary == "Take the largest value."
    fused = coldctl.fuse(contributions, base=base, output=tmp_path / "fused", method=own_method, progress=False)
    parts = [body(child) for child in sorted(contributions.iterdir())]
    for name, value in body(fused.path).items():
        np.testing.assert_array_equal(value, np.max([part[name] for part in parts], axis=0))


def test_another_function_under_the_same_name_is_other_work(
    own_method: str, tmp_path: Path, base: Path, contributions: Path
) -> None:
    def fuse() -> coldctl.FusedModel:
        return coldctl.fuse(contributions, base=base, output=tmp_path / "fused", method=own_method, progress=False)

    @coldctl.merge_method(own_method)
    def largest(contributions: np.ndarray, base: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.asarray(contributions.max(axis=0))

    assert not fuse().unchanged
    assert fuse().unchanged

    @coldctl.merge_method(own_method)
    def smallest(contributions: np.ndarray, base: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.asarray(contributions.min(axis=0))

    with pytest.raises(coldctl.OutputError, match="made from other inputs or another config"):
        fuse()


def test_a_built_in_method_is_not_replaced() -> None:
    with pytest.raises(coldctl.ConfigError, match="mean is already a merge method"):
        coldctl.merge_method("mean")(lambda contributions, base, weights: base)
