"""The Llama over parallel layers: logits, losses and gradients equal HF's and PEFT's for every sharding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_layout import assemble, conversion
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig as HFLlamaConfig
from transformers import LlamaForCausalLM as HFLlama

from trnlora.backends.torch import TorchBackend, run_as_threads, thread_backends
from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.lora import add_lora
from trnlora.params import Convert, Lora
from trnlora.weights.nxd_layout import check_divisible, heads_of_rank, kv_replica_groups, shard_slices
from trnlora.weights.peft_export import peft_adapter

SHARDINGS = [(1, 1, "trn2"), (3, 1, "trn2"), (6, 2, "trn2"), (3, 1, "trn1"), (6, 2, "trn1")]  # 3 KV heads


def shards_of(folder: Path, config: ModelConfig, convert: Convert) -> list[dict[str, torch.Tensor]]:
    weights = load_file(folder / "model.safetensors")
    return [
        {name: assemble(weights, slices) for name, slices in shard_slices(config, convert, rank).items()}
        for rank in range(convert.tp_size)
    ]


def sharded_logits(folder: Path, convert: Convert, ids: torch.Tensor) -> torch.Tensor:
    config = ModelConfig.from_folder(folder)
    check_divisible(config, convert)
    shards = shards_of(folder, config, convert)
    positions = torch.arange(ids.shape[1]).expand_as(ids)

    @torch.no_grad()
    def work(backend: TorchBackend) -> torch.Tensor:
        model = DecoderLM.from_shard(config, backend, convert.kv_size_multiplier, shards[backend.tp_rank])
        return model.logits(model(ids, positions, torch.ones_like(ids)))

    return torch.cat(run_as_threads(thread_backends([[rank] for rank in range(convert.tp_size)]), work), dim=-1)


def hf_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


@st.composite
def sized_conversions(draw: st.DrawFn) -> tuple[dict, Convert]:
    """The sizes of a small Llama, and a conversion that fits it."""
    hw_backend = draw(st.sampled_from(["trn1", "trn2"]))
    multiplier = draw(st.integers(1, 4))
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    tp = kv_heads * multiplier
    if hw_backend == "trn2" and multiplier == 1:
        tp = draw(st.sampled_from([n for n in range(1, kv_heads + 1) if kv_heads % n == 0]))
    heads = kv_heads * multiplier * draw(st.integers(1, 2))
    head_dim = draw(st.sampled_from([4, 8]))
    sizes: dict[str, Any] = {
        "vocab_size": tp * draw(st.integers(4, 9)),
        "hidden_size": heads * head_dim,
        "intermediate_size": tp * draw(st.integers(2, 5)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": draw(st.booleans()),
        "initializer_range": 0.3,
    }
    if draw(st.booleans()):
        sizes["rope_parameters"] = {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }  # fmt: skip
    return sizes, conversion(tp, multiplier, hw_backend)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=sized_conversions(), seed=st.integers(0, 99))
def test_sharded_logits_equal_hf(
    case: tuple[dict, Convert], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes, convert = case
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(seed)
    HFLlama(HFLlamaConfig(**sizes)).save_pretrained(folder)
    ids = torch.randint(sizes["vocab_size"], (2, 24))
    torch.testing.assert_close(sharded_logits(folder, convert, ids), hf_logits(folder, ids), atol=1e-4, rtol=1e-4)


def test_the_stock_converters_order_on_trn2_fails_the_check(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NxD's converter writes this for trn2: K and V repeated as K0,K1,K2,K0,K1,K2, but queries in order."""
    convert = conversion(6, 2)
    ids = torch.randint(1536, (1, 16), generator=torch.Generator().manual_seed(0))
    right = sharded_logits(tiny_llama, convert, ids)

    def stock(config: ModelConfig, convert: Convert, rank: int):  # type: ignore[no-untyped-def]
        heads = heads_of_rank(config, convert, rank)
        heads.kv[:] = [rank % config.num_key_value_heads]
        return heads

    monkeypatch.setattr("trnlora.weights.nxd_layout.heads_of_rank", stock)
    wrong = sharded_logits(tiny_llama, convert, ids)
    reference = hf_logits(tiny_llama, ids)
    assert (right - reference).abs().max() < 1e-4
    assert (wrong - reference).abs().max() > 0.1


def packed(lengths: list[int], seq_len: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """One packed row of random documents, the first half of each masked."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (1, seq_len), generator=generator)
    labels, positions = ids.clone(), torch.zeros_like(ids)
    documents = torch.zeros_like(ids)
    start = 0
    for number, length in enumerate(lengths, 1):
        documents[0, start : start + length] = number
        positions[0, start : start + length] = torch.arange(length)
        labels[0, start : start + length // 2] = -100
        start += length
    labels[documents == 0] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "document_ids": documents}


def test_a_packed_row_has_the_loss_of_its_documents(tiny_llama: Path) -> None:
    lengths = [7, 19, 11]
    row = packed(lengths, 48, 1536)
    config = ModelConfig.from_folder(tiny_llama)
    (shard,) = shards_of(tiny_llama, config, conversion(1, 1))
    model = DecoderLM.from_shard(config, thread_backends([[0]])[0], 1, shard)
    with torch.no_grad():
        loss, labelled = model.loss(row["input_ids"], row["position_ids"], row["document_ids"], row["labels"])
        hf = AutoModelForCausalLM.from_pretrained(tiny_llama)
        expected, start = torch.zeros(()), 0
        for length in lengths:
            cut = slice(start, start + length)
            labels = row["labels"][:, cut]
            expected += hf(row["input_ids"][:, cut], labels=labels).loss * (labels[:, 1:] != -100).sum()
            start += length
    assert int(labelled) == sum(length - length // 2 for length in lengths)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)


def sharded_gradients(
    folder: Path, convert: Convert, lora: Lora, row: dict[str, torch.Tensor], recompute: bool = False
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """The loss of one packed row, and every rank's adapter and gradients.

    B is random, otherwise A has no gradient. Both are small: a large adapter saturates attention, and then the
    gradients are mostly rounding errors.
    """
    config = ModelConfig.from_folder(folder)
    shards = shards_of(folder, config, convert)
    generator = torch.Generator().manual_seed(5)
    head_dim = config.head_dim
    whole_a = {
        n: 0.05 * torch.randn(lora.r, config.hidden_size, generator=generator) for n in range(config.num_hidden_layers)
    }
    whole_b = {
        (n, name): 0.05 * torch.randn(heads, head_dim, lora.r, generator=generator)
        for n in range(config.num_hidden_layers)
        for name, heads in (
            ("q", config.num_attention_heads), ("k", config.num_key_value_heads), ("v", config.num_key_value_heads)
        )
    }  # fmt: skip
    backends = thread_backends(kv_replica_groups(config, convert))
    models = []
    for backend in backends:
        model = DecoderLM.from_shard(config, backend, convert.kv_size_multiplier, shards[backend.tp_rank])
        add_lora(model, lora)
        model.recompute_layers = recompute
        heads = heads_of_rank(config, convert, backend.tp_rank)
        layers: Any = model.model.layers
        for index, layer in enumerate(layers):
            qkv: Any = layer.self_attn.qkv_proj
            qkv.lora_A.weight.data = whole_a[index].clone()
            for name in "qkv":
                own = whole_b[index, name][heads.q if name == "q" else heads.kv].reshape(-1, lora.r)
                getattr(qkv.lora_B, f"weight_{name}").data = own.clone()
        models.append(model)

    def work(backend: TorchBackend) -> torch.Tensor:
        model = models[backend.tp_rank]
        loss, _ = model.loss(row["input_ids"], row["position_ids"], row["document_ids"], row["labels"])
        loss.backward()
        return loss.detach()

    losses = run_as_threads(backends, work)
    trainable = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    adapters = [{n: p.detach() for n, p in each.items()} for each in trainable]
    return losses[0], adapters, [{n: p.grad for n, p in each.items() if p.grad is not None} for each in trainable]


def test_recomputed_layers_have_the_same_gradients(tiny_llama: Path) -> None:
    lora = Lora(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["qkv_proj"])
    row = packed([20, 20], 48, 1536)
    loss, _, gradients = sharded_gradients(tiny_llama, conversion(3, 1), lora, row)
    again, _, recomputed = sharded_gradients(tiny_llama, conversion(3, 1), lora, row, recompute=True)
    assert torch.equal(loss, again)
    for rank, named in enumerate(gradients):
        assert named.keys() == recomputed[rank].keys()
        assert all(torch.equal(gradient, recomputed[rank][name]) for name, gradient in named.items())


def assert_same_gradient(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 rounding, relative to the whole tensor, since single entries are sums that may cancel."""
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("sharding", SHARDINGS, ids=lambda s: f"{s[2]}-tp{s[0]}x{s[1]}")
def test_gradients_equal_peft(tiny_llama: Path, sharding: tuple[int, int, str]) -> None:
    """lora_A's gradient is whole on every rank, copies of lora_B's agree, and both equal HF + PEFT's."""
    convert = conversion(*sharding)
    lora = Lora(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["qkv_proj"])
    row = packed([20, 28], 48, 1536)
    row = {name: column[:, :20] for name, column in row.items()}  # one document, so HF needs no mask
    config = ModelConfig.from_folder(tiny_llama)
    loss, adapters, gradients = sharded_gradients(tiny_llama, convert, lora, row)

    hf = AutoModelForCausalLM.from_pretrained(tiny_llama)
    peft = get_peft_model(
        hf, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    whole = peft_adapter(adapters, config, convert, lora)
    peft.load_state_dict({name.replace(".weight", ".default.weight"): t for name, t in whole.items()}, strict=False)
    expected_loss = peft(row["input_ids"], labels=row["labels"]).loss * (row["labels"][:, 1:] != -100).sum()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss.detach(), atol=1e-3, rtol=1e-5)

    expected = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    found = peft_adapter(gradients, config, convert, lora)
    for index in range(config.num_hidden_layers):
        attention = f"base_model.model.model.layers.{index}.self_attn"
        shared_a = torch.zeros(())
        for name in "qkv":
            assert_same_gradient(
                found[f"{attention}.{name}_proj.lora_B.weight"],
                expected[f"{attention}.{name}_proj.lora_B.default.weight"],
            )
            shared_a = shared_a + expected[f"{attention}.{name}_proj.lora_A.default.weight"]
        for rank in gradients:  # q, k and v share one A: its gradient is the sum of PEFT's three
            assert_same_gradient(rank[f"model.layers.{index}.self_attn.qkv_proj.lora_A.weight"], shared_a)
    for group in kv_replica_groups(config, convert):
        for name in gradients[0]:
            if name.endswith((".weight_k", ".weight_v")):
                for other in group:
                    torch.testing.assert_close(gradients[other][name], gradients[group[0]][name], atol=0, rtol=0)


def test_a_shard_with_a_wrong_tensor_name_is_refused(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama")
    config = ModelConfig.from_folder(folder)
    (shard,) = shards_of(folder, config, conversion(1, 1))
    qkv = "model.layers.0.self_attn.qkv_proj"
    shard[f"{qkv}.weight_qkv"] = shard.pop(f"{qkv}.weight_q")
    with pytest.raises(UserError, match=r"does not fit the model: .*weight_"):
        DecoderLM.from_shard(config, thread_backends([[0]])[0], 1, shard)
