"""The configuration of a decoder: what layouts, the model and the plan need of an HF config.json.

FAMILIES is the one table of the supported model families. docs/adding_a_model_family.md says how to add one.
"""

import dataclasses
from pathlib import Path
from typing import Any

from trnlora.errors import UserError
from trnlora.readers import read_json

# Rows of logits that exist at once on the torch backend: 256 × 49,152 in float32 are 48 MiB. Here because the preflight
# plan needs it without importing torch.
LOSS_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model family adds to the Llama that all of them are. Source: transformers, models/<model_type>."""

    architecture: str  # HF's class, in config.json's `architectures`
    qkv_bias: bool = False  # q_proj, k_proj and v_proj have a bias
    qk_norm: bool = False  # RMSNorm over each head of q and k before the rotation
    multipliers: bool = False  # Granite's four factors
    # Whether attention is limited to the last `sliding_window` tokens if config.json has no use_sliding_window; None:
    # never.
    sliding_window: bool | None = None
    served_by_nxdi: bool = True  # NxDI 4bcdc54, utils/constants.py, MODEL_TYPES
    required: tuple[str, ...] = ()  # keys of config.json for which HF has a default that is a number of its own


# By HF's model_type.
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", sliding_window=True, required=("num_key_value_heads",)),
    "qwen2": Family(  # Qwen2.5 too
        "Qwen2ForCausalLM", qkv_bias=True, sliding_window=False, required=("num_key_value_heads",)
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", qk_norm=True, sliding_window=False, required=("num_key_value_heads", "head_dim")
    ),
    "granite": Family("GraniteForCausalLM", multipliers=True, served_by_nxdi=False),  # Granite 3
}
# Granite's factors: the names in HF's config and their neutral values. attention_multiplier replaces head_dim ** -0.5.
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SLIDING_WINDOW = 4096  # HF's default where the key is missing
# Keys of config.json that must have this value, if they are there.
_ONLY: dict[str, Any] = {
    "attention_out_bias": False, "mlp_bias": False, "hidden_act": "silu", "partial_rotary_factor": 1.0
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Names and meanings as in HF's LlamaConfig; sizes are of the whole model, not of a rank."""

    model_type: str  # a key of FAMILIES
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
    sliding_window: int | None  # tokens that a token attends to, itself included; None: all before it
    embedding_multiplier: float  # of the embedding's vectors
    attention_multiplier: float  # of the scores, before the softmax
    residual_multiplier: float  # of what attention and MLP add to the residual stream
    logits_scaling: float  # logits are divided by it

    @property
    def family(self) -> Family:
        """What the model's family adds."""
        return FAMILIES[self.model_type]

    @property
    def q_size(self) -> int:
        """Outputs of q_proj: all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Outputs of k_proj, and of v_proj: all key/value heads, each once."""
        return self.num_key_value_heads * self.head_dim

    def check_seq_len(self, seq_len: int) -> None:
        """Raise UserError where a row of `seq_len` tokens would not fit the sliding window: training has none."""
        if self.sliding_window is not None and seq_len > self.sliding_window:
            raise UserError(
                f"data.seq_len {seq_len} is above the model's sliding_window {self.sliding_window}, which training "
                f"does not apply: set data.seq_len to at most {self.sliding_window}"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read a parsed config.json, as written by transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

        Raises UserError for a model that `trnlora.model.decoder` does not compute exactly as HF does.
        """
        family = FAMILIES.get(config.get("model_type", ""))
        if family is None or config.get("architectures") not in (None, [family.architecture]):
            found = " ".join(config.get("architectures") or [str(config.get("model_type"))])
            known = ", ".join(each.architecture for each in FAMILIES.values())
            raise UserError(f"the model is {found}; supported are {known}: choose another model.source")
        for key, only in (_ONLY | {"attention_bias": family.qkv_bias}).items():
            if config.get(key) not in (None, only):
                raise UserError(f"the model's config has {key}: {config[key]}; only {only} is supported")
        if config.get("quantization_config"):
            raise UserError("the model is quantized: choose its dense (bf16 or fp32) version in model.source")
        missing = [key for key in (*_REQUIRED, *family.required) if not isinstance(config.get(key), int)]
        if missing:
            raise UserError(f"the model's config.json lacks {', '.join(missing)}: fetch the complete HF folder")
        rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {})}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise UserError(f"the model's rope_type is {rope_type}; only default and llama3 are supported")
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        factors = dict.fromkeys(_MULTIPLIERS, 1.0) | {"attention_multiplier": head_dim**-0.5}
        if family.multipliers:
            factors = {name: config.get(name, 1.0) for name in _MULTIPLIERS}  # 1: HF's defaults
            if wrong := [name for name, factor in factors.items() if not isinstance(factor, int | float)]:
                raise UserError(f"the model's config.json has no number as {', '.join(wrong)}: fetch it again")
        windowed = family.sliding_window is not None and config.get("use_sliding_window", family.sliding_window)
        return cls(
            model_type=config["model_type"],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
            rope_scaling=rope if rope_type == "llama3" else None,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            sliding_window=config.get("sliding_window", _SLIDING_WINDOW) if windowed else None,
            **factors,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `folder`/config.json."""
        return cls.from_hf(read_json(folder / "config.json"))
