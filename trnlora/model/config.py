"""The configuration of a decoder: what layouts, the model and the plan need of an HF config.json."""

import dataclasses
from pathlib import Path
from typing import Any

from trnlora.errors import UserError
from trnlora.files import read_json

# Rows of logits that exist at once on the torch backend: 256 × 49,152 in float32 are 48 MiB. Here because the preflight
# plan needs it without importing torch.
LOSS_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Names and meanings as in HF's LlamaConfig; sizes are of the whole model, not of a rank."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # None, or the keys of HF's "llama3" type
    tie_word_embeddings: bool

    @property
    def q_size(self) -> int:
        """Outputs of q_proj: all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Outputs of k_proj, and of v_proj: all key/value heads, each once."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read a parsed config.json, as written by transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

        Raises UserError for anything but a dense Llama that `trnlora.model.decoder` computes exactly as HF does.
        """
        if config.get("model_type") != "llama" or config.get("architectures", ["LlamaForCausalLM"]) != [
            "LlamaForCausalLM"
        ]:
            found = config.get("architectures") or config.get("model_type")
            raise UserError(f"the model is {found}, not a LlamaForCausalLM: choose a dense Llama in model.source")
        for key, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
            if config.get(key, only) != only:
                raise UserError(f"the model's config has {key}: {config[key]}; only {only} is supported")
        if config.get("quantization_config"):
            raise UserError("the model is quantized: choose its dense (bf16 or fp32) version in model.source")
        missing = [
            key
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            if not isinstance(config.get(key), int)
        ]
        if missing:
            raise UserError(f"the model's config.json lacks {', '.join(missing)}: fetch the complete HF folder")
        rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {})}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise UserError(f"the model's rope_type is {rope_type}; only default and llama3 are supported")
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
            rope_scaling=rope if rope_type == "llama3" else None,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `folder`/config.json."""
        return cls.from_hf(read_json(folder / "config.json"))
