"""What is read of each family's config.json, and what is refused: no model has it, or the decoder has not got it."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from trnlora.errors import UserError
from trnlora.model.config import FAMILIES, ModelConfig
from trnlora.weights.fetch import check_transformers_config

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 1_000_000,
}  # fmt: skip


def read(family: str, **changes: Any) -> ModelConfig:
    values = {"model_type": family, "architectures": [FAMILIES[family].architecture], **SIZES, **changes}
    return ModelConfig.from_hf({key: value for key, value in values.items() if value != "absent"})


@pytest.mark.parametrize(
    ("family", "keys", "window"),
    [
        ("mistral", {}, 4096),  # HF's default
        ("mistral", {"sliding_window": 256}, 256),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 256}, None),  # use_sliding_window is false by default
        ("qwen3", {"sliding_window": 256, "use_sliding_window": False}, None),
        ("qwen3", {"sliding_window": 256, "use_sliding_window": True}, 256),
        ("llama", {"sliding_window": 256}, None),  # no key of a Llama
    ],
)
def test_rows_may_not_be_longer_than_the_sliding_window(family: str, keys: dict[str, Any], window: int | None) -> None:
    config = read(family, **keys)
    assert config.sliding_window == window
    config.check_seq_len(window or 1_000_000)
    if window is not None:
        with pytest.raises(UserError, match=rf"data\.seq_len {window + 1} is above .* to at most {window}$"):
            config.check_seq_len(window + 1)


def test_rows_may_not_be_longer_than_the_positions() -> None:
    config = read("llama", max_position_embeddings=512)
    config.check_seq_len(512)
    with pytest.raises(UserError, match=r"data\.seq_len 513 is above the model's max_position_embeddings 512: set"):
        config.check_seq_len(513)
    assert read("llama", max_position_embeddings="absent").max_position_embeddings == 2048  # HF's default


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

# Key, values that are refused, and what the error says of each.
REFUSED: list[tuple[str, list[Any], str]] = [
    ("vocab_size", ["96", 96.0, True, None, [96], {}], "vocab_size: Input should be a valid integer"),
    ("hidden_size", [0, -48], "hidden_size: Input should be greater than or equal to 1"),
    ("intermediate_size", [10**9, 10**30], "intermediate_size: Input should be less than or equal to"),
    ("num_hidden_layers", [0, 10**6, "2", "absent"], "num_hidden_layers"),
    ("num_attention_heads", [0, 10**6, 4, 7], "num_attention_heads"),
    ("num_key_value_heads", [0, 4, 12, "3"], "num_key_value_heads"),
    ("head_dim", [0, 15, -16, 10**5, 16.0], "head_dim"),
    ("max_position_embeddings", [0, "2048", 10**12], "max_position_embeddings"),
    ("rms_norm_eps", [0, -1e-6, "1e-6", None, float("nan"), 5.0], "rms_norm_eps"),
    ("rope_theta", [0, -1.0, "10000", float("inf")], "rope_theta"),
    ("rope_scaling", ["linear", 5, []], "rope_scaling: it must hold keys and values"),
    (
        "rope_scaling",
        [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear"}],
        "rope_scaling.*should be 'default' or",
    ),
    (
        "rope_scaling",
        [{"rope_type": "llama3"}],
        "rope_type llama3 needs factor, low_freq_factor, high_freq_factor, orig",
    ),
    ("rope_scaling", [LLAMA3 | {"factor": "8"}, LLAMA3 | {"factor": 0}], "rope_scaling.factor"),
    ("rope_scaling", [LLAMA3 | {"low_freq_factor": 4.0}], "high_freq_factor must be above low_freq_factor 4.0"),
    ("rope_parameters", [LLAMA3 | {"rope_theta": 0}], "rope_parameters.rope_theta"),
    ("rope_parameters", [{"partial_rotary_factor": 0.5}], "partial_rotary_factor"),
    ("partial_rotary_factor", [0.5], "partial_rotary_factor"),
    ("sliding_window", [0, "256"], "sliding_window"),
    ("layer_types", [["sliding_attention"], "full_attention"], "layer_types"),
    ("tie_word_embeddings", ["no", 1, None], "tie_word_embeddings"),
    ("eos_token_id", [96, [1, 96], "1", [1, "x"], 1.0], "eos_token_id"),
    ("bos_token_id", [96, [1]], "bos_token_id"),
    ("pad_token_id", [10**9], "pad_token_id 1000000000 is not below vocab_size 96"),
    ("hidden_act", ["gelu", None], "hidden_act: Input should be 'silu'"),
    ("attention_bias", [True], "attention_bias: True; only False is supported"),
    ("attention_bias", ["no", 0], "attention_bias: Input should be a valid boolean"),
    ("mlp_bias", [True], "mlp_bias: Input should be False"),
    ("quantization_config", [{"quant_method": "gptq"}, 4], "the model is quantized"),
    ("model_type", ["gpt2", "", "absent", 5, ["llama"]], "model_type|the model is Llama"),
    ("architectures", [["LlamaModel"], [], "LlamaForCausalLM", [5]], "the model is|architectures"),
    ("auto_map", [5, "x"], "auto_map: it must hold keys and values"),
    ("text_config", [{}], "text_config"),
    ("torch_dtype", [5], "torch_dtype: Input should be a valid string"),
]


@pytest.mark.parametrize(
    ("key", "value", "message"), [(key, value, message) for key, values, message in REFUSED for value in values]
)
def test_a_value_that_no_model_has_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        read("llama", **{key: value})
    assert str(refusal.value).startswith("config.json")


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("qwen2", {"attention_bias": False}, "attention_bias: False; only True is supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias: True; only False is supported"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types other than full_attention"),
        ("granite", {"mlp_bias": True}, "mlp_bias: Input should be False"),
        ("granite", {"logits_scaling": None}, "logits_scaling: Input should be a valid number"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier: Input should be greater than 0"),
        ("granite", {"embedding_multiplier": "12"}, "embedding_multiplier: Input should be a valid number"),
        ("qwen3", {"head_dim": "absent"}, "lacks head_dim"),
        ("mistral", {"num_key_value_heads": "absent"}, "lacks num_key_value_heads"),
        ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, "the model is Qwen3MoeForCausalLM; supported are Llama"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(family: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(family, **keys)


@pytest.mark.parametrize("values", [[], 5, None, "x", True])
def test_a_config_that_holds_no_keys_is_refused(values: Any) -> None:
    with pytest.raises(UserError, match=r"^org/name/config\.json: it must hold keys and values"):
        ModelConfig.from_hf(values, "org/name/config.json")


# As their authors wrote them: null values, lists of ids, integers where others write floats, ids of -1.
REAL: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "an early Llama": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1,
        "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True,
        "vocab_size": 32000,
    },
    "TinyLlama-1.1B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "head_dim": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Granite-3": {
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12800, "logits_scaling": 16.0,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True,
        "vocab_size": 49159,
    },
    "transformers 5": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": None, "dtype": "float32",
        "eos_token_id": 1, "head_dim": 64, "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
        "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": None, "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 100000, "rope_type": "default"}, "tie_word_embeddings": True,
        "transformers_version": "5.19.0", "use_cache": True, "vocab_size": 49152,
    },
}  # fmt: skip
PROFILES = {path.stem: json.loads(path.read_text("utf-8")) for path in (ROOT / "profiles/configs").glob("*.json")}


@pytest.mark.parametrize("name", [*REAL, *PROFILES])
def test_the_configs_of_real_models_are_read(name: str) -> None:
    """Ours and transformers' checks pass, and both read the same values."""
    from transformers import CONFIG_MAPPING

    values = (REAL | PROFILES)[name]
    config = ModelConfig.from_hf(values)
    check_transformers_config(values, name)
    theirs = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (config.rope_scaling is not None) == (theirs.rope_parameters["rope_type"] == "llama3")
    for key in ("head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        if hasattr(theirs, key):
            assert getattr(config, key) == getattr(theirs, key), key


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_of_the_positions_is_that_of_transformers(family: str) -> None:
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[family]().max_position_embeddings
    assert read(family, max_position_embeddings="absent").max_position_embeddings == default


def test_rope_scaling_has_precedence_as_in_transformers() -> None:
    both = {"rope_scaling": LLAMA3 | {"rope_theta": 9.0}, "rope_parameters": {"rope_theta": 8.0}, "rope_theta": 7.0}
    config = read("llama", **both)
    assert config.rope_theta == 9.0
    assert config.rope_scaling == LLAMA3 | {"rope_theta": 9.0}


def test_a_key_that_only_transformers_reads_is_checked_by_it() -> None:
    values = REAL["Llama-3.2-1B-Instruct"] | {"use_cache": "yes"}
    ModelConfig.from_hf(values)
    with pytest.raises(UserError, match=r"^here/config\.json: transformers refuses it .*use_cache"):
        check_transformers_config(values, "here/config.json")


def test_errors_name_the_file(tmp_path: Path) -> None:
    for content, message in (("{", "is not valid JSON"), ("[]", "keys and values"), ("[" * 9999, "nested too deeply")):
        (tmp_path / "config.json").write_text(content, "utf-8")
        with pytest.raises(UserError, match=message) as refusal:
            ModelConfig.from_folder(tmp_path)
        assert str(refusal.value).startswith(f"{tmp_path}/config.json")
        assert str(refusal.value).endswith("run `dvc repro -f fetch_model`")
