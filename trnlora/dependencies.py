"""What the project's scripts and modules import from the library, read from their source without importing anything.

dvc.yaml's lists of dependencies (`make deps`) and the test of the layers are made from it.
"""

import ast
from pathlib import Path

PACKAGE = "trnlora"
# Modules that cannot change what a stage writes: a change in them reruns nothing. Values of params are dependencies of
# their own (`params:` in dvc.yaml).
PLUMBING = {
    f"{PACKAGE}/{name}.py"
    for name in ("cli", "errors", "metrics", "params", "paths", "profiles", "training/loggers", "training/progress")
}


def imported_modules(source: Path, root: Path) -> set[str]:
    """The library's files that a Python file imports, at any level and in any of its functions, relative to `root`.

    A package's own __init__.py is not among them: it holds a docstring only.
    """
    names = set()
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {f"{name.replace('.', '/')}.py" for name in names if name.split(".")[0] == PACKAGE}
    return {file for file in files if (root / file).is_file()}


def transitive_imports(script: str, root: Path) -> set[str]:
    """A script (a path relative to `root`) and every file of the library that it imports, directly or not."""
    seen: set[str] = set()
    pending = {script}
    while pending:
        seen |= pending
        pending = set().union(*(imported_modules(root / file, root) for file in pending)) - seen
    return seen


def stage_code(stage: str, root: Path) -> list[str]:
    """The code that a stage's outputs depend on: its script and what it imports, without PLUMBING.

    check_params is there for the rules of the params: when they change, it runs again.
    """
    script = f"stages/{stage}.py"
    left_out = PLUMBING - ({f"{PACKAGE}/params.py"} if stage == "check_params" else set())
    return [script, *sorted(transitive_imports(script, root) - left_out - {script})]
