"""Write `results.schema.json`, the JSON schema of `coldctl evaluate`'s results, from the types that the code uses.

Run `python scripts/results_schema.py` after a change of `coldctl/evaluation/results.py`.
"""

import json
from pathlib import Path

import msgspec

from coldctl.evaluation import results

PATH = Path(results.__file__).with_name("results.schema.json")


def schema_text() -> str:
    """Return the schema as the file holds it."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "results.json of coldctl evaluate, schema 1",
        **msgspec.json.schema(results.Results),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(schema_text(), encoding="utf-8")
