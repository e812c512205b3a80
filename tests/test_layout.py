"""Layouts: golden digests of correct NxD shards, the rules, and the assignment of heads to ranks."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.sharded import assemble, conversion

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.weights.nxd_layout import check_divisible, heads_of_rank, kv_replica_groups, shard_slices

GOLDEN = json.loads((Path(__file__).parent / "golden" / "nxd_layout.json").read_text())
# Without layouts that hold q, k and v in one tensor: NxD's LoRA cannot train them, and the library never writes them.
CASES = [case for case in GOLDEN["cases"] if not case["fuse_qkv"]]


def llama(**sizes: int) -> ModelConfig:
    return ModelConfig.from_hf({"model_type": "llama", **sizes})


LLAMA3_8B = llama(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip


def golden_weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    """The golden file's input: arange over all elements, keys in sorted order."""
    hidden, mlp, vocabulary = model.hidden_size, model.intermediate_size, model.vocab_size
    q, kv = model.q_size, model.kv_size
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for index in range(model.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (q, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, q),
            f"{layer}.mlp.gate_proj.weight": (mlp, hidden),
            f"{layer}.mlp.up_proj.weight": (mlp, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, mlp),
        }
    weights, offset = {}, 0
    for key in sorted(shapes):
        size = math.prod(shapes[key])
        weights[key] = (torch.arange(size, dtype=torch.float32) + offset).view(shapes[key])
        offset += size
    return weights


def case_name(case: dict) -> str:
    return f"{case['config']}-{case['hw_backend']}-tp{case['tp']}x{case['kv_size_multiplier']}"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_golden_digests(case: dict) -> None:
    model = llama(**GOLDEN["configs"][case["config"]])
    convert = conversion(case["tp"], case["kv_size_multiplier"], case["hw_backend"])
    check_divisible(model, convert)
    weights = golden_weights(model)
    for rank, expected in enumerate(case["ranks"]):
        table = shard_slices(model, convert, rank)
        assert table.keys() == expected["tensors"].keys()
        for name, slices in table.items():
            tensor = assemble(weights, slices)
            assert list(tensor.shape) == expected["tensors"][name]["shape"], name
            assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == expected["tensors"][name]["sha256"], name


def test_llama3_8b_on_trn2_has_each_kv_head_on_four_consecutive_ranks() -> None:
    convert = conversion(32, 4)
    for rank in range(32):
        heads = heads_of_rank(LLAMA3_8B, convert, rank)
        assert heads.q == [rank]
        assert heads.kv == [rank // 4]
    assert kv_replica_groups(LLAMA3_8B, convert)[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_llama3_8b_on_trn1_repeats_rounds_of_kv_heads() -> None:
    convert = conversion(32, 4, "trn1")
    heads = [heads_of_rank(LLAMA3_8B, convert, rank) for rank in range(32)]
    assert [h.q[0] for h in heads[:10]] == [0, 4, 8, 12, 16, 20, 24, 28, 1, 5]
    assert [h.kv[0] for h in heads] == list(range(8)) * 4
    assert kv_replica_groups(LLAMA3_8B, convert)[0] == [0, 8, 16, 24]


@given(
    hw_backend=st.sampled_from(["trn1", "trn2"]),
    kv_heads=st.integers(1, 12),
    queries_per_kv=st.integers(1, 12),
    tp=st.integers(1, 48),
    multiplier=st.integers(1, 12),
)
def test_every_query_head_meets_its_own_kv_head(
    hw_backend: str, kv_heads: int, queries_per_kv: int, tp: int, multiplier: int
) -> None:
    heads = kv_heads * queries_per_kv
    model = llama(
        vocab_size=tp, intermediate_size=tp, hidden_size=heads * 2, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )  # fmt: skip
    if tp % multiplier:
        return
    convert = conversion(tp, multiplier, hw_backend)
    try:
        check_divisible(model, convert)
    except UserError:
        return
    ranks = [heads_of_rank(model, convert, rank) for rank in range(tp)]
    assert sorted(head for rank in ranks for head in rank.q) == list(range(heads))
    assert sorted(head for rank in ranks for head in rank.kv) == sorted(list(range(kv_heads)) * multiplier)
    for rank in ranks:
        group = len(rank.q) // len(rank.kv)  # attention uses KV head i // group of a rank for its query i
        assert [rank.kv[i // group] for i in range(len(rank.q))] == [head // queries_per_kv for head in rank.q]


@pytest.mark.parametrize(
    ("tp", "multiplier", "hw_backend", "rule"),
    [
        (5, 1, "trn2", "vocab_size % tp_size"),
        (64, 8, "trn2", "num_attention_heads % tp_size"),
        (32, 2, "trn2", "num_key_value_heads × kv_size_multiplier % tp_size"),
        (32, 8, "trn2", "num_attention_heads % (num_key_value_heads × kv_size_multiplier)"),
        (4, 1, "trn1", "num_key_value_heads × kv_size_multiplier == tp_size on trn1"),
        (6, 1, "trn2", "intermediate_size % tp_size"),
    ],
)
def test_a_violated_rule_is_named_with_values_that_fit(tp: int, multiplier: int, hw_backend: str, rule: str) -> None:
    with pytest.raises(UserError) as error:
        check_divisible(LLAMA3_8B, conversion(tp, multiplier, hw_backend))
    assert rule in str(error.value)
    assert "32 × 4" in str(error.value)


def test_copies_of_a_kv_head_on_one_rank_convert_but_do_not_train() -> None:
    model = llama(**GOLDEN["configs"]["A"])  # 2 KV heads
    convert = conversion(2, 2)
    check_divisible(model, convert)
    with pytest.raises(UserError, match="cannot be trained: use 1"):
        kv_replica_groups(model, convert)
