"""Which slice of which HF tensor each tensor-parallel rank holds, in NxD's layout.

`shard_slices` cuts the table of `trnlora.model.tensors`; everything that cuts weights or puts them together again reads
it. Pure arithmetic: no torch, so that the rules can be checked before anything is downloaded.

Sources: NxD 2.29, `scripts/checkpoint_converter.py` and `modules/qkv_linear.py`. On trn2 the table is *not* what
NxD's converter writes where kv_size_multiplier > 1: the converter repeats K and V as K0,K1,…,K0,K1,… beside
queries in their original order, so that a rank's queries meet another group's keys. `qkv_linear.py` and NxD's
KV groups on trn2 have each KV head on adjacent ranks (K0,K0,…,K1,K1,…), and so does this table.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.tensors import Cut, hf_shapes, model_tensors
from trnlora.params import Convert


@dataclasses.dataclass(frozen=True)
class Slice:
    """Rows (dim 0) or columns (dim 1) [start, stop) of one HF tensor; dim None: the whole tensor."""

    hf_key: str
    dim: int | None = None
    start: int = 0
    stop: int = 0


def check_divisible(config: dict[str, Any] | ModelConfig, convert: Convert) -> None:
    """Check that the model can be cut as `convert` says.

    Raises UserError naming every rule that does not hold, and the tp_size values that would do.
    """
    model = config if isinstance(config, ModelConfig) else ModelConfig.from_hf(config)
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


def _broken_rules(model: ModelConfig, hw_backend: str, tp: int, multiplier: int) -> list[str]:
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


def heads_of_rank(model: ModelConfig, convert: Convert, rank: int) -> RankHeads:
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
        # One KV head per rank (`check_divisible` requires it): rank = round × kv_heads + head.
        round_, head = divmod(rank, kv_heads)
        q_block = head * repeat + round_
        kv = [head]
    return RankHeads(q=list(range(q_block * q_per_rank, (q_block + 1) * q_per_rank)), kv=kv)


def kv_replica_groups(model: ModelConfig, convert: Convert) -> list[list[int]]:
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


def head_blocks(heads: Sequence[int], head_dim: int) -> list[tuple[int, int]]:
    """[start, stop) of the rows (or columns) that these heads take up, adjacent heads joined."""
    blocks: list[tuple[int, int]] = []
    for head in heads:
        start, stop = head * head_dim, (head + 1) * head_dim
        if blocks and blocks[-1][1] == start:
            blocks[-1] = (blocks[-1][0], stop)
        else:
            blocks.append((start, stop))
    return blocks


def rank_blocks(cut: Cut, size: int, config: ModelConfig, convert: Convert, rank: int) -> list[tuple[int, int]]:
    """[start, stop) along the cut dimension, of `size`, that `rank` holds, in the order in which it holds them."""
    if cut is Cut.WHOLE:
        return [(0, size)]
    if cut in (Cut.ROWS, Cut.COLUMNS):
        part = size // convert.tp_size
        return [(rank * part, (rank + 1) * part)]
    heads = heads_of_rank(config, convert, rank)
    return head_blocks(heads.kv if cut is Cut.KV_ROWS else heads.q, config.head_dim)


def shard_slices(config: ModelConfig, convert: Convert, rank: int) -> dict[str, list[Slice]]:
    """NxD's tensors of one rank, each as the slices of HF tensors that are concatenated (along their dim) to make it.

    Shapes for tensor parallel tp, hidden size H, vocabulary V, MLP I, head size D, and per rank q query heads and
    k key/value heads: embed_tokens and lm_head (V/tp, H), weight_q (q·D, H), weight_k and weight_v (k·D, H),
    o_proj (H, q·D), gate_up_proj (2·I/tp, H) as gate then up, down_proj (H, I/tp); norms whole.
    """
    table: dict[str, list[Slice]] = {}
    for tensor in model_tensors(config):
        slices = table.setdefault(tensor.nxd_key, [])
        dim = tensor.cut.dim
        if dim is None:
            slices.append(Slice(tensor.hf_key))
        else:
            blocks = rank_blocks(tensor.cut, tensor.shape[dim], config, convert, rank)
            slices += [Slice(tensor.hf_key, dim, start, stop) for start, stop in blocks]
    return table


def shard_shapes(config: ModelConfig, convert: Convert, rank: int) -> dict[str, tuple[int, ...]]:
    """NxD's tensors of one rank and their shapes."""
    whole = hf_shapes(config)
    shapes = {}
    for name, slices in shard_slices(config, convert, rank).items():
        shape = list(whole[slices[0].hf_key])
        if slices[0].dim is not None:
            shape[slices[0].dim] = sum(part.stop - part.start for part in slices)
        shapes[name] = tuple(shape)
    return shapes
