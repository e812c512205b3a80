"""Any content of a model's or an adapter's files gives a value, or an error of one line that names the file.

A few hundred contents per file, thousands in `make test-long`. tests/test_fuzz.py does this for params and rows.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.serving.servable import check_generation_config
from trnlora.weights.peft_folder import PeftConfig, read_peft_config
from trnlora.weights.safetensors_header import read_header, read_index
from trnlora.weights.storage import load_rank, open_rank_file, save_rank

FEW_AND_MANY = pytest.mark.parametrize("examples", [200, pytest.param(5000, marks=pytest.mark.long)])

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
    "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048, "eos_token_id": [1, 2],
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
GENERATION = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [1, 2], "max_new_tokens": 9}
PEFT = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 4},
    "use_rslora": False, "init_lora_weights": True,
}  # fmt: skip
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["F32", "llama", "LORA", "../x", "(", "\n", 0, -1, 2**31, 2**64, 10**400, 1e308])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, values: Any) -> Any:
    """`values` with one value, at any depth, in place of another, or a key more."""
    if not isinstance(values, dict | list) or not values or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    if isinstance(values, list):
        place = draw(st.integers(0, len(values) - 1))
        return [*values[:place], draw(changed(values[place])), *values[place + 1 :]]
    key = draw(st.sampled_from(sorted(values)) | st.text(max_size=4))
    return values | {key: draw(changed(values.get(key)))}


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a part of it replaced by other bytes."""
    begin = draw(st.integers(0, len(content)))
    end = draw(st.integers(begin, min(len(content), begin + 40)))
    return content[:begin] + draw(st.binary(max_size=12)) + content[end:]


def json_of(values: Any) -> st.SearchStrategy[bytes]:
    text = changed(values).map(lambda value: json.dumps(value).encode())
    return text | damaged(json.dumps(values).encode())


def check(examples: int, contents: st.SearchStrategy[bytes], file: Path, read: Callable[[], object]) -> None:
    """Write each of `examples` contents to `file`: `read` must return, or raise a UserError of one line naming it."""
    read_one = 0

    @settings(max_examples=examples, deadline=None, database=None)
    @given(contents)
    def value_or_line(content: bytes) -> None:
        nonlocal read_one
        file.write_bytes(content)
        try:
            read()
            read_one += 1
        except UserError as error:
            (line,) = str(error).splitlines()
            assert str(file) in line

    value_or_line()
    assert read_one, "all were refused: the contents are too far from a valid one"


@FEW_AND_MANY
def test_config(tmp_path: Path, examples: int) -> None:
    def read() -> None:
        config = ModelConfig.from_folder(tmp_path)
        assert 0 < config.num_hidden_layers <= 2048
        assert config.num_attention_heads % config.num_key_value_heads == 0

    check(examples, json_of(CONFIG), tmp_path / "config.json", read)


@FEW_AND_MANY
def test_generation_config(tmp_path: Path, examples: int) -> None:
    file = tmp_path / "generation_config.json"
    check(examples, json_of(GENERATION), file, lambda: check_generation_config(tmp_path, 96, str(file), ""))


@FEW_AND_MANY
def test_adapter_config(tmp_path: Path, examples: int) -> None:
    def read() -> None:
        config = read_peft_config(tmp_path)
        assert isinstance(config, PeftConfig)
        config.is_target("model.layers.0.self_attn.q_proj")
        config.special(["use_dora", "alpha_pattern"])

    check(examples, json_of(PEFT), tmp_path / "adapter_config.json", read)


@FEW_AND_MANY
def test_index(tmp_path: Path, examples: int) -> None:
    file = tmp_path / "model.safetensors.index.json"

    def read() -> None:
        names = read_index(file, str(file), "").values()
        assert all((tmp_path / name).parent == tmp_path for name in names)

    check(examples, json_of(INDEX), file, read)


@FEW_AND_MANY
def test_header(tmp_path: Path, examples: int) -> None:
    file = tmp_path / "model.safetensors"

    def with_length(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + bytes(24)

    def read() -> None:
        for tensor in read_header(file, str(file), "").values():
            assert 0 <= tensor.offset <= file.stat().st_size

    check(examples, json_of(HEADER).map(with_length) | damaged(with_length(json.dumps(HEADER).encode())), file, read)


@FEW_AND_MANY
@pytest.mark.parametrize("mapped", [True, False])
def test_rank_file(tmp_path: Path, examples: int, mapped: bool) -> None:
    import torch

    file, whole = tmp_path / "rank.pt", tmp_path / "whole.pt"
    save_rank(whole, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)})

    def read() -> None:
        if mapped:
            assert all(isinstance(tensor, torch.Tensor) for tensor in load_rank(file).values())
            return
        with open_rank_file(file) as stored:
            assert all(tensor.rows >= 0 for tensor in stored.values() if tensor.shape)

    check(examples, damaged(whole.read_bytes()), file, read)
    shutil.copy(whole, file)
    assert load_rank(file)["a"][1, 2] == 5
