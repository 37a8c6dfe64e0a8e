"""`report.html`: one file with charts and sortable tables that needs no network.

Names of models and contributors are untrusted text: the template escapes them, charts hold them as text, and the page's
content security policy allows its own script only.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from coldctl.artifacts.manifest import ContributionRecord, Manifest
from coldctl.common.text import printable
from coldctl.evaluation import charts, markdown
from coldctl.evaluation.curves import Panel
from coldctl.evaluation.scoring import RESAMPLES

_FOLDER = Path(__file__).parent
_TEXTS = ("name", "status", "reason", "dataset", "license", "body_digest")
_NUMBERS = ("weight", "update_norm", "cosine_to_mean", "num_train", "age", "discount")


def page(results: Mapping[str, Any], panels: Sequence[Panel], evaluation: Manifest, origin: Manifest | None) -> str:
    """Return the page of an evaluation.

    `results` is the `results.json` document, `panels` its scores over iterations, `evaluation` the manifest of the
    evaluation, `origin` that of the last model, whose contributions are drawn.
    """
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    sections = _sections(results)
    return _template().render(
        results=results,
        digests={model["name"]: model["body_digest"] for model in results["models"]},
        ranking=_ranking(results) if len(sections) > 1 else [],
        sections=sections,
        curve=[
            charts.as_svg(charts.curve_figure([panel], columns=1), f"curve-{number}")
            for number, panel in enumerate(panels)
        ],
        contributions=_contributions(origin),
        overlaps=markdown.overlap_sentences(results["overlaps"]),
        evaluation=evaluation,
        resamples=RESAMPLES,
        style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        verdict=markdown.verdict_in_words,
        group_name=markdown.group_name,
        interval=markdown.interval,
    )


def _sections(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a section per model and protocol. Those worth a chart are open."""
    pairs = [
        (model["name"], protocol)
        for model in results["models"]
        for protocol in markdown.protocols_of(results, model["name"])
    ]
    charted = charts.charted(results)
    return [
        {
            "model": model,
            "protocol": protocol,
            "open": (model, protocol) in charted,
            "headline": markdown.headline(results, model, protocol),
            "published": markdown.published(results, model) if protocol == "finetune" else [],
            "entries": markdown.rows_of(results["results"], model, protocol),
            "averages": markdown.rows_of(results["averages"], model, protocol),
            "chart": charts.as_svg(charts.gain_figure(results, [(model, protocol)], width=5.6), f"gain-{number}")
            if (model, protocol) in charted
            else None,
        }
        for number, (model, protocol) in enumerate(pairs)
    ]


def _ranking(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the averages over all datasets, best first, each with its averages over seen and unseen datasets."""
    averages = {(entry["model"], entry["protocol"], entry["group"]): entry for entry in results["averages"]}
    rows = [
        entry | {group: averages.get((model, protocol, group)) for group in ("seen", "unseen")}
        for (model, protocol, kind), entry in averages.items()
        if kind == "all"
    ]
    return sorted(rows, key=lambda entry: -float(entry["mean"]))


def _contributions(origin: Manifest | None) -> dict[str, Any] | None:
    """Return the contributions that a manifest lists, with charts that also show those of its ancestors."""
    records = _records(origin or {})
    fused = [record for record in records if record["status"] == "fused" and record["update_norm"] is not None]
    if origin is None or not fused:
        return None
    cosines: dict[str, dict[int, float]] = {}
    for document in (*origin.get("ancestors", []), origin):
        number = document.get("iteration")
        for record in _records(document):
            if isinstance(number, int) and record["status"] == "fused" and record["cosine_to_mean"] is not None:
                cosines.setdefault(record["name"], {})[number] = record["cosine_to_mean"]
    return {
        "model": origin.get("name", ""),
        "norms": charts.as_svg(charts.norm_figure(fused), "norms"),
        "cosines": charts.as_svg(charts.cosine_figure(cosines), "cosines") if cosines else None,
        "records": records,
    }


def _records(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the contributions that a manifest lists, with every key and finite numbers, as manifests are untrusted."""
    records: list[ContributionRecord] = document.get("contributions", [])
    return [
        {key: str(record.get(key) or "") for key in _TEXTS}
        | {key: _number(record.get(key)) for key in _NUMBERS}
        | {"verified": record.get("verified") is True}
        for record in records
    ]


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = printable
    return environment.from_string((_FOLDER / "page.html").read_text(encoding="utf-8"))
