"""The floors of the house: who may import whom; and the list of what is where.

python tests/test_architecture.py > docs/modules.md     # where a module came, went, or says otherwise what it is
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "adastate_jax"

# From the ground up. What stands in one line may not import each other, but for the modules of one room.
FLOORS = (
    ("errors", "standard_streams"),
    ("interrupts",),
    ("hidden_names", "fields", "checks", "texts", "distributed"),
    ("files", "lockstep"),
    ("diffusion", "sharding", "console", "seals"),
    ("models",),
    ("streaming", "data"),
    ("config", "checkpoint", "media", "weights"),
    ("training",),
    ("generation",),
    ("evaluation", "verification", "benchmarking"),
    ("serving",),
    (
        "train",
        "sample",
        "serve",
        "watch",
        "convert",
        "verify",
        "evaluate",
        "probe",
        "bench",
        "bundle",
        "embed",
        "encode",
    ),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[str]:
    """The rooms of this package that a module imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            found |= {alias.name for alias in node.names if not alias.name.startswith("__")}  # but __version__
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE.name}."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {name[1] for name in names if name[0] == PACKAGE.name and len(name) > 1}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: imports are written out"
    return found


def against_the_order(room: str, imported: set[str]) -> list[str]:
    """The rooms among the imported ones that do not lie below `room`."""
    return sorted(other for other in imported if other != room and FLOOR[other] >= FLOOR[room])


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_the_floors_below_alone(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in FLOOR, f"{room}: give it a floor"
    assert against_the_order(room, imports(path)) == []


def test_an_import_against_the_order_is_found(tmp_path):
    path = tmp_path / "cache.py"
    path.write_text(
        "def f():\n    from adastate_jax.training.dmd import dmd_loss\n    import adastate_jax.models.dit\n"
    )
    assert against_the_order("streaming", imports(path)) == ["training"]


def test_no_module_is_longer_than_a_reader_can_hold():
    long = {str(path.relative_to(PACKAGE)) for path in modules() if len(path.read_text().splitlines()) > 400}
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    assert [name for name in sorted(long) if f"`{name}`" not in page] == []


def page_of_modules() -> str:
    """What docs/modules.md is to be."""
    lines = [
        "# Every module, and what it is",
        "",
        "The first paragraph of each module's docstring. How they hang together: [architecture.md](architecture.md).",
    ]
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        lines += ["", f"## `{folder.relative_to(PACKAGE.parent)}/`", ""]
        for path in sorted(folder.glob("*.py")):
            said = ast.get_docstring(ast.parse(path.read_text()))
            assert said or path.name == "__init__.py", f"{path}: does not say what it is"
            if said:
                lines.append(f"- `{path.name}`: {' '.join(said.partition(chr(10) * 2)[0].split())}")
    return "\n".join(lines)


def test_every_module_is_listed_with_what_it_says_of_itself():
    page = (PACKAGE.parent / "docs" / "modules.md").read_text()
    assert page == page_of_modules() + "\n", "run python tests/test_architecture.py > docs/modules.md"


if __name__ == "__main__":
    print(page_of_modules())
