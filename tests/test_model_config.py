"""What is read of each family's config.json, and the variants that are refused because the decoder has not got them."""

from typing import Any

import pytest

from trnlora.errors import UserError
from trnlora.model.config import FAMILIES, ModelConfig

SIZES = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16,
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


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("qwen2", {"attention_bias": False}, "attention_bias: False; only True is supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias: True; only False is supported"),
        ("granite", {"mlp_bias": True}, "mlp_bias: True; only False is supported"),
        ("granite", {"logits_scaling": None}, "has no number as logits_scaling"),
        ("qwen3", {"head_dim": "absent"}, "lacks head_dim"),
        ("mistral", {"num_key_value_heads": "absent"}, "lacks num_key_value_heads"),
        ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, "the model is Qwen3MoeForCausalLM; supported are Llama"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(family: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(family, **keys)
