"""Loading and checking the model's tokenizer."""

from pathlib import Path
from typing import Any

from trnlora.errors import UserError
from trnlora.files import check_sums
from trnlora.readers import read_json_as


def load_tokenizer(folder: Path, where: str = "") -> Any:
    """The Hugging Face tokenizer of a model folder. where: what errors call the folder, if not by its path.

    Raises UserError if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        # False: transformers would otherwise ask on the terminal whether to run code that tokenizer_config.json names.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        reason = " ".join(str(error).replace(str(folder), where or str(folder)).split())[:200]
        raise UserError(f"{where or folder}: the model's tokenizer cannot be loaded ({reason})") from None


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


def check_tokenizer(folder: Path, vocab_size: int, where: str, fix: str) -> None:
    """Check the tokenizer of a model folder. where: what errors call the folder; fix: how they end.

    Raises UserError unless its files hold JSON objects and it loads, with an EOS token, no id beyond the model's
    embeddings, and no chat template that cannot be parsed.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_json_as(folder / name, dict[str, Any], fix, f"{where}/{name}")
    tokenizer = load_tokenizer(folder, where)
    ids = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    if ids:
        token = min(ids, key=lambda token: ids[token])
        raise UserError(
            f"{where}: the tokenizer's token {token!r} has the id {ids[token]} ({len(ids)} such tokens), and the "
            f"model's embeddings have {vocab_size} rows: tokenizer and weights do not match"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{where}: the model's tokenizer has no eos_token, so an answer could not end: set it in "
            "tokenizer_config.json"
        )
    limit = tokenizer.model_max_length  # compared with the length of every text
    if not isinstance(limit, int | float) or limit <= 0:
        raise UserError(f"{where}/tokenizer_config.json: model_max_length {limit!r} is not a positive number{fix}")
    file = "chat_template.jinja" if (folder / "chat_template.jinja").is_file() else "tokenizer_config.json"
    _check_chat_template(tokenizer.chat_template, f"{where}/{file}", fix)


def _check_chat_template(template: Any, where: str, fix: str) -> None:
    """A tokenizer has one template, several by name, or none."""
    from transformers.utils.chat_template_utils import _compile_jinja_template  # what apply_chat_template renders with

    templates = list(template.values()) if isinstance(template, dict) else [template]
    for text in templates:
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"{where}: the chat template is not text{fix}")
        try:
            _compile_jinja_template(text)
        except Exception as error:  # jinja2's, or RecursionError
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{where}: the chat template cannot be parsed ({reason}){fix}") from None
