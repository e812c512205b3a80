"""What this project requires: pyproject.toml's dependency groups and the pins of requirements.lock.

Both files are read from the working directory, which is the project's. Names are normalized (PEP 503).
"""

import re
import tomllib
from pathlib import Path
from typing import Any


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


def left_out() -> list[str]:
    """Packages that the overrides keep from being installed."""
    return [_split(override)[0] for override in _pyproject()["tool"]["uv"]["override-dependencies"]]


def locked() -> dict[str, str]:
    """Name → version of all that `make setup` installs: requirements.lock, and torch, which is installed on its own."""
    pins = re.findall(r"^([\w.-]+)==(\S+)", Path("requirements.lock").read_text("utf-8"), re.MULTILINE)
    return {normalized(name): version for name, version in pins} | {"torch": group("pipeline")["torch"].lstrip("=")}
