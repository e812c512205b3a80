"""The keys of an HF config.json that are read here, as one checked model: types, bounds, and rules between keys.

Types are those that transformers 5 accepts (its configs are strict too: null only where a key may be null). The bounds
are far above any model's sizes: without them, a count with three digits too many costs hours, or all memory.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from trnlora.readers import StrictModel

Size = Annotated[int, Field(ge=1, le=2**20)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Positions = Annotated[int, Field(ge=1, le=2**31)]
Factor = Annotated[float, Field(gt=0)]
One = Annotated[float, Field(ge=1, le=1)]
TokenId = Annotated[int, Field(ge=-1)]  # -1: none, in early Llamas
# One id or several.
TokenIds = Annotated[list[TokenId], BeforeValidator(lambda ids: [ids] if isinstance(ids, int) else ids)]


class Section(StrictModel):
    """Keys that are not read here are left to transformers."""

    model_config = ConfigDict(extra="ignore")


class Rope(Section):
    """Rotary embeddings: rope_parameters of transformers 5, or rope_scaling of 4."""

    rope_type: Literal["default", "llama3"] | None = None
    type: Literal["default", "llama3"] | None = None  # rope_type before transformers 4.43
    rope_theta: Annotated[float, Field(ge=1)] | None = None
    partial_rotary_factor: One | None = None
    # Of llama3.
    factor: Annotated[float, Field(ge=1)] | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: Positions | None = None

    @property
    def is_llama3(self) -> bool:
        return (self.rope_type or self.type) == "llama3"

    @model_validator(mode="after")
    def llama3_is_complete(self) -> "Rope":
        if not self.is_llama3:
            return self
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [key for key in keys if getattr(self, key) is None]:
            raise ValueError(f"rope_type llama3 needs {', '.join(missing)}")
        if (self.high_freq_factor or 0) <= (self.low_freq_factor or 0):
            raise ValueError(f"high_freq_factor must be above low_freq_factor {self.low_freq_factor}")
        return self


class ModelKind(Section):
    """What says which model a config.json is of."""

    model_type: str
    architectures: list[str] | None = None
    quantization_config: Any = None


class HFConfig(Section):
    """config.json of a dense decoder. Defaults are those of transformers; None: depends on the family or other keys."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=2048)]
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] | None = None  # the rotation takes pairs
    max_position_embeddings: Positions | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    rope_theta: Annotated[float, Field(ge=1)] | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    tie_word_embeddings: bool = False
    sliding_window: Positions | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenIds | None = None
    pad_token_id: TokenId | None = None
    dtype: str | None = None  # torch_dtype before transformers 5. The one that is used is model.dtype
    torch_dtype: str | None = None
    auto_map: dict[str, Any] | None = None  # code of the repository, which is not run
    # Variants that the decoder does not compute.
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool | None = None
    attention_out_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    text_config: None = None  # of models with images
    partial_rotary_factor: One | None = None
    # Granite's. 1: transformers' defaults.
    embedding_multiplier: Factor = 1.0
    attention_multiplier: Factor = 1.0
    residual_multiplier: Factor = 1.0
    logits_scaling: Factor = 1.0

    @property
    def rope(self) -> Rope:
        """The rotary embeddings that transformers computes: rope_scaling has precedence."""
        return self.rope_scaling or self.rope_parameters or Rope()

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @model_validator(mode="after")
    def heads_add_up(self) -> "HFConfig":
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of num_attention_heads "
                f"{self.num_attention_heads}, or head_dim must be given"
            )
        return self

    @model_validator(mode="after")
    def ids_are_in_the_vocabulary(self) -> "HFConfig":
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, key)
            for token in ids if isinstance(ids, list) else [ids]:
                if token is not None and token >= self.vocab_size:
                    raise ValueError(f"{key} {token} is not below vocab_size {self.vocab_size}")
        return self
