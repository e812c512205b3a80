"""Which slice of which HF tensor each tensor-parallel rank holds, in NxD's layout.

Everything that cuts weights or puts them together again reads the one table that `shard_pieces` returns. It is
pure arithmetic: no torch, so that the rules can be checked before anything is downloaded.

Sources: NxD 2.29, `scripts/checkpoint_converter.py` and `modules/qkv_linear.py`. On trn2 the table is *not* what
NxD's converter writes where kv_size_multiplier > 1: the converter repeats K and V as K0,K1,…,K0,K1,… beside
queries in their original order, so that a rank's queries meet another group's keys. `qkv_linear.py` and NxD's
KV groups on trn2 have each KV head on adjacent ranks (K0,K0,…,K1,K1,…), and so have we.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from trnlora.architecture import LlamaConfig
from trnlora.errors import UserError
from trnlora.params import Convert, Lora


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows (dim 0) or columns (dim 1) [start, stop) of one HF tensor; dim None: the whole tensor."""

    hf_key: str
    dim: int | None = None
    start: int = 0
    stop: int = 0


def check_divisible(config: dict[str, Any] | LlamaConfig, convert: Convert) -> None:
    """Check that the model can be cut as `convert` says.

    Raises UserError naming every rule that does not hold, and the tp_size values that would do.
    """
    model = config if isinstance(config, LlamaConfig) else LlamaConfig.from_hf(config)
    broken = _broken_rules(model, convert.hw_backend, convert.tp_size, convert.kv_size_multiplier)
    if broken:
        fitting = [
            f"{tp} × {multiplier}"
            for tp in range(1, model.num_attention_heads + 1)
            for multiplier in range(1, tp + 1)
            if not _broken_rules(model, convert.hw_backend, tp, multiplier)
        ]
        raise UserError(
            f"convert.tp_size {convert.tp_size} × kv_size_multiplier {convert.kv_size_multiplier} does not fit this "
            f"model: {'; '.join(broken)}. Fitting: {', '.join(fitting)}"
        )


def _broken_rules(model: LlamaConfig, hw_backend: str, tp: int, multiplier: int) -> list[str]:
    rules = [
        ("vocab_size % tp_size == 0", model.vocab_size % tp == 0, model.vocab_size),
        ("intermediate_size % tp_size == 0", model.intermediate_size % tp == 0, model.intermediate_size),
        ("num_attention_heads % tp_size == 0", model.num_attention_heads % tp == 0, model.num_attention_heads),
        ("tp_size % kv_size_multiplier == 0", tp % multiplier == 0, tp),
        (
            "num_key_value_heads × kv_size_multiplier % tp_size == 0",
            model.num_key_value_heads * multiplier % tp == 0,
            model.num_key_value_heads,
        ),
        (  # else a rank has more KV heads than queries
            "num_attention_heads % (num_key_value_heads × kv_size_multiplier) == 0",
            model.num_attention_heads % (model.num_key_value_heads * multiplier) == 0,
            model.num_attention_heads,
        ),
    ]
    if hw_backend == "trn1":
        rules.append(
            (
                "num_key_value_heads × kv_size_multiplier == tp_size on trn1",
                model.num_key_value_heads * multiplier == tp,
                model.num_key_value_heads,
            )
        )
    return [f"{rule} fails ({rule.split()[0]} is {value})" for rule, holds, value in rules if not holds]


@dataclasses.dataclass(frozen=True)
class RankHeads:
    """The attention heads of one rank, as indices into HF's heads, in the order the rank holds them."""

    q: list[int]
    kv: list[int]


def heads_of_rank(model: LlamaConfig, convert: Convert, rank: int) -> RankHeads:
    """Heads of `rank`: each query head stands on the rank that holds its key/value head.

    With repeat = kv_size_multiplier copies of each KV head, in order over the ranks:
    trn2 has a head's copies side by side (K0,K0,…,K1,K1,…) and queries in HF's order;
    trn1 has whole rounds of heads (K0,K1,…,K0,K1,…), and the queries follow them.
    """
    tp, kv_heads, repeat = convert.tp_size, model.num_key_value_heads, convert.kv_size_multiplier
    q_per_rank = model.num_attention_heads // tp
    kv_per_rank = kv_heads * repeat // tp
    if convert.hw_backend == "trn2":
        q_block = rank
        kv = [copy // repeat for copy in range(rank * kv_per_rank, (rank + 1) * kv_per_rank)]
    else:
        # One KV head a rank (check_divisible holds it): rank = round × kv_heads + head.
        round_, head = divmod(rank, kv_heads)
        q_block = head * repeat + round_
        kv = [head]
    return RankHeads(q=list(range(q_block * q_per_rank, (q_block + 1) * q_per_rank)), kv=kv)


def kv_replica_groups(model: LlamaConfig, convert: Convert) -> list[list[int]]:
    """Ranks that hold the same KV heads, as groups that cover all ranks: NxD's KV shared groups.

    Raises UserError where one rank would hold two copies of a head: NxD's groups would then add up the gradients
    of different heads. Such shards compute right logits, so conversion alone accepts them.
    """
    heads = [tuple(heads_of_rank(model, convert, rank).kv) for rank in range(convert.tp_size)]
    if any(len(set(kv)) < len(kv) for kv in heads):
        raise UserError(
            f"convert.kv_size_multiplier {convert.kv_size_multiplier} puts copies of one KV head on one rank, which "
            f"cannot be trained: use {max(1, convert.tp_size // model.num_key_value_heads)}"
        )
    return [[rank for rank, kv in enumerate(heads) if kv == group] for group in dict.fromkeys(heads)]


def head_pieces(hf_key: str, heads: Sequence[int], head_dim: int, dim: int) -> list[Piece]:
    """The slices of a per-head HF tensor that `heads` need, neighbours joined."""
    pieces: list[Piece] = []
    for head in heads:
        if pieces and pieces[-1].stop == head * head_dim:
            pieces[-1] = dataclasses.replace(pieces[-1], stop=(head + 1) * head_dim)
        else:
            pieces.append(Piece(hf_key, dim, head * head_dim, (head + 1) * head_dim))
    return pieces


def shard_pieces(model: LlamaConfig, convert: Convert, rank: int) -> dict[str, list[Piece]]:
    """NxD's tensors of one rank, each as the HF pieces that are concatenated (along their dim) to make it.

    Shapes for tensor parallel tp, hidden size H, vocabulary V, MLP I, head size D, and per rank q query heads and
    k key/value heads: embed_tokens and lm_head (V/tp, H), weight_q (q·D, H), weight_k and weight_v (k·D, H),
    o_proj (H, q·D), gate_up_proj (2·I/tp, H) as gate then up, down_proj (H, I/tp); norms whole. Tied embeddings:
    lm_head is cut from embed_tokens, since NxD's model has both.
    """
    tp, head_dim = convert.tp_size, model.head_dim
    heads = heads_of_rank(model, convert, rank)

    def block(hf_key: str, size: int, dim: int) -> Piece:
        return Piece(hf_key, dim, rank * (size // tp), (rank + 1) * (size // tp))

    embeddings = "model.embed_tokens.weight"
    table = {embeddings: [block(embeddings, model.vocab_size, 0)]}
    for index in range(model.num_hidden_layers):
        layer = f"model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        qkv = {
            "weight_q": head_pieces(f"{attention}.q_proj.weight", heads.q, head_dim, 0),
            "weight_k": head_pieces(f"{attention}.k_proj.weight", heads.kv, head_dim, 0),
            "weight_v": head_pieces(f"{attention}.v_proj.weight", heads.kv, head_dim, 0),
        }
        table[f"{layer}.input_layernorm.weight"] = [Piece(f"{layer}.input_layernorm.weight")]
        table.update({f"{attention}.qkv_proj.{name}": pieces for name, pieces in qkv.items()})
        table[f"{attention}.o_proj.weight"] = head_pieces(f"{attention}.o_proj.weight", heads.q, head_dim, 1)
        table[f"{layer}.post_attention_layernorm.weight"] = [Piece(f"{layer}.post_attention_layernorm.weight")]
        table[f"{mlp}.gate_up_proj.weight"] = [
            block(f"{mlp}.gate_proj.weight", model.intermediate_size, 0),
            block(f"{mlp}.up_proj.weight", model.intermediate_size, 0),
        ]
        table[f"{mlp}.down_proj.weight"] = [block(f"{mlp}.down_proj.weight", model.intermediate_size, 1)]
    table["model.norm.weight"] = [Piece("model.norm.weight")]
    table["lm_head.weight"] = [
        block(embeddings if model.tie_word_embeddings else "lm_head.weight", model.vocab_size, 0)
    ]
    return table


def hf_shapes(model: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF folder and its shape, in the order of the model. Tied embeddings have no lm_head."""
    hidden, mlp = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    for index in range(model.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (q, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, q),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (mlp, hidden),
            f"{layer}.mlp.up_proj.weight": (mlp, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, mlp),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


def trainable_parameters(config: LlamaConfig, kv_size_multiplier: int, tp_size: int, lora: Lora) -> int:
    """Number of trainable values on one rank: A (r, H) and this rank's rows of the three Bs, in every layer."""
    q_rows = config.num_attention_heads * config.head_dim // tp_size
    kv_rows = config.num_key_value_heads * config.head_dim * kv_size_multiplier // tp_size
    return config.num_hidden_layers * lora.r * (config.hidden_size + q_rows + 2 * kv_rows)
