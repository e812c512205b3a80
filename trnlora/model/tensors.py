"""The one table of a decoder's tensors: HF's names and shapes, NxD's names, and how tensor parallelism cuts each.

Shapes, shards, plans and parameter counts are all derived from it, those of LoRA's tensors included. Pure arithmetic:
no torch, so that a model can be checked before it is downloaded.

NxD's names are those of its Llama (neuronx_distributed 0.18, examples/training/llama/modeling_llama_nxd.py).
"""

import dataclasses
import enum

from trnlora.model.config import ModelConfig

EMBEDDINGS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


class Cut(enum.Enum):
    """Which part of a tensor each tensor-parallel rank holds. Rows are dim 0, columns are dim 1."""

    WHOLE = "all of it"
    ROWS = "an equal block of rows"
    COLUMNS = "an equal block of columns"
    QUERY_ROWS = "the rows of the rank's query heads"
    KV_ROWS = "the rows of the rank's key/value heads, which several ranks may share"
    QUERY_COLUMNS = "the columns of the rank's query heads"

    @property
    def dim(self) -> int | None:
        """The dimension that is cut; None where the tensor is whole on every rank."""
        return {"WHOLE": None, "COLUMNS": 1, "QUERY_COLUMNS": 1}.get(self.name, 0)


@dataclasses.dataclass(frozen=True)
class ModelTensor:
    """One tensor of the HF folder, and the tensor of NxD's shards that holds the rank's part of it.

    Several HF tensors may share an `nxd_key`: their parts are concatenated along dim 0, in the table's order. With tied
    embeddings, one HF tensor has two rows in the table, because NxD's model holds an lm_head of its own.
    """

    hf_key: str
    shape: tuple[int, ...]
    nxd_key: str
    cut: Cut


def model_tensors(config: ModelConfig) -> list[ModelTensor]:
    """The tensors of a model, in the order of both HF's and NxD's modules."""
    hidden, vocab = config.hidden_size, config.vocab_size
    table = [ModelTensor(EMBEDDINGS, (vocab, hidden), EMBEDDINGS, Cut.ROWS)]
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        table += [
            ModelTensor(f"{layer}.{hf}", shape, f"{layer}.{nxd}", cut) for hf, shape, nxd, cut in _layer_tensors(config)
        ]
    table.append(ModelTensor("model.norm.weight", (hidden,), "model.norm.weight", Cut.WHOLE))
    head = EMBEDDINGS if config.tie_word_embeddings else LM_HEAD
    return [*table, ModelTensor(head, (vocab, hidden), LM_HEAD, Cut.ROWS)]


def _layer_tensors(config: ModelConfig) -> list[tuple[str, tuple[int, ...], str, Cut]]:
    """HF's name, shape, NxD's name and cut of each tensor of a decoder layer."""
    hidden, mlp, family = config.hidden_size, config.intermediate_size, config.family
    projections = (
        ("q", config.q_size, Cut.QUERY_ROWS), ("k", config.kv_size, Cut.KV_ROWS), ("v", config.kv_size, Cut.KV_ROWS)
    )  # fmt: skip
    table: list[tuple[str, tuple[int, ...], str, Cut]] = [
        ("input_layernorm.weight", (hidden,), "input_layernorm.weight", Cut.WHOLE)
    ]
    for letter, size, cut in projections:
        hf, nxd = f"self_attn.{letter}_proj", "self_attn.qkv_proj"
        table.append((f"{hf}.weight", (size, hidden), f"{nxd}.weight_{letter}", cut))
        if family.qkv_bias:
            table.append((f"{hf}.bias", (size,), f"{nxd}.bias_{letter}", cut))
    if family.qk_norm:
        for norm in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            table.append((norm, (config.head_dim,), norm, Cut.WHOLE))
    return [
        *table,
        ("self_attn.o_proj.weight", (hidden, config.q_size), "self_attn.o_proj.weight", Cut.QUERY_COLUMNS),
        ("post_attention_layernorm.weight", (hidden,), "post_attention_layernorm.weight", Cut.WHOLE),
        ("mlp.gate_proj.weight", (mlp, hidden), "mlp.gate_up_proj.weight", Cut.ROWS),
        ("mlp.up_proj.weight", (mlp, hidden), "mlp.gate_up_proj.weight", Cut.ROWS),
        ("mlp.down_proj.weight", (hidden, mlp), "mlp.down_proj.weight", Cut.COLUMNS),
    ]


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF folder and its shape, in the order of the model. Tied embeddings have no lm_head."""
    return {tensor.hf_key: tensor.shape for tensor in model_tensors(config)}


def linear_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a decoder layer's linear layers, by HF's names without their path (q_proj, down_proj, …)."""
    prefix = "model.layers.0."
    sizes = {}
    for key, shape in hf_shapes(config).items():
        if key.startswith(prefix) and len(shape) == 2:
            sizes[key.removesuffix(".weight").rpartition(".")[2]] = (shape[1], shape[0])
    return sizes
