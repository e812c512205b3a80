"""The configuration of a decoder: what layouts, the model and the plan need of an HF config.json.

FAMILIES is the one table of the supported model families. docs/adding_a_model_family.md says how to add one.
"""

import dataclasses
from pathlib import Path
from typing import Any

from trnlora.errors import UserError
from trnlora.model.hf_config import HFConfig, ModelKind
from trnlora.readers import checked, read_json

# What the torch backend keeps in memory. Here because the preflight plan needs it without importing torch.
LOSS_CHUNK = 256  # rows of logits that exist at once: 256 × 49,152 in float32 are 48 MiB
KEPT_TOKENS = 512  # of a batch. With more, norms and SwiGLU are recomputed: their results would take too much memory


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
    positions: int = 32768  # HF's max_position_embeddings where config.json has none
    served_by_nxdi: bool = True  # NxDI 4bcdc54, utils/constants.py, MODEL_TYPES
    required: tuple[str, ...] = ()  # keys of config.json for which HF has a default that is a number of its own


# By HF's model_type.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", positions=2048),
    "mistral": Family("MistralForCausalLM", sliding_window=True, positions=131072, required=("num_key_value_heads",)),
    "qwen2": Family(  # Qwen2.5 too
        "Qwen2ForCausalLM", qkv_bias=True, sliding_window=False, required=("num_key_value_heads",)
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", qk_norm=True, sliding_window=False, required=("num_key_value_heads", "head_dim")
    ),
    "granite": Family("GraniteForCausalLM", multipliers=True, positions=2048, served_by_nxdi=False),  # Granite 3
}
# Granite's factors: the names in HF's config and their neutral values. attention_multiplier replaces head_dim ** -0.5.
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_SLIDING_WINDOW = 4096  # HF's default where the key is missing


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
    max_position_embeddings: int  # tokens; vLLM serves no longer sequences
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
        """Raise UserError where a row of `seq_len` tokens is longer than the model's positions or sliding window.

        Training has no window; vLLM serves nothing beyond the positions.
        """
        if seq_len > self.max_position_embeddings:
            raise UserError(
                f"data.seq_len {seq_len} is above the model's max_position_embeddings {self.max_position_embeddings}: "
                f"set data.seq_len to at most {self.max_position_embeddings}"
            )
        if self.sliding_window is not None and seq_len > self.sliding_window:
            raise UserError(
                f"data.seq_len {seq_len} is above the model's sliding_window {self.sliding_window}, which training "
                f"does not apply: set data.seq_len to at most {self.sliding_window}"
            )

    @classmethod
    def from_hf(cls, values: Any, where: str = "config.json", fix: str = "") -> "ModelConfig":
        """Read a parsed config.json, as written by transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

        where: the file, for errors, which end in `fix`. Raises UserError for values of other types or out of bounds,
        and for a model that `trnlora.model.decoder` does not compute exactly as HF does.
        """
        family, model_type = _family(values, where, fix)
        if missing := [key for key in family.required if values.get(key) is None]:
            raise UserError(f"{where} lacks {', '.join(missing)}{fix or ': fetch the complete HF folder'}")
        config = checked(values, HFConfig, where, fix)
        if config.attention_bias not in (None, family.qkv_bias):
            raise UserError(
                f"{where} has attention_bias: {config.attention_bias}; only {family.qkv_bias} is supported for "
                f"{model_type}"
            )
        use_window = family.sliding_window if config.use_sliding_window is None else config.use_sliding_window
        windowed = family.sliding_window is not None and use_window
        if not windowed and set(config.layer_types or ()) - {"full_attention"}:
            raise UserError(f"{where} has layer_types other than full_attention, which are not supported")
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        factors = dict.fromkeys(_MULTIPLIERS, 1.0) | {"attention_multiplier": head_dim**-0.5}
        if family.multipliers:
            factors = {name: getattr(config, name) for name in _MULTIPLIERS}
        return cls(
            model_type=model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope.rope_theta or config.rope_theta or 10000.0,
            rope_scaling=config.rope.model_dump(exclude_none=True) if config.rope.is_llama3 else None,
            tie_word_embeddings=config.tie_word_embeddings,
            max_position_embeddings=config.max_position_embeddings or family.positions,
            sliding_window=values.get("sliding_window", _SLIDING_WINDOW) if windowed else None,
            **factors,
        )

    @classmethod
    def from_folder(cls, folder: Path, where: str = "", fix: str = ": run `dvc repro -f fetch_model`") -> "ModelConfig":
        """Read `folder`/config.json. where and fix as in `from_hf`; by default those of the folder of fetch_model."""
        file = folder / "config.json"
        return cls.from_hf(read_json(file, fix, where), where or str(file), fix)


def _family(values: Any, where: str, fix: str) -> tuple[Family, str]:
    """The model's family and model_type. Raises UserError for a model of another family, and for a quantized one."""
    kind = checked(values, ModelKind, where, fix)
    family = FAMILIES.get(kind.model_type)
    if family is None or kind.architectures not in (None, [family.architecture]):
        found = " ".join(kind.architectures or [kind.model_type])
        known = ", ".join(each.architecture for each in FAMILIES.values())
        raise UserError(f"{where}: the model is {found}; supported are {known}: choose another model.source")
    if kind.quantization_config:
        raise UserError(f"{where}: the model is quantized: choose its dense (bf16 or fp32) version in model.source")
    return family, kind.model_type
