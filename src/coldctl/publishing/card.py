"""Model card: fill the template from manifest and evaluation.

`card.md.jinja` is its text. A generated block stands between the lines `<!-- coldctl:begin NAME -->` and
`<!-- coldctl:end NAME -->`. Everything outside these blocks was written by people, and is kept.
"""

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldctl.artifacts import layout
from coldctl.artifacts.lineage import generations, mermaid
from coldctl.artifacts.manifest import Manifest
from coldctl.common.errors import OutputError
from coldctl.common.text import code, markdown, printable
from coldctl.evaluation.markdown import (
    overlap_sentences,
    protocols_of,
    published_markdown,
    score_table,
    verdict_in_words,
)
from coldctl.publishing import licenses, privacy
from coldctl.publishing.history import fused_generations, history, with_ancestors

PAPER = "https://arxiv.org/abs/2212.01378"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_MARKER = re.compile(r"^[ \t]*<!--[ \t]*coldctl:(begin|end)[ \t]+([\w-]+)[ \t]*-->[ \t]*$", re.MULTILINE)
_TOP = ""  # the name of the place above the first block
_TAGS = ("cold-fusion", "model-recycling", "coldctl", "sentence-transformers")
# The Hub's names of our metrics, and the owners of encoders that are older than owners' names.
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
# Those that count positions from the padding id on: their TensorFlow classes take 1 for it, whatever the config says.
_PADDED_BY_ONE = {"camembert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta"}


@dataclass(frozen=True)
class CardContext:
    """A card's inputs. `document` is the manifest without file digests, `results` an evaluation of this model alone."""

    name: str
    reference: str  # what its users load it by
    page: str | None  # the URL of its files, if it has one
    language: str
    base_model: str | None  # Hub id that the publisher gave
    model_config: Mapping[str, Any]
    document: Manifest
    results: dict[str, Any] | None
    converted_from: str | None  # dtype it was measured in, if it is published in another one
    onnx: bool


@dataclass(frozen=True)
class Card:
    """A model card, the text in it that people wrote, and the sentences about licences that do not fit."""

    text: str
    by_people: str
    license_warnings: list[str]


@dataclass(frozen=True)
class EarlierCard:
    """The text that people wrote into an earlier card: entries of its front matter, and words between the blocks."""

    metadata: Mapping[str, Any]
    words: Mapping[str, str]
    has_markers: bool


def earlier_card(text: str, label: str) -> EarlierCard:
    """Read a card that was published before. Raises OutputError, naming it by `label`, if its markers are not in pairs."""
    blocks, words = _parse_blocks(_split_front_matter(text)[1], label)
    return EarlierCard(_metadata(text), words, bool(blocks))


def card(context: CardContext, earlier: Sequence[EarlierCard]) -> Card:
    """Write the card of `context`, keeping what people wrote into the `earlier` ones; the first one's metadata go first."""
    from huggingface_hub import ModelCard

    document = context.document
    records = [record for generation in fused_generations(document) for record in generation["contributions"]]
    warnings = licenses.warnings(str(document.get("license")), records)
    kept: dict[str, Any] = {}
    for before in earlier:
        lists = {key: [*_list(kept.get(key)), *_list(before.metadata.get(key))] for key in ("tags", "datasets")}
        kept = {**before.metadata, **kept, **lists}
    metadata, added = _front_matter(context, kept)
    text = str(
        ModelCard.from_template(
            metadata,
            template_path=str(_TEMPLATE),
            title=markdown(context.name),
            introduction=_introduction(context),
            license_warnings=[markdown(words) for words in warnings],
            paper=PAPER,
            history=history(document),
            lineage=mermaid(generations(document)),
            results=_results(context),
            reference=json.dumps(context.reference, ensure_ascii=False),
            shell_reference=shlex.quote(context.reference),
            tensorflow=_tensorflow_class(context.model_config),
            padding=_unusual_padding(context.model_config),
            onnx=context.onnx,
            citation=_citation(context),
        )
    )
    head, body = _split_front_matter(text)
    body, words = _keep_words(_tidy(body), [before.words for before in earlier])
    return Card(f"{head}\n{body}", "\n".join([*added, words]), warnings)


def _tidy(text: str) -> str:
    """Return Markdown with one blank line where the template left several, and none above an end marker."""
    outside_code = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    outside_code[::2] = [re.sub(r"\n{3,}", "\n\n", words) for words in outside_code[::2]]
    return re.sub(r"\n+(?=<!-- coldctl:end )", "\n", "".join(outside_code))


def _front_matter(context: CardContext, kept: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Return the YAML of the card, and of it the texts that people added: `kept` keys and list entries of earlier cards."""
    from huggingface_hub import EvalResult, ModelCardData

    document, results = context.document, context.results
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
            source_name="coldctl evaluate" if context.page else None,
            source_url=f"{context.page}/{layout.RESULTS}" if context.page else None,
        )
        for entry in entries
    ]
    base_model = context.base_model or _hub_id(_pretrained(document).get("name", ""))
    ours: dict[str, Any] = {
        "language": context.language,
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
    added = [
        entry
        for key in ("tags", "datasets")
        for entry in _list(kept.get(key))
        if entry not in (*_TAGS, *_datasets(document))
    ]
    data = ModelCardData(
        **ours, **more, model_name=context.name if evaluations else None, eval_results=evaluations or None
    )
    return data, [*added, *privacy.texts(more)]


def _metadata(text: str) -> dict[str, Any]:
    """Return the front matter of a card; empty if it is not valid YAML."""
    from huggingface_hub import ModelCard

    if not text.startswith("---"):
        return {}
    try:
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())  # type: ignore[no-untyped-call]
    except Exception:
        return {}


def _provenance(entry: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a score was measured, for the entry beside it."""
    return {
        "protocol": entry["protocol"],
        "seeds": [run["seed"] for run in entry["seeds"]],
        "test_examples": entry["num_test"],
        "role": entry["role"],
        "baseline": printable(results["baseline"]["name"]),
        "baseline_value": round(entry["baseline_mean"], 2),
        "gain": round(entry["gain"], 2),
        "gain_interval_95": [round(value, 2) for value in entry["gain_interval"]],
        "verdict": entry["verdict"],
        "body_digest": results["models"][0]["body_digest"],
    }


def _introduction(context: CardContext) -> str:
    document = context.document
    count = len(fused_generations(document))
    pretrained = context.base_model or str(_pretrained(document).get("name", ""))
    words = "A text encoder" + (f" that started from {code(pretrained)}" if pretrained else "")
    if count:
        many = f"{count} iterations" if count > 1 else "one iteration"
        words += f" and went through {many} of finetuning and fusing by ColD Fusion ([arXiv 2212.01378]({PAPER}))"
    words += ", made with [coldctl](https://pypi.org/project/coldctl/)."
    words += " Use it as a base model for finetuning, or for its features."
    if not count:
        words += " Nothing was fused into it yet."
    if context.results:
        words += " " + " ".join(_gains(context.results, document))
    return words


def _gains(results: Mapping[str, Any], document: Manifest) -> list[str]:
    """Return one sentence per protocol: the gain over the baseline and its interval."""
    sentences = []
    against = "its pretrained model" if _is_pretrained(results, document) else markdown(results["baseline"]["name"])
    for entry in results["averages"]:
        if entry["group"] == "all":
            low, high = entry["gain_interval"]
            count = sum(result["protocol"] == entry["protocol"] for result in results["results"])
            sentences.append(
                f"By {entry['protocol']} on {count} datasets it scores {entry['mean']:.1f} on average, "
                f"{against} {entry['baseline_mean']:.1f}: a gain of {entry['gain']:+.1f} points "
                f"(95 % interval {low:+.1f} … {high:+.1f}; {verdict_in_words(entry['verdict'])})."
            )
    return sentences


def _results(context: CardContext) -> str:
    results = context.results
    if not results:
        return "This model was published without an evaluation."
    name = results["models"][0]["name"]
    sections = [
        f"![gain per dataset]({layout.GAIN_CHART})",
        f"Scores are percent on test splits, gains are points against {_baseline(context, results)} with a 95 % "
        "interval (crossed paired bootstrap over seeds and test examples). Datasets marked seen were those of contributors, "
        f"unseen ones were only measured. All measurements with their provenance: [{layout.RESULTS}]({layout.RESULTS}), "
        f"[{layout.REPORT}]({layout.REPORT}).",
    ]
    if name != context.name:
        sections.append(f"The tables and the picture call this model {markdown(name)}.")
    if context.converted_from:
        sections.append(f"Measured in {context.converted_from}, before its weights were rounded for this repository.")
    for protocol in protocols_of(results, name):
        sections += [f"### {protocol.capitalize()}", "\n".join(score_table(results, name, protocol))]
        if protocol == "finetune":
            called = context.base_model if _is_pretrained(results, context.document) else None
            sections += published_markdown(results, name, called)
    if results.get("overlaps"):
        sections.append("\n".join(f"- {markdown(sentence)}" for sentence in overlap_sentences(results["overlaps"])))
    return "\n\n".join(sections)


def _baseline(context: CardContext, results: Mapping[str, Any]) -> str:
    """Return the baseline's name as the tables have it, and whether it is the pretrained model."""
    name = markdown(results["baseline"]["name"])
    if not _is_pretrained(results, context.document):
        return name
    hub_name = (
        f", `{context.base_model}`" if context.base_model and context.base_model != results["baseline"]["name"] else ""
    )
    return f"{name} (its pretrained model{hub_name})"


def _citation(context: CardContext) -> str:
    """Return BibTeX of the model itself, with a name that needs no escaping."""
    document = context.document
    key = re.sub(r"[^A-Za-z0-9]+", "-", context.name).strip("-").lower() or "model"
    title = re.sub(r"[^\w .,:/+-]", "", context.name)
    year = str(document.get("created") or "")[:4]
    fields = [f'title = "{{{title}}}"', *([f'year = "{year}"'] if year else [])]
    if context.page:
        fields.append(f'url = "{context.page.partition("/blob/")[0]}"')
    fields.append(f'note = "Fused with coldctl, body {document["body_digest"]}"')
    inner = "".join(f"    {field},\n" for field in fields)
    return f"```bibtex\n@misc{{{key},\n{inner}}}\n```"


def _pretrained(document: Manifest) -> Mapping[str, str]:
    """Return name and body digest of the pretrained model; empty if the manifest states none."""
    first: Mapping[str, Any] = with_ancestors(document)[0] if document.get("ancestors") else document.get("base", {})
    return {key: str(first[key]) for key in ("name", "body_digest") if first.get(key)}


def _is_pretrained(results: Mapping[str, Any], document: Manifest) -> bool:
    """Return True if the evaluation's baseline is the pretrained model."""
    return bool(results["baseline"]["body_digest"] == _pretrained(document).get("body_digest"))


def _hub_id(name: str) -> str | None:
    """Return the pretrained model's id on the Hub; None for a directory, which would be a dead link."""
    if "/" in name:
        return printable(name)
    return next((f"{owner}/{name}" for owner, names in _OWNERS.items() if name in names), None)


def _datasets(document: Manifest) -> list[str]:
    """Return the contributions' datasets: their Hub ids, else their names."""
    sources = _sources(document)
    records = [record for generation in fused_generations(document) for record in generation["contributions"]]
    names = [str(record["dataset"]) for record in records if record["status"] == "fused" and record.get("dataset")]
    return list(dict.fromkeys(printable(sources.get(name, name)).partition(":")[0] for name in names))


def _sources(document: Manifest) -> dict[str, str]:
    """Return the datasets that came from the Hub, as `ORG/NAME[:CONFIG]` by name."""
    records = [record for generation in fused_generations(document) for record in generation["contributions"]]
    stated = (record for record in records if record.get("source") and record.get("dataset"))
    return {str(record["dataset"]): str(record["source"]) for record in stated}


def _tensorflow_class(config: Mapping[str, Any]) -> str | None:
    architectures = config.get("architectures") or []
    has_class = config.get("model_type") in _TENSORFLOW and len(architectures) == 1
    return f"TF{architectures[0]}" if has_class and str(architectures[0]).isidentifier() else None


def _unusual_padding(config: Mapping[str, Any]) -> int | None:
    """Return the padding id from which positions count, if TensorFlow's class assumes another one."""
    padding = config.get("pad_token_id", 1)
    return padding if config.get("model_type") in _PADDED_BY_ONE and isinstance(padding, int) and padding != 1 else None


def _list(value: Any) -> list[str]:
    return [str(entry) for entry in (value if isinstance(value, list) else [value] if value else [])]


def _split_front_matter(text: str) -> tuple[str, str]:
    """Return the front matter of a card, with its fences, and its body."""
    text = text.replace("\r\n", "\n")
    match = re.match(r"---\s*\n.*?\n---[ \t]*\n", text, flags=re.DOTALL)
    return (text[: match.end()], text[match.end() :]) if match else ("", text)


def _parse_blocks(text: str, label: str) -> tuple[dict[str, str], dict[str, str]]:
    r"""Return a document's generated blocks by name, and people's words by the block that they follow.

    Raises OutputError, naming the document by `label`, if a marker has no partner or a block occurs twice.

    >>> _parse_blocks("Mine.\n<!-- coldctl:begin a -->\n# A\n<!-- coldctl:end a -->\n\nMine, too.\n", "README.md")[1]
    {'': 'Mine.', 'a': 'Mine, too.'}
    """
    blocks: dict[str, str] = {}
    words: dict[str, str] = {}
    opened, last, at = None, _TOP, 0
    for marker in _MARKER.finditer(text):
        kind, name = marker.groups()
        if kind == "begin" and opened is None and name not in blocks:
            words[last] = text[at : marker.start()].strip("\n")
            opened, at = name, marker.start()
        elif kind == "end" and name == opened:
            blocks[name] = text[at : marker.end()]
            opened, last, at = None, name, marker.end()
        else:
            raise _unbalanced(label, f"{kind} {name}")
    if opened is not None:
        raise _unbalanced(label, f"begin {opened}")
    words[last] = text[at:].strip("\n")
    return blocks, words


def _keep_words(generated: str, earlier: Iterable[Mapping[str, str]]) -> tuple[str, str]:
    """Put people's words of `earlier` documents, as `_parse_blocks` returns them, into a `generated` one.

    Words stay behind the block that they followed. A document without markers is kept whole below the last block, because
    nothing tells which of it a person wrote. Returns the document and the words alone.
    """
    blocks, kept = _parse_blocks(generated, "the generated document")
    for words in earlier:
        last = _TOP if words.keys() - {_TOP} else list(blocks)[-1]
        for name, text in words.items():
            last = name if name in blocks else last
            kept[last] = _union(kept[last], text)
    texts = [kept[_TOP], *(text for name, block in blocks.items() for text in (block, kept[name]))]
    return "\n\n".join(filter(None, texts)) + "\n", "\n\n".join(filter(None, kept.values()))


def _union(ours: str, theirs: str) -> str:
    """Return the lines of both texts, with shared lines once."""
    if not ours or not theirs or ours == theirs:
        return ours or theirs
    one, other = ours.split("\n"), theirs.split("\n")
    lines: list[str] = []
    for kind, start, end, other_start, other_end in difflib.SequenceMatcher(None, one, other, False).get_opcodes():
        lines += one[start:end]
        if kind in ("insert", "replace"):
            lines += other[other_start:other_end]
    return "\n".join(lines)


def _unbalanced(label: str, marker: str) -> OutputError:
    return OutputError(
        f"{label}: the marker <!-- coldctl:{marker} --> has no partner or occurs twice. Leave one begin line and one end "
        "line of each block, or delete all of them to keep the whole text."
    )
