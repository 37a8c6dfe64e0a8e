"""The model card of a published model: what it is, how it was made, what it gains, how to use it."""

from collections.abc import Sequence
from typing import Any

from coldctl.core.manifest import ContributionRecord, Manifest
from coldctl.core.report import escaped, score_table

PAPER = "https://arxiv.org/abs/2212.01378"

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A text encoder made by [coldctl](https://pypi.org/project/coldctl/) with ColD Fusion ([arXiv 2212.01378]({{ paper }})):
a base model for finetuning, and a source of features for linear probing. {{ origin }}

## How it works

In each iteration contributors take the current base model, finetune it on a dataset that stays with them, and give
back the finetuned body; the heads are dropped. The bodies are averaged, weight by weight, and the average is the base
model of the next iteration. No data is shared, and each iteration moves one body down and one body up per contributor.

## How it was made
{{ history }}
## Results
{{ results }}
## How to use

Finetune it on your own data (`train`, `validation`, `test` files with columns `text` and `label`):

```sh
coldctl finetune MY_DATA --base {{ reference }} --output my-model
```

Features in PyTorch:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{{ reference }}")
model = AutoModel.from_pretrained("{{ reference }}")
inputs = tokenizer(["A text to encode."], return_tensors="pt")
with torch.no_grad():
    features = model(**inputs).last_hidden_state
```

## Citation

```bibtex
@inproceedings{don-yehiya-etal-2023-cold,
    title = "{C}ol{D} Fusion: Collaborative Descent for Distributed Multitask Finetuning",
    author = "Don-Yehiya, Shachar and Venezian, Elad and Raffel, Colin and Slonim, Noam and Katz, Yoav and Choshen, Leshem",
    booktitle = "Proceedings of the 61st Annual Meeting of the Association for Computational Linguistics",
    year = "2023",
    url = "{{ paper }}",
}
```
"""


def card(
    name: str, reference: str, license_: str, language: str, document: Manifest, results: dict[str, Any] | None
) -> str:
    """The card's Markdown with its YAML front matter. `results` is the content of a `results.json`, if there is one."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    pretrained = _pretrained(document)
    evaluations = [
        EvalResult(
            task_type="text-classification",
            dataset_type=entry["dataset"],
            dataset_name=entry["dataset"],
            metric_type=entry["metric"],
            metric_value=round(entry["mean"], 2),
            metric_name=f"{entry['metric']} ({entry['protocol']})",
        )
        for entry in (results or {}).get("results", [])
    ]
    data = ModelCardData(
        language=language,
        license=license_,
        tags=["cold-fusion", "model-recycling", "coldctl", "feature-extraction"],
        base_model=pretrained if "/" in pretrained else None,  # a Hub id; a local directory's name would be a dead link
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
        pipeline_tag="feature-extraction",
    )
    text = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=escaped(name),
        reference=reference,
        paper=PAPER,
        origin=_origin(document, pretrained),
        history=_history(document),
        results=_results(results),
    )
    return str(text)


def _origin(document: Manifest, pretrained: str) -> str:
    """One sentence on how far the model has come."""
    count = sum(bool(item.get("contributions")) for item in (*document.get("ancestors", []), document))
    if not count:
        return "Nothing was fused into it yet."
    many = f"{count} iterations" if count > 1 else "one iteration"
    return f"It started from `{pretrained.replace('`', '')}` and went through {many} of finetuning and fusing."


def _pretrained(document: Manifest) -> str:
    ancestors = document.get("ancestors") or [{"name": document.get("base", {}).get("name", "an encoder")}]
    return str(ancestors[0].get("name", "an encoder"))


def _history(document: Manifest) -> str:
    lines = []
    generations: Sequence[dict[str, Any]] = [*document.get("ancestors", []), dict(document)]
    for generation in generations:
        contributions: list[ContributionRecord] = generation.get("contributions", [])
        if not contributions:
            continue
        lines += ["", f"Iteration {generation.get('iteration', '?')}:", ""]
        lines += ["| contribution | dataset | examples | licence | weight | |", "|---|---|--:|---|--:|---|"]
        for item in contributions:
            note = item.get("status", "") + (f": {escaped(item['reason'] or '')}" if item.get("reason") else "")
            lines.append(
                f"| {escaped(item.get('name', ''))} | {escaped(item.get('dataset') or 'not stated')} | "
                f"{item.get('num_train') or 'not stated'} | {escaped(item.get('license') or 'not stated')} | "
                f"{item.get('weight', 0.0):.3f} | {note} |"
            )
    return "\n".join([*lines, ""])


def _results(results: dict[str, Any] | None) -> str:
    if not results:
        return "\nThis model was published without an evaluation.\n"
    name = results["models"][-1]["name"]
    lines = [
        "",
        "![gain per dataset](gain.png)",
        "",
        f"Scores in percent, gains in points against {escaped(results['baseline']['name'])}.",
    ]
    for protocol in dict.fromkeys(entry["protocol"] for entry in results["results"]):
        lines += ["", f"{protocol}:", "", *score_table(results, name, protocol)]
    return "\n".join([*lines, ""])
