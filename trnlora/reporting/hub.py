"""A folder and a repository of the Hugging Face hub: what differs, and the upload."""

import hashlib
import os
from pathlib import Path
from typing import Any

from trnlora.errors import UserError
from trnlora.files import sha256
from trnlora.sources import HUB_TIMEOUT, Source, hub_error_line


def changes_on_hub(folder: Path, repo: str) -> tuple[bool, list[str]]:
    """Whether the repository exists, and a line for each file that an upload of `folder` would add, change or keep.

    Sends nothing. Raises UserError if the hub cannot be reached or refuses HF_TOKEN.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = _api().repo_info(repo, files_metadata=True, timeout=HUB_TIMEOUT)
        there = {file.rfilename: _digest(file) for file in info.siblings or []}
        exists = True
    except RepositoryNotFoundError:
        there, exists = {}, False
    except Exception as error:
        raise _explained(error, repo) from None
    lines = []
    for path in sorted(folder.iterdir()):
        size = f"{path.stat().st_size / 1024:,.0f} KiB"
        if path.name not in there:
            lines.append(f"new      {path.name} ({size})")
        else:
            same = there[path.name] in (sha256(path), git_digest(path))
            lines.append(f"{'same   ' if same else 'changed'}  {path.name} ({size})")
    return exists, lines


def upload(folder: Path, repo: str) -> str:
    """Create the repository if it is not there, add the files of `folder` to it in one commit, and return its URL.

    Raises UserError without HF_TOKEN, and for what the hub refuses; then no file of the repository has changed.
    """
    if not os.environ.get("HF_TOKEN"):
        raise UserError("set HF_TOKEN to a token of the hub that may write, in the environment")
    try:
        api = _api()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Adapter and card").commit_url)
    except Exception as error:
        raise _explained(error, repo) from None


def git_digest(path: Path) -> str:
    """The sha1 by which Git, and so the hub for small files, names a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _digest(file: Any) -> str:
    """What the hub knows a file's content by: sha256 of a large one, Git's name of another."""
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=os.environ.get("HF_TOKEN") or False)


def _explained(error: Exception, repo: str) -> Exception:
    line = hub_error_line(error, Source(f"hf://{repo}@main", "hf", repo, "main"))
    return UserError(line) if line else error
