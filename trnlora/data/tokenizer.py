"""Loading and checking the model's tokenizer."""

from pathlib import Path
from typing import Any

from trnlora.errors import UserError
from trnlora.files import check_sums


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer of a model folder. Raises UserError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise UserError(f"the model's tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}") from None


def load_fetched_tokenizer(folder: Path) -> Any:
    """The tokenizer of the folder that fetch_model wrote, after a check of the files' sha256.

    Raises UserError if there is none, if a file is damaged or if the tokenizer cannot be loaded.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} has no tokenizer: run stages/fetch_model.py first (`dvc repro prepare_data` does)")
    check_sums(folder, "fetch_model", without=(".safetensors",))
    return load_tokenizer(folder)


def padding_token_id(tokenizer: Any) -> int:
    """The token to pad rows with. Padding is neither attended to nor trained on, so EOS will do if there is no other.

    `tokenizer` must have an EOS token, which `templates.end_of_answer` checks.
    """
    token: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return token


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise UserError unless the tokenizer loads, has an EOS token and no id beyond the model's embeddings."""
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embeddings {vocab_size}: they do not match"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the model's tokenizer has no eos_token, so an answer could not end: set it in tokenizer_config.json"
        )
