"""The small files of a model folder, which tokenizers, transformers and vLLM read: refused before weights are fetched.

Errors name the source, here org/name, and not the folder that it was copied to.
"""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from trnlora.data.tokenizer import check_tokenizer
from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import MAX_LORA_RANKS, Params
from trnlora.preflight.known_models import known_config
from trnlora.profiles import load_profile, profile_names, profile_values
from trnlora.serving.servable import CPU_HEAD_SIZES, check_generation_config, check_servable
from trnlora.serving.vllm_args import max_lora_rank
from trnlora.weights.fetch import copy_small_files

VOCABULARY = 1536


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    copy_small_files(tiny_llama, tmp_path)
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text("utf-8")) if file.exists() else {}
    file.write_text(json.dumps(values | changes), "utf-8")


def check_files(folder: Path) -> None:
    check_generation_config(folder, VOCABULARY, "org/name/generation_config.json", ": fix it")
    check_tokenizer(folder, VOCABULARY, "org/name", ": fix it")


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as refusal:
        check_files(folder)
    assert str(refusal.value).startswith("org/name")
    assert str(folder) not in str(refusal.value)
    return str(refusal.value)


FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CONTENTS = {
    "empty": b"",
    "cut": b'{"a"',
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 9999,
    "binary": b"\xff\xfe\0",
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_that_holds_no_json_object_is_named(folder: Path, file: str, content: str) -> None:
    (folder / file).write_bytes(CONTENTS[content])
    assert refused(folder).startswith(f"org/name/{file}")


GENERATION: list[tuple[str, list[Any]]] = [
    ("temperature", ["hot", -1, 2.5, True, [0.7], float("nan")]),
    ("top_p", [0, 1.1, "0.9"]),
    ("top_k", [-2, 1.5, "50"]),
    ("min_p", [-0.1, 2]),
    ("repetition_penalty", [0, -1, "1.1", float("inf")]),
    ("presence_penalty", [3]),
    ("frequency_penalty", ["x"]),
    ("max_new_tokens", [0, -4, "100", 1.5]),
    ("eos_token_id", [VOCABULARY, -2, "2", [1, VOCABULARY], [1, "2"], 1.0]),
    ("cache_implementation", ["no such"]),  # this and the next are checked by transformers
    ("suppress_tokens", [5]),
]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in GENERATION for value in values])
def test_generation_defaults_that_vllm_or_transformers_refuses(folder: Path, key: str, value: Any) -> None:
    edit(folder / "generation_config.json", **{key: value})
    line = refused(folder)
    assert line.startswith("org/name/generation_config.json")
    assert key in line or "transformers refuses it" in line


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 1], "bos_token_id": 0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "pad_token_id": 1},
        {"_from_model_config": True, "eos_token_id": 1, "temperature": None, "max_length": 4096},
    ],
    ids=["Llama 3", "Qwen", "from the model's config"],
)
def test_generation_defaults_of_real_models_are_accepted(folder: Path, values: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values), "utf-8")
    check_generation_config(folder, VOCABULARY, "here", "")
    (folder / "generation_config.json").unlink()
    check_generation_config(folder, VOCABULARY, "here", "")  # it need not be there


TOKENIZER: dict[str, tuple[dict[str, Any], str]] = {
    "no EOS": ({"eos_token": None}, "org/name: the model's tokenizer has no eos_token"),
    "EOS is a number": ({"eos_token": 5}, "org/name: the model's tokenizer cannot be loaded"),
    "a token beyond the embeddings": ({"eos_token": "<|new|>"}, "token '<|new|>' has the id 1536 (1 such tokens)"),
    "a far token": ({"added_tokens_decoder": {"9": 5}}, "cannot be loaded"),
    "model_max_length": ({"model_max_length": "long"}, "tokenizer_config.json: model_max_length 'long' is not a"),
    "negative model_max_length": ({"model_max_length": -5}, "model_max_length -5 is not a positive number"),
    "class is a number": ({"tokenizer_class": 5}, "org/name: the model's tokenizer cannot be loaded"),
    "padding side": ({"padding_side": "up"}, "org/name: the model's tokenizer cannot be loaded"),
    "template is a number": ({"chat_template": 5}, "org/name/tokenizer_config.json: the chat template is not text"),
    "template is open": ({"chat_template": "{% if x %}"}, "tokenizer_config.json: the chat template cannot be parsed"),
    "one of several": ({"chat_template": [{"name": "default", "template": "{{ ("}]}, "cannot be parsed"),
    # transformers asks on the terminal whether to run such code, unless it is told not to.
    "code": ({"tokenizer_class": "Other", "auto_map": {"AutoTokenizer": ["a--b.C", None]}}, "cannot be loaded"),
}


@pytest.mark.parametrize("case", TOKENIZER)
def test_a_tokenizer_that_cannot_be_used_is_refused(folder: Path, case: str) -> None:
    changes, message = TOKENIZER[case]
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", **changes)
    assert message in refused(folder)


def test_ids_beyond_the_embeddings_are_refused(folder: Path) -> None:
    """Not only more tokens: fewer tokens with a larger id."""
    values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = values["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = 99_999
    (folder / "tokenizer.json").write_text(json.dumps(values), "utf-8")
    assert "has the id 99999 (1 such tokens), and the model's embeddings have 1536 rows" in refused(folder)


def test_a_template_file_that_cannot_be_parsed_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}", "utf-8")
    assert refused(folder).startswith("org/name/chat_template.jinja: the chat template cannot be parsed (Expected")


def test_a_model_without_a_chat_template_is_accepted(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    check_tokenizer(folder, VOCABULARY, "org/name", "")


# What vLLM serves


def params(**sections: Any) -> Params:
    """The default profile; a section's values override its own."""
    values = profile_values("smollm2-135m-cpu")
    for name, value in sections.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    return Params.model_validate(values)


def config(head_dim: int = 64, **changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 1}
    return ModelConfig.from_hf(
        {"model_type": "llama", **sizes, "num_attention_heads": 2, "head_dim": head_dim, **changes}
    )


def test_lengths_beyond_the_models_positions_are_refused() -> None:
    check_servable(config(max_position_embeddings=1024), params())
    with pytest.raises(UserError, match=r"serve\.max_model_len 1024 is above .* max_position_embeddings 1023"):
        check_servable(config(max_position_embeddings=1023), params())


def test_head_sizes_that_vllm_has_not_got_on_a_cpu_are_refused() -> None:
    check_servable(config(head_dim=48), params())
    with pytest.raises(UserError, match=r"head size \(head_dim\) is 72; vLLM on a CPU serves 32, 48, 64"):
        check_servable(config(head_dim=72), params())
    check_servable(config(head_dim=72), params(backend="cuda"))


@pytest.mark.parametrize("name", profile_names())
def test_the_models_of_the_profiles_can_be_served(name: str) -> None:
    profile = load_profile(name)
    if model := known_config(profile):
        check_servable(model, profile)


@pytest.mark.slow
def test_the_head_sizes_and_ranks_are_those_of_vllm() -> None:
    import torch
    from vllm.config.lora import MaxLoRARanks
    from vllm.platforms import current_platform

    assert get_args(MaxLoRARanks) == MAX_LORA_RANKS
    current_platform.import_kernels()
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    def has(size: int, dtype: torch.dtype) -> bool:
        rows, cache = torch.zeros(4, 1, size, dtype=dtype), torch.zeros(2, 1, 32, size, dtype=dtype)
        isa = _get_attn_isa(dtype, 32, size)
        try:
            ops.cpu_attn_reshape_and_cache(rows, rows, cache, cache.clone(), torch.arange(4), isa)
        except RuntimeError:
            return False
        return True

    for dtype in (torch.float32, torch.bfloat16):
        assert tuple(size for size in range(8, 600, 8) if has(size, dtype)) == CPU_HEAD_SIZES


def test_ranks_that_vllm_does_not_serve_are_refused() -> None:
    assert [max_lora_rank(r) for r in (1, 2, 24, 257, 512)] == [1, 8, 32, 320, 512]
    with pytest.raises(ValueError, match="less than or equal to 512"):
        params(lora={"r": 513})
