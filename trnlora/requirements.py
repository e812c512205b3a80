"""What this project requires: pyproject.toml's dependency groups and the pins of requirements.lock.

Both files are read from the working directory, which is the project's. Names are normalized (PEP 503).
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


def normalized(name: str) -> str:
    """A distribution's name as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _pyproject() -> dict[str, Any]:
    return tomllib.loads(Path("pyproject.toml").read_text("utf-8"))


def _split(requirement: str) -> tuple[str, str]:
    """Name and version specifier of a requirement, without extras and marker."""
    found = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*)", requirement)
    assert found is not None, requirement
    return normalized(found[1]), found[2].strip()


def group(name: str) -> dict[str, str]:
    """A dependency group with the groups that it includes (PEP 735): name → version specifier, which may be empty."""
    groups = _pyproject()["dependency-groups"]
    required: dict[str, str] = {}
    for entry in groups[name]:
        required |= group(entry["include-group"]) if isinstance(entry, dict) else dict([_split(entry)])
    return required


def pythons() -> SpecifierSet:
    """The versions of Python that requirements.lock is for."""
    return SpecifierSet(_pyproject()["project"]["requires-python"])


def left_out() -> list[str]:
    """Packages that the overrides keep from being installed."""
    return [_split(override)[0] for override in _pyproject()["tool"]["uv"]["override-dependencies"]]


def locked(python: str | None = None, machine: str | None = None) -> dict[str, str]:
    """Name → version of all that `make setup` installs: requirements.lock, and torch, which is installed on its own.

    python is the version that is meant, as in 3.12, and machine the processor, as in aarch64; None is this one.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0"} if python else {}
    if machine:
        environment["platform_machine"] = machine
    pins = {"torch": group("pipeline")["torch"].lstrip("=")}
    for line in re.findall(r"^\w[^\\\n]*", Path("requirements.lock").read_text("utf-8"), re.MULTILINE):
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            pins[normalized(pin.name)] = str(pin.specifier).lstrip("=")
    return pins
