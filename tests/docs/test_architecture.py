"""The map of the code names every module, and fits on one page."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_architecture_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = page.split("├── ")
    source = ROOT / "src" / "coldctl"
    modules = [path for path in source.glob("*/*.py") if path.name != "__init__.py"]
    assert modules
    missing = []
    for path in modules:
        start = next((index for index, row in enumerate(rooms) if row.startswith(f"{path.parent.name}/ ")), None)
        assert start is not None, f"docs/architecture.md has no room {path.parent.name}/"
        end = next((i for i in range(start + 1, len(rooms)) if rooms[i].split(" ")[0].endswith("/")), len(rooms))
        if not any(path.name in row.split() for row in rooms[start + 1 : end]):
            missing.append(str(path.relative_to(source)))
    assert not missing, "add them to docs/architecture.md"


def test_architecture_names_no_module_that_is_gone() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page.split("```")[1]
    named = {word for line in tree.splitlines() for word in line.split() if word.endswith(".py")}
    assert named <= {path.name for path in (ROOT / "src" / "coldctl").rglob("*.py")}


def test_architecture_fits_on_one_page() -> None:
    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) <= 150
