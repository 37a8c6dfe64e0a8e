"""The model card of a published model: what it is, how it was made, what it gains, how to use it."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldctl.artifacts import layout
from coldctl.artifacts.lineage import generations, mermaid
from coldctl.artifacts.manifest import Manifest
from coldctl.common.text import code, markdown, printable
from coldctl.evaluation.markdown import (
    overlap_sentences,
    protocols_of,
    published_markdown,
    score_table,
    verdict_in_words,
)
from coldctl.publishing import handwritten, licenses
from coldctl.publishing.history import fused_generations, history, with_ancestors

PAPER = "https://arxiv.org/abs/2212.01378"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_TAGS = ("cold-fusion", "model-recycling", "coldctl", "sentence-transformers")
# What the Hub calls our metrics, and what it calls encoders that are older than its owners' names.
_METRICS = {"macro_f1": "f1", "matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
_OWNERS = {
    "FacebookAI": ("roberta-base", "roberta-large", "xlm-roberta-base", "xlm-roberta-large"),
    "google-bert": ("bert-base-uncased", "bert-base-cased", "bert-large-uncased", "bert-large-cased"),
    "distilbert": ("distilbert-base-uncased", "distilbert-base-cased", "distilroberta-base"),
    "albert": ("albert-base-v2", "albert-large-v2"),
}
# Encoders with a TensorFlow class in transformers 4, called as PyTorch's with TF before it.
_TENSORFLOW = {
    "albert", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "esm", "flaubert", "funnel",
    "longformer", "mobilebert", "mpnet", "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm", "xlm-roberta",
}  # fmt: skip
# Those that count positions from the padding id on, which is always 1 in their TensorFlow classes, whatever the config says.
_PADDED_BY_ONE = {"camembert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta"}


@dataclass(frozen=True)
class Subject:
    """What a card is about. `document` is the manifest as far as it is known, `results` an evaluation of this model alone."""

    name: str
    reference: str  # what its users load it by
    page: str | None  # the URL of its files, where it has one
    language: str
    base_model: str | None  # a Hub id that the publisher gave
    model_config: Mapping[str, Any]
    document: Manifest
    results: dict[str, Any] | None
    converted_from: str | None  # the dtype it was measured in, if it is published in another one
    onnx: bool


@dataclass(frozen=True)
class Card:
    """A card, and the digests of its generated blocks, by which hand-written ones are told from them later."""

    text: str
    blocks: list[str]
    license_warnings: list[str]


def card(subject: Subject, earlier: Sequence[tuple[str, Sequence[str]]]) -> Card:
    """The card of `subject`, with what a person wrote into the `earlier` ones kept.

    Each comes with the digests of its generated blocks; the first one's front matter comes before the others'.
    """
    from huggingface_hub import ModelCard

    document = subject.document
    made_of = [item for generation in with_ancestors(document) for item in generation.get("contributions", [])]
    warnings = licenses.warnings(str(document.get("license")), _distinct(made_of))
    text = str(
        ModelCard.from_template(
            _front_matter(subject, [text for text, _ in earlier]),
            template_path=str(_TEMPLATE),
            title=markdown(subject.name),
            introduction=_introduction(subject),
            license_warnings=[markdown(words) for words in warnings],
            paper=PAPER,
            history=history(document),
            lineage=mermaid(generations(document)),
            results=_results(subject),
            reference=json.dumps(subject.reference, ensure_ascii=False),
            shell_reference=shlex.quote(subject.reference),
            tensorflow=_tensorflow_class(subject.model_config),
            padding=_unusual_padding(subject.model_config),
            onnx=subject.onnx,
            citation=_citation(subject),
        )
    )
    head, body = _split(text)
    blocks = handwritten.digests(body)
    body = "\n\n".join(handwritten.blocks(body)) + "\n"
    for existing, known in earlier:
        body = handwritten.keep(body, _split(existing)[1], known)
    return Card(f"{head}\n{body}", blocks, warnings)


def _front_matter(subject: Subject, earlier: Sequence[str]) -> Any:
    """The YAML of the card; keys and list entries of earlier cards that we do not write are kept."""
    from huggingface_hub import EvalResult, ModelCardData

    document, results = subject.document, subject.results
    entries = results["results"] if results else []
    sources = _sources(document)
    evaluations = [
        EvalResult(
            task_type="text-classification",
            dataset_type=printable(sources.get(entry["dataset"], entry["dataset"])).partition(":")[0],
            dataset_name=printable(entry["dataset"]),
            dataset_config=printable(sources.get(entry["dataset"], "")).partition(":")[2] or None,
            dataset_split="test",
            metric_type=_METRICS.get(entry["metric"], entry["metric"]),
            metric_value=round(entry["mean"], 2),
            metric_name=f"{entry['metric']} ({entry['protocol']})",
            metric_args=_provenance(entry, results or {}),
            source_name="coldctl evaluate" if subject.page else None,
            source_url=f"{subject.page}/{layout.RESULTS}" if subject.page else None,
        )
        for entry in entries
    ]
    kept: dict[str, Any] = {}
    for text in earlier:
        found = _metadata(text)
        lists = {key: [*_list(kept.get(key)), *_list(found.get(key))] for key in ("tags", "datasets")}
        kept = {**found, **kept, **lists}
    base_model = subject.base_model or _hub_id(_pretrained(document).get("name", ""))
    ours: dict[str, Any] = {
        "language": subject.language,
        "license": printable(document.get("license") or "") or None,
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": list(dict.fromkeys([*_TAGS, *_list(kept.get("tags"))])),
        "base_model": base_model,
        "base_model_relation": ("merge" if fused_generations(document) else "finetune") if base_model else None,
        "datasets": list(dict.fromkeys([*_datasets(document), *_list(kept.get("datasets"))])) or None,
        "metrics": list(dict.fromkeys(_METRICS.get(entry["metric"], entry["metric"]) for entry in entries)) or None,
    }
    more = {key: value for key, value in kept.items() if key not in ours and key not in ("model-index", "model_name")}
    return ModelCardData(
        **ours, **more, model_name=subject.name if evaluations else None, eval_results=evaluations or None
    )


def _metadata(text: str) -> dict[str, Any]:
    """The front matter of a card as it stands; nothing if it is no YAML, by whoever wrote it."""
    from huggingface_hub import ModelCard

    if not text.startswith("---"):
        return {}
    try:
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())  # type: ignore[no-untyped-call]
    except Exception:
        return {}


def _provenance(entry: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """How a number was measured, beside it."""
    return {
        "protocol": entry["protocol"],
        "seeds": [item["seed"] for item in entry["seeds"]],
        "test_examples": entry["num_test"],
        "role": entry["role"],
        "baseline": printable(results["baseline"]["name"]),
        "baseline_value": round(entry["baseline_mean"], 2),
        "gain": round(entry["gain"], 2),
        "gain_interval_95": [round(value, 2) for value in entry["gain_interval"]],
        "verdict": entry["verdict"],
        "body_digest": results["models"][0]["body_digest"],
    }


def _introduction(subject: Subject) -> str:
    document = subject.document
    count = len(fused_generations(document))
    pretrained = subject.base_model or str(_pretrained(document).get("name", ""))
    words = "A text encoder" + (f" that started from {code(pretrained)}" if pretrained else "")
    if count:
        many = f"{count} iterations" if count > 1 else "one iteration"
        words += f" and went through {many} of finetuning and fusing by ColD Fusion ([arXiv 2212.01378]({PAPER}))"
    words += ", made with [coldctl](https://pypi.org/project/coldctl/)."
    words += " Use it as a base model for finetuning, or for its features."
    if not count:
        words += " Nothing was fused into it yet."
    if subject.results:
        words += " " + " ".join(_gains(subject.results, document))
    return words


def _gains(results: Mapping[str, Any], document: Manifest) -> list[str]:
    """One sentence per protocol: how much better than the baseline it is, and how sure that is."""
    sentences = []
    against = "its pretrained model" if _is_pretrained(results, document) else markdown(results["baseline"]["name"])
    for entry in results["averages"]:
        if entry["group"] == "all":
            low, high = entry["gain_interval"]
            count = sum(item["protocol"] == entry["protocol"] for item in results["results"])
            sentences.append(
                f"By {entry['protocol']} on {count} datasets it scores {entry['mean']:.1f} on average, "
                f"{against} {entry['baseline_mean']:.1f}: a gain of {entry['gain']:+.1f} points "
                f"(95 % interval {low:+.1f} … {high:+.1f}; {verdict_in_words(entry['verdict'])})."
            )
    return sentences


def _results(subject: Subject) -> str:
    results = subject.results
    if not results:
        return "This model was published without an evaluation."
    name = results["models"][0]["name"]
    parts = [
        f"![gain per dataset]({layout.GAIN_CHART})",
        f"Scores are percent on test splits, gains are points against {_baseline(subject, results)} with a 95 % "
        "interval (crossed paired bootstrap over seeds and test examples). Datasets marked seen were those of contributors, "
        f"unseen ones were only measured. All measurements with their provenance: [{layout.RESULTS}]({layout.RESULTS}), "
        f"[{layout.REPORT}]({layout.REPORT}).",
    ]
    if name != subject.name:
        parts.append(f"The tables and the picture call this model {markdown(name)}.")
    if subject.converted_from:
        parts.append(f"Measured in {subject.converted_from}, before its weights were rounded for this repository.")
    for protocol in protocols_of(results, name):
        parts += [f"### {protocol.capitalize()}", "\n".join(score_table(results, name, protocol))]
        if protocol == "finetune":
            called = subject.base_model if _is_pretrained(results, subject.document) else None
            parts += published_markdown(results, name, called)
    if results.get("overlaps"):
        parts.append("\n".join(f"- {markdown(sentence)}" for sentence in overlap_sentences(results)))
    return "\n\n".join(parts)


def _baseline(subject: Subject, results: Mapping[str, Any]) -> str:
    """What gains are measured against, by the name that the tables have for it, and what it is."""
    name = markdown(results["baseline"]["name"])
    if not _is_pretrained(results, subject.document):
        return name
    known = (
        f", `{subject.base_model}`" if subject.base_model and subject.base_model != results["baseline"]["name"] else ""
    )
    return f"{name} (its pretrained model{known})"


def _citation(subject: Subject) -> str:
    """BibTeX of the model itself. A name is cut down to what BibTeX takes without a thought."""
    document = subject.document
    key = re.sub(r"[^A-Za-z0-9]+", "-", subject.name).strip("-").lower() or "model"
    title = re.sub(r"[^\w .,:/+-]", "", subject.name)
    year = str(document.get("created") or "")[:4]
    fields = [f'title = "{{{title}}}"', *([f'year = "{year}"'] if year else [])]
    if subject.page:
        fields.append(f'url = "{subject.page.partition("/blob/")[0]}"')
    fields.append(f'note = "Fused with coldctl, body {document["body_digest"]}"')
    inner = "".join(f"    {field},\n" for field in fields)
    return f"```bibtex\n@misc{{{key},\n{inner}}}\n```"


def _distinct(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Contributions of the same name and licence in several iterations, once."""
    return list({(item.get("name"), item.get("license"), item.get("status")): item for item in records}.values())


def _pretrained(document: Manifest) -> Mapping[str, str]:
    """Name and body digest of what it began with; empty where nothing is known."""
    first: Mapping[str, Any] = with_ancestors(document)[0] if document.get("ancestors") else document.get("base", {})
    return {key: str(first[key]) for key in ("name", "body_digest") if first.get(key)}


def _is_pretrained(results: Mapping[str, Any], document: Manifest) -> bool:
    """Whether an evaluation's baseline is the very model that it all began with."""
    return bool(results["baseline"]["body_digest"] == _pretrained(document).get("body_digest"))


def _hub_id(name: str) -> str | None:
    """The Hub's name of a pretrained model; None for a directory's, which would be a dead link."""
    if "/" in name:
        return printable(name)
    return next((f"{owner}/{name}" for owner, names in _OWNERS.items() if name in names), None)


def _datasets(document: Manifest) -> list[str]:
    """The contributions' datasets: by their Hub ids where they came from there, else as they were called."""
    sources = _sources(document)
    names = [printable(sources.get(name, name)).partition(":")[0] for name in _dataset_names(document)]
    return list(dict.fromkeys(names))


def _dataset_names(document: Manifest) -> list[str]:
    records = [item for generation in fused_generations(document) for item in generation["contributions"]]
    return [str(item["dataset"]) for item in records if item.get("status") == "fused" and item.get("dataset")]


def _sources(document: Manifest) -> dict[str, str]:
    """By name, the datasets of contributions that came from the Hub, as `ORG/NAME[:CONFIG]`."""
    records = [item for generation in fused_generations(document) for item in generation["contributions"]]
    return {str(item["dataset"]): str(item["source"]) for item in records if item.get("source") and item.get("dataset")}


def _tensorflow_class(config: Mapping[str, Any]) -> str | None:
    architectures = config.get("architectures") or []
    known = config.get("model_type") in _TENSORFLOW and len(architectures) == 1
    return f"TF{architectures[0]}" if known and str(architectures[0]).isidentifier() else None


def _unusual_padding(config: Mapping[str, Any]) -> int | None:
    """The padding id from which positions are counted, where TensorFlow's class takes another one for granted."""
    padding = config.get("pad_token_id", 1)
    return padding if config.get("model_type") in _PADDED_BY_ONE and isinstance(padding, int) and padding != 1 else None


def _list(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value] if value else []
    return [str(item) for item in items]


def _split(text: str) -> tuple[str, str]:
    """Front matter, with its fences, and the body of a card."""
    match = re.match(r"---\s*\n.*?\n---[ \t]*\n", text.replace("\r\n", "\n"), flags=re.DOTALL)
    clean = text.replace("\r\n", "\n")
    return (clean[: match.end()], clean[match.end() :]) if match else ("", clean)
