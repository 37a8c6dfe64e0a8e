"""Break the code on purpose, one place at a time, and count how often a test notices.

    make mutate                        # what docs/mutation.md reports
    python scripts/mutate.py fusing/methods     # one module, to the screen

Comparisons are turned round and moved by one, signs and operators exchanged, numbers raised by one or doubled, truth values
and `and`/`or` flipped. Each mutant is written into a temporary copy of the sources; a fork of this process, which
has imported the slow libraries already, runs the tests of that module on it until the first one fails.
"""

import argparse
import ast
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "mutation.md"
LEAST = 85.0  # percent
SECONDS = 120  # a mutant that takes longer runs in circles: noticed
# Fast ones, without models.
TESTS = {
    "fusing/methods": ("tests/fusing/test_methods.py",),
    "fusing/recipe": ("tests/fusing/test_methods.py",),
    "checkpoints/header": ("tests/checkpoints/test_header.py",),
    "checkpoints/checkpoint": ("tests/checkpoints/test_header.py",),
    "artifacts/manifest": ("tests/artifacts/test_manifest.py",),
}
_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr, ast.MatMult: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes `start:stop` of the source become `text`."""

    line: int
    start: int
    stop: int
    text: str
    before: str

    @property
    def words(self) -> str:
        """The change as a line of the report."""
        return f"- line {self.line}: `{self.before[:90]}` → `{self.text[:90]}`"


def mutants(source: str) -> Iterator[Mutant]:
    """All changes of a module, in its order."""
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in _changeable(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        for changed in _changes(node):
            text = ast.unparse(changed)
            text = text if isinstance(node, ast.AugAssign) else f"({text})"
            yield Mutant(node.lineno, start, stop, text, " ".join(data[start:stop].decode().split()))


def _changeable(tree: ast.AST) -> Iterator[ast.expr | ast.AugAssign]:
    """Nodes that may be changed: no annotations, no texts of messages (their places in the source are not exact)."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.ClassDef) and any(
                isinstance(item, ast.Name) and item.id == "TypedDict" for item in child.bases
            ):
                continue
            if isinstance(child, ast.expr | ast.AugAssign):
                yield child
            yield from _changeable(child)


def _changes(node: ast.expr | ast.AugAssign) -> Iterator[ast.AST]:
    """What one node may become."""
    match node:
        case ast.Compare(left=left, ops=operators, comparators=others):
            for index, operator in enumerate(operators):
                for other in _COMPARISONS[type(operator)]:
                    yield ast.Compare(left, [*operators[:index], other(), *operators[index + 1 :]], others)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            yield ast.BinOp(left, _OPERATORS[type(operator)](), right)
        case ast.AugAssign(target=target, op=operator, value=value) if type(operator) in _OPERATORS:
            yield ast.AugAssign(target, _OPERATORS[type(operator)](), value)
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
            yield operand
        case ast.BoolOp(op=operator, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(value * 2 if value else 1.0)


def survives(copy: Path, module: str, source: str, mutant: Mutant | None) -> bool:
    """Whether all tests of a module pass on the sources in `copy` under one change."""
    target = copy / "coldctl" / f"{module}.py"
    data = source.encode()
    if mutant is not None:
        data = data[: mutant.start] + mutant.text.encode() + data[mutant.stop :]
    target.write_bytes(data)
    if (child := os.fork()) == 0:
        code = 1
        try:
            signal.alarm(SECONDS)
            silence = os.open(os.devnull, os.O_RDWR)
            for descriptor in range(3) if mutant is not None else (0,):
                os.dup2(silence, descriptor)
            sys.path[:0] = [str(copy)]
            import pytest

            code = int(pytest.main(["-x", "-q", "--no-header", "--disable-warnings", *TESTS[module]]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def prepare() -> None:
    """Import what is slow and is not ours."""
    for name in ("hypothesis", "ml_dtypes", "numpy", "pytest", "s3fs", "typer.testing", "upath"):
        importlib.import_module(name)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True  # a stale one would hide a change of the same second


def run(module: str, workers: int) -> tuple[list[Mutant], list[Mutant]]:
    """All mutants of a module, and those that no test noticed."""
    source = (ROOT / "src" / "coldctl" / f"{module}.py").read_text(encoding="utf-8")
    every = list(mutants(source))
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(workers):
            copies.put(Path(shutil.copytree(ROOT / "src", Path(scratch) / str(number))))

        def survived(mutant: Mutant | None) -> bool:
            copy = copies.get()
            try:
                alive = survives(copy, module, source, mutant)
            finally:
                copies.put(copy)
            if alive and mutant is not None:
                print(mutant.words, flush=True)
            return alive

        if not survived(None):
            sys.exit(f"the tests of {module} fail as it is: mend that first")
        with ThreadPoolExecutor(workers) as pool:
            outcomes = list(pool.map(survived, every))
    return every, [mutant for mutant, alive in zip(every, outcomes, strict=True) if alive]


def main() -> None:
    """Run the modules that were asked for; all of them become the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}; none: all, into {REPORT.relative_to(ROOT)}")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(TESTS):
        parser.error(f"no tests are known for {', '.join(sorted(unknown))}")
    prepare()
    rows, sections, worst = [], [], 100.0
    for module in arguments.modules or TESTS:
        started = time.monotonic()
        every, alive = run(module, arguments.workers)
        score = 100 * (1 - len(alive) / len(every))
        worst = min(worst, score)
        seconds = time.monotonic() - started
        rows.append(f"| `{module}.py` | {len(every)} | {len(every) - len(alive)} | {score:.1f} % |")
        print(rows[-1], f"{seconds:.0f} s", flush=True)
        lines = [item.words for item in alive]
        sections.append("\n".join([f"## `{module}.py`", "", *(lines or ["None survive."])]))
    if not arguments.modules:
        head = REPORT.read_text(encoding="utf-8").split("\n| module")[0] if REPORT.exists() else ""
        table = "\n".join(["| module | mutants | noticed | score |", "|---|---|---|---|", *rows])
        REPORT.write_text("\n\n".join([head.rstrip(), table, *sections]) + "\n", encoding="utf-8")
    sys.exit(0 if worst >= LEAST else f"a module has less than {LEAST:.0f} %")


if __name__ == "__main__":
    main()
