"""Say how much of `src/` the tests reached; end with 1 below 95 % of lines or of branches.

python -m pytest --cov --cov-report json:.coverage.json && python scripts/covered.py .coverage.json
"""

import json
import sys
from pathlib import Path

LEAST = 95.0  # percent


def main() -> int:
    """Print both shares of a report of coverage.py's. Returns the exit code."""
    totals = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["totals"]
    shares = {
        "lines": 100 * totals["covered_lines"] / totals["num_statements"],
        "branches": 100 * totals["covered_branches"] / totals["num_branches"],
    }
    print("reached:", ", ".join(f"{share:.1f} % of {kind}" for kind, share in shares.items()))
    if missed := [kind for kind, share in shares.items() if share < LEAST]:
        print(f"less than {LEAST:.0f} % of {' and '.join(missed)}: test what is listed as missing", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
