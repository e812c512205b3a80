"""The library's layers: imports go in one direction, as read from the source."""

import ast
from pathlib import Path

import pytest

from trnlora.dependencies import imported_modules

ROOT = Path(__file__).parents[1]
# From the lowest to the highest. A module may import from its own layer and from lower ones.
LAYERS = (
    "foundation",  # the modules directly below trnlora/
    "model",
    "weights",
    "backends",
    "data",
    "training",
    "serving",
    "evaluation",
    "preflight",
    "reporting",
)
LIBRARY = sorted(path.relative_to(ROOT) for path in (ROOT / "trnlora").rglob("*.py"))


def layer_of(file: Path) -> int:
    return LAYERS.index(file.parts[1] if len(file.parts) > 2 else "foundation")


def test_every_module_is_in_a_layer() -> None:
    assert {layer_of(file) for file in LIBRARY} == set(range(len(LAYERS)))


@pytest.mark.parametrize("file", LIBRARY, ids=str)
def test_imports_go_down(file: Path) -> None:
    for imported in imported_modules(ROOT / file, ROOT):
        assert layer_of(Path(imported)) <= layer_of(file), f"{file} imports {imported}"


def test_no_module_imports_itself_through_others() -> None:
    """No cycles, imports inside functions included."""
    imports = {str(file): imported_modules(ROOT / file, ROOT) for file in LIBRARY}
    done: set[str] = set()

    def visit(file: str, path: tuple[str, ...]) -> None:
        assert file not in path, " → ".join([*path, file])
        if file not in done:
            for imported in sorted(imports[file]):
                visit(imported, (*path, file))
            done.add(file)

    for file in imports:
        visit(file, ())


@pytest.mark.parametrize("script", sorted((ROOT / "stages").glob("*.py")) + sorted((ROOT / "tools").glob("*.py")))
def test_scripts_import_the_library_and_not_each_other(script: Path) -> None:
    """Not through sys.path or runpy either: code that scripts share belongs in the library."""
    siblings = {path.stem for folder in ("stages", "tools", "bench") for path in (ROOT / folder).glob("*.py")}
    modules = set()
    for node in ast.walk(ast.parse(script.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.split(".")[0])
    assert not modules & (siblings | {"runpy"})
    assert "sys.path" not in script.read_text("utf-8")


@pytest.mark.parametrize("package", sorted((ROOT / "trnlora").rglob("__init__.py")), ids=str)
def test_a_package_init_holds_no_code(package: Path) -> None:
    """dvc.yaml does not list them, so they must not affect results. trnlora/__init__.py also has the version."""
    docstring, *rest = ast.parse(package.read_text("utf-8")).body
    assert isinstance(docstring, ast.Expr)
    assert [ast.unparse(node).partition(" = ")[0] for node in rest] in ([], ["__version__"])


def test_functions_are_short() -> None:
    too_long = []
    for folder in ("trnlora", "stages", "tools", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or 0) - node.lineno + 1
                    if lines > 60:
                        too_long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {lines}")
    assert not too_long
