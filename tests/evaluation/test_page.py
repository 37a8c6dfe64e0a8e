"""`report.html` in a real browser: it renders, complains of nothing, sorts, and says where its numbers come from."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Ran, suite_text
from helpers import tiny

Run = Callable[..., Ran]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
HOSTILE = '<img src=x onerror="document.title=1">\u202e'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a whole run of two iterations, one of whose contributors has a hostile name."""
    from conftest import run_coldctl

    folder = tmp_path_factory.mktemp("page")
    base = tiny.make_base("bert", folder / "base")
    for seed, name in enumerate(("red", "green", "blue")):
        tiny.make_dataset(folder / name, seed=seed, test=12 + 12 * seed)
    suite, run = folder / "suite.toml", folder / "run"
    suite.write_text(suite_text("base"))
    commands: list[tuple[Any, ...]] = [("plan", run, "--config", suite, "--iterations", 2)]
    for number in (1, 2):
        place = run / f"iteration-{number:03d}"
        commands.append(("finetune", "--suite", suite, "--base", run, "--output", run, "--jobs", 1))
        if number == 2:
            stranger = place / "contributions" / HOSTILE.replace("/", "")
            commands.append(("finetune", folder / "red", "--base", run, "--output", stranger, "--name", HOSTILE.replace('"', ""),
                             "--epochs", 1, "--batch-size", 16, "--jobs", 1))  # fmt: skip
        commands.append(
            ("fuse", place / "contributions", "--config", suite, "--base", run, "--output", place / "fused")
        )
        commands.append(
            (
                "evaluate",
                place / "fused",
                "--suite",
                suite,
                "--baseline",
                base,
                "--output",
                place / "evaluation",
                "--jobs",
                1,
            )
        )
        commands.append(("promote", run))
    commands.append(("evaluate", run, "--suite", suite, "--output", run / "evaluation", "--protocol", "linear-probe",
                     "--protocol", "finetune", "--protocol", "multitask", "--seeds", 2, "--jobs", 1))  # fmt: skip
    for command in commands:
        ran = run_coldctl(*command)
        assert ran.code == 0, (command, ran.stderr)
    return run


def opened(browser: Any, page: Path, **options: Any) -> tuple[Any, list[str]]:
    tab = browser.new_context(offline=True, **options).new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("requestfailed", lambda request: complaints.append(request.url))
    tab.goto(page.as_uri())
    return tab, complaints


def column(tab: Any, table: int, place: int) -> list[str]:
    cells = tab.locator("table[data-table=scores]").nth(table).locator(f"tbody tr:first-child > *:nth-child({place})")
    return [text.strip() for text in cells.all_inner_texts()]


def test_it_renders_without_a_complaint_and_fits_a_phone(reports: Path, browser: Any) -> None:
    sizes: tuple[dict[str, Any], ...] = (
        {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
        {"viewport": {"width": 375, "height": 700}},
    )
    for options in sizes:
        tab, complaints = opened(browser, reports / "evaluation" / "report.html", **options)
        assert tab.evaluate("document.documentElement.scrollWidth") <= options["viewport"]["width"]
        assert tab.locator("figure svg").count() == 4 + 3 + 2  # curves of two protocols, gains of three, contributions
        box = tab.locator("figure svg").first.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100
        assert complaints == []
    dark, _ = opened(browser, reports / "evaluation" / "report.html", color_scheme="dark")
    light, _ = opened(browser, reports / "evaluation" / "report.html", color_scheme="light")
    colours = [tab.evaluate("getComputedStyle(document.body).backgroundColor") for tab in (dark, light)]
    assert colours == ["rgb(20, 24, 29)", "rgb(255, 255, 255)"]


def test_a_heading_sorts_its_table(reports: Path, browser: Any) -> None:
    tab, complaints = opened(browser, reports / "iteration-002" / "evaluation" / "report.html")
    results = json.loads((reports / "iteration-002" / "evaluation" / "results.json").read_text())["results"]
    assert column(tab, 0, 1) == ["red", "green", "blue"]
    tab.get_by_role("button", name="dataset").first.click()
    assert column(tab, 0, 1) == ["blue", "green", "red"]
    for direction in (True, False):
        tab.get_by_role("button", name="score", exact=True).first.click()
        expected = sorted((entry["mean"] for entry in results), reverse=direction)
        assert [float(text.split(" ")[0]) for text in column(tab, 0, 5)] == [float(f"{mean:.1f}") for mean in expected]
    assert tab.locator("table[data-table=scores]").first.locator("tfoot").is_visible()
    assert complaints == []


def test_every_number_says_where_it_comes_from(reports: Path, browser: Any) -> None:
    tab, _ = opened(browser, reports / "evaluation" / "report.html")
    results = json.loads((reports / "evaluation" / "results.json").read_text())
    entry = next(
        item for item in results["results"] if item["model"] == "iteration-002" and item["protocol"] == "finetune"
    )
    table = tab.locator("details[open]").nth(1).locator("table")
    detail = table.locator("tr.more").first
    assert not detail.is_visible()
    table.get_by_role("button", name=entry["dataset"]).click()
    text = detail.inner_text()
    wanted = [results["baseline"]["body_digest"], results["fingerprints"][entry["dataset"]]]
    wanted += [item[key] for item in entry["seeds"] for key in ("cell", "baseline_cell")]
    assert all(part in text for part in wanted), text
    assert all((reports / "cells" / f"{item['cell']}.json").is_file() for item in entry["seeds"])


def test_a_strangers_name_is_text(reports: Path, browser: Any) -> None:
    tab, complaints = opened(browser, reports / "iteration-002" / "evaluation" / "report.html")
    assert "Evaluation" in tab.title()
    assert tab.locator("img").count() == 0
    assert "<img src=x onerror=" in tab.locator("table[data-table=contributions]").inner_text()
    assert "\u202e" not in tab.content()
    assert complaints == []


def test_the_page_needs_nothing_else(reports: Path) -> None:
    for page in reports.rglob("report.html"):
        text = page.read_text()
        assert "src=" not in text.replace("&lt;img src=x", "")
        assert "url(http" not in text
        assert text.count("<script") == 1
        assert "default-src 'none'" in text
