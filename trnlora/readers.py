"""Reading files that may hold anything: JSON, JSON lines and YAML, as checked values or as one clear line.

Every file that the project reads goes through here, its own as well as the user's. YAML is read by the parser that DVC
uses, in YAML 1.2: `010` is ten, `yes` is a string, and a key that is there twice is an error. With another parser, the
params that a stage reads could differ from those that DVC compares.
"""

import functools
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

from trnlora.errors import UserError

RECREATE = ": delete it and run `dvc repro`"

T = TypeVar("T")


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no file can hold
        raise ValueError(f"it is not valid Unicode ({error.reason})") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Line = Annotated[Text, StringConstraints(pattern=r"^[^\x00-\x1f\x7f\x85\u2028\u2029]*$")]  # messages show it


class StrictModel(BaseModel):
    """What a file of this project holds. "3" is not 3, an unknown key is an error, and no number is inf or nan."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def read_text(path: Path, fix: str = RECREATE, where: str = "") -> str:
    """The text of a file. Raises UserError naming it when it is missing, or not UTF-8 (then with `fix`).

    where: what to call the file in errors, if `path` is a copy or a cache that the user does not know.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        missing = ": run the stage that writes it (`dvc repro`)" if fix == RECREATE else fix
        raise UserError(f"{where or path} is missing{missing}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where or path} is not valid UTF-8 ({error}){fix}") from None


def read_json(path: Path, fix: str = RECREATE, where: str = "") -> Any:
    """Read a JSON file. Raises UserError (… `fix`) naming it when it is missing or not JSON. where: see `read_text`."""
    return parse_json(read_text(path, fix, where), where or str(path), fix)


def read_json_as(path: Path, kind: type[T], fix: str = RECREATE, where: str = "") -> T:
    """Read a JSON file that holds a `kind`: a class of pydantic, a TypedDict, or a type such as dict[str, Any].

    where: see `read_text`. Raises UserError (… `fix`) naming the file, the key and what is wrong with its value.
    """
    return checked(read_json(path, fix, where), kind, where or str(path), fix)


def read_jsonl(path: Path, fix: str = RECREATE) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line. Raises UserError (… `fix`) naming the file and line for another."""
    return parse_jsonl(read_text(path, fix), str(path), fix)


def parse_jsonl(text: str, where: str, fix: str = "") -> list[dict[str, Any]]:
    """The objects of a text with one JSON object per line. Raises UserError (`where` … `fix`) naming another line."""
    lines = text.removesuffix("\n").split("\n") if text else []  # splitlines would split at U+2028 within a string
    rows = []
    for number, line in enumerate(lines, 1):
        row = parse_json(line, f"{where} line {number}", fix)
        if not isinstance(row, dict):
            raise UserError(f"{where} line {number} is not a JSON object{fix}")
        rows.append(row)
    return rows


def parse_jsonl_as(text: str, where: str, kind: type[T], fix: str = "") -> list[T]:
    """The same as objects of a `kind`, e.g. a TypedDict. Raises UserError (`where` … `fix`) naming line and key too."""
    rows = []
    for number, row in enumerate(parse_jsonl(text, where, fix), 1):
        check_writable(row, f"{where} line {number}", fix)
        rows.append(checked(row, kind, f"{where} line {number}", fix))
    return rows


def check_writable(value: Any, where: str, fix: str = "") -> None:
    """Raise UserError (`where` … `fix`) for half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} contains half of a surrogate pair, which is not a character{fix}") from None


def parse_json(text: str, where: str, fix: str = "") -> Any:
    """The value of a JSON text.

    Raises UserError (`where` … `fix`) for what is not JSON, what Python cannot hold, and an object with a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text else ""  # a line of a JSONL file has its number in `where`
        reason = f"{error.msg} at {line}column {error.colno}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # what unique_keys says, and int() about a number of 5,000 digits
        reason = str(error)
    raise UserError(f"{where} is not valid JSON ({reason}){fix}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its keys and values. Raises ValueError for a key that is there twice: json keeps one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {json.dumps(twice)[:60]} is there twice")
    return found


def read_yaml(path: Path) -> Any:
    """Read a YAML file as DVC does. Raises UserError when it is missing or not valid."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the project's root") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: it is not UTF-8 ({error})") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str, fix: str = "") -> Any:
    """The value of a YAML text, None for an empty one.

    Raises UserError (`where` … `fix`) for what is not valid, or holds a key twice.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError

    try:
        return YAML(typ="safe").load(text)
    except DuplicateKeyError as error:
        problem = f"{error.problem} in line {error.problem_mark.line + 1}"
    except Exception as error:  # besides YAMLError, ValueError for 2026-13-01, RecursionError, UnicodeDecodeError …
        problem = " ".join(str(error).split())[:300]
    raise UserError(f"{where} is not valid YAML: {problem}{fix}")


def write_yaml(value: Any, target: Path) -> None:
    """Write a YAML file from which `read_yaml` reads `value` again."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    yaml.default_flow_style = False  # {:0: 1}, as it writes the key ":0" in braces, it cannot read
    yaml.allow_unicode = False  # escaped: as they are, U+0085 and U+2028 would be read as line breaks
    with target.open("w", encoding="utf-8") as file:
        yaml.dump(value, file)


def checked(value: Any, kind: type[T], where: str, fix: str = "") -> T:
    """`value` as a `kind`, e.g. a class of pydantic. Raises UserError (`where`: … `fix`) with what is wrong with it."""
    try:
        return _validator(cast(Hashable, kind)).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{where}: {validation_problems(error)}{fix}") from None


@functools.cache
def _validator(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # takes milliseconds


def validation_problems(error: ValidationError) -> str:
    """What pydantic found, in one line: the keys, what is wrong with each and the value that it has."""
    return "; ".join(_explain(detail) for detail in error.errors())


def _explain(detail: Any) -> str:
    key = ".".join(name for part in detail["loc"] if (name := str(part).strip()))
    if detail["type"] == "missing":
        return f"{key} is missing"
    if detail["type"] == "extra_forbidden":
        return f"{key} is not a known key (mistyped?)"
    text = detail["msg"].removeprefix("Value error, ")
    if detail["type"] in ("dict_type", "model_type"):
        text = "it must hold keys and values"
    value = detail["input"]
    if isinstance(value, str) and detail["type"].startswith(("int_", "float_")) and _is_number(value):
        text += "; write it unquoted"
    elif not isinstance(value, dict | list) and not (isinstance(value, int) and value.bit_length() > 64):
        text += f" (it is {value!r})" if len(repr(value)) <= 100 else f" (it is {repr(value)[:100]}…)"
    return f"{key}: {text}" if key else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
