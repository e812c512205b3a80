"""A folder and a repository of the Hugging Face hub: what differs, and the upload."""

import os
from pathlib import Path
from typing import Any

from trnlora.errors import UserError
from trnlora.files import sha256
from trnlora.sources import HUB_TIMEOUT, Source, hub_error_line

NEW, CHANGED, SAME = "new", "changed", "same"


def states_on_hub(folder: Path, repo: str) -> dict[str, str] | None:
    """NEW, CHANGED or SAME for each file of `folder`; None if the hub shows HF_TOKEN no such repository.

    Sends nothing. Raises UserError if the hub cannot be reached or refuses HF_TOKEN.
    """
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils.sha import git_hash

    try:
        info = _api().repo_info(repo, files_metadata=True, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError:
        return None
    except Exception as error:
        raise _explained(error, repo) from None
    there = {file.rfilename: _digest(file) for file in info.siblings or []}

    def state(path: Path) -> str:
        if path.name not in there:
            return NEW
        return SAME if there[path.name] in (sha256(path), git_hash(path.read_bytes())) else CHANGED

    return {path.name: state(path) for path in sorted(folder.iterdir())}


def upload(folder: Path, names: list[str], repo: str) -> str:
    """Commit these files of `folder`, and return the commit's URL. Creates a private repository if there is none.

    Raises UserError without HF_TOKEN, and for what the hub refuses; then no file of the repository has changed.
    """
    if not os.environ.get("HF_TOKEN"):
        raise UserError("set HF_TOKEN to a token of the hub that may write, in the environment")
    try:
        api = _api()
        api.create_repo(repo, private=True, exist_ok=True)
        made = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=names, commit_message="Adapter and card"
        )
    except Exception as error:
        raise _explained(error, repo) from None
    return str(made.commit_url)


def _digest(file: Any) -> str:
    """What the hub knows a file's content by: sha256 of a large one, Git's name of another."""
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=os.environ.get("HF_TOKEN") or False)


def _explained(error: Exception, repo: str) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 403:
        return UserError(f"your HF_TOKEN may not write to {repo}: take a token with write access to it")
    if line := hub_error_line(error, Source(f"hf://{repo}@main", "hf", repo, "main")):
        return UserError(line)
    # What hf_xet, which sends large files, raises of Python's own, without a number and over several lines.
    if isinstance(error, OSError | RuntimeError) and not getattr(error, "errno", None):
        return UserError(f"the upload to {repo} failed, and it is unchanged: try again ({error})")
    return error
