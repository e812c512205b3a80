"""Reads the text of an HLO module: https://openxla.org/xla/operation_semantics."""

import ast
import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

BYTES = {"pred": 1, "u8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([^\]]*)\]")
_LINE = re.compile(r"^\s*(?:ROOT )?%(\S+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([a-z][a-z0-9-]*)\((.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result or operands."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * BYTES[self.dtype]


@dataclass(frozen=True)
class Instruction:
    """One line of a module. groups: of a collective, its replica groups. source: file and line, where known."""

    name: str
    op: str
    results: list[Array]
    operands: list[Array]
    groups: list[list[int]] | None
    source: tuple[str, int] | None


def arrays(text: str) -> list[Array]:
    found = _ARRAY.findall(text)
    return [Array(dtype, tuple(int(size) for size in shape.split(",") if size)) for dtype, shape in found]


def read_hlo(path: Path) -> list[Instruction]:
    """The instructions of a module, in order."""
    instructions = []
    for name, result, op, rest in _LINE.findall(path.read_text("utf-8")):
        operands = rest.partition("), ")[0]
        groups = re.search(r"replica_groups=(\{\{.*?\}\}|\{\})", rest)
        source = re.search(r'source_file="([^"]+)" source_line=(\d+)', rest)
        instructions.append(
            Instruction(
                name,
                op,
                arrays(result),
                arrays(operands),
                json.loads(groups[1].replace("{", "[").replace("}", "]")) if groups else None,
                (source[1], int(source[2])) if source else None,
            )
        )
    return instructions


def executed_graphs(path: Path) -> list[tuple[str, int]]:
    """Hash and number of matrix products of each graph that torch_xla has executed, in order.

    path: what it writes with XLA_SAVE_TENSORS_FILE and XLA_SAVE_TENSORS_FMT=hlo.
    """
    graphs = path.read_text("utf-8").split("[ScheduleSyncTensorsGraph]\n")[1:]
    return [(str(re.findall(r"Graph Hash: (\S+)", graph)[0]), len(re.findall(r" dot\(", graph))) for graph in graphs]


@functools.cache
def function_at(file: str, line: int) -> str:
    """The function that holds a line of a Python file: `file.py:Class.method`."""
    names: list[str] = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.lineno <= line <= (child.end_lineno or 0):
                names.append(child.name)
            visit(child)

    visit(ast.parse(Path(file).read_text("utf-8")))
    return f"{Path(file).name}:{'.'.join(names)}"
