"""The decoder over parallel layers: logits, losses, gradients equal HF's and PEFT's, by family and sharding."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.adapters import lora_params
from support.models import FAMILIES, randomize_vectors, write_model
from support.sharded import conversion, packed, sharded_gradients, shards_of
from transformers import AutoConfig, AutoModelForCausalLM

import trnlora.model.config
from trnlora.backends.torch import TorchBackend, run_as_threads, thread_backends
from trnlora.errors import UserError
from trnlora.model import fused_ops
from trnlora.model.config import Family, ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.lora import dropout_mask, random_words
from trnlora.model.targets import adapter_tensors, peft_modules
from trnlora.model.tensors import Cut
from trnlora.params import Convert, Lora
from trnlora.weights.nxd_layout import check_divisible, heads_of_rank, kv_replica_groups
from trnlora.weights.peft_export import peft_adapter

SHARDINGS = [(1, 1, "trn2"), (3, 1, "trn2"), (6, 2, "trn2"), (3, 1, "trn1"), (6, 2, "trn1")]  # 3 KV heads


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
    """The config of a small model of any family, and a conversion that fits it."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    hw_backend = draw(st.sampled_from(["trn1", "trn2"]))
    multiplier = draw(st.integers(1, 4))
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    tp = kv_heads * multiplier
    if hw_backend == "trn2" and multiplier == 1:
        tp = draw(st.sampled_from([n for n in range(1, kv_heads + 1) if kv_heads % n == 0]))
    heads = kv_heads * multiplier * draw(st.integers(1, 2))
    head_dim = draw(st.sampled_from([4, 8]))
    sizes: dict[str, Any] = FAMILIES[family] | {
        "model_type": family,
        "sliding_window": None,
        "vocab_size": tp * draw(st.integers(4, 9)),
        "hidden_size": heads * 8,
        "intermediate_size": tp * draw(st.integers(2, 5)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": draw(st.booleans()),
        "initializer_range": 0.3,
    }
    if family == "llama" and draw(st.booleans()):
        sizes["rope_parameters"] = {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }  # fmt: skip
    return sizes, conversion(tp, multiplier, hw_backend)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=sized_conversions(), seed=st.integers(0, 99))
def test_sharded_logits_equal_hf(
    case: tuple[dict, Convert], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes, convert = case
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    randomize_vectors(model)
    model.save_pretrained(folder)
    ids = torch.randint(sizes["vocab_size"], (2, 24))
    expected = hf_logits(folder, ids)
    assert (sharded_logits(folder, convert, ids) - expected).abs().max() <= 3e-5 * expected.abs().max()


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


def test_recomputed_layers_have_the_same_gradients(tiny_llama: Path) -> None:
    lora = lora_params()
    row = packed([20, 20], 48, 1536)
    loss, _, gradients = sharded_gradients(tiny_llama, conversion(3, 1), lora, row)
    again, _, recomputed = sharded_gradients(tiny_llama, conversion(3, 1), lora, row, recompute=True)
    assert torch.equal(loss, again)
    assert_equal_gradients(recomputed, gradients)


@pytest.mark.parametrize("pack", [None, torch.float32])
def test_norms_and_swiglu_recomputed_for_many_tokens_have_the_same_gradients(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, pack: torch.dtype | None
) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., torch.Tensor]:
        function = getattr(fused_ops, name)

        def call(*arguments: Any) -> torch.Tensor:
            calls.append(name)
            return function(*arguments)

        return call

    for name in ("rms_norm", "swiglu"):
        monkeypatch.setattr(fused_ops, name, counted(name))
    arguments = tiny_llama, conversion(3, 1), lora_params(), packed([20, 20], 48, 1536)
    loss, _, gradients = sharded_gradients(*arguments, pack=pack, only_needed=True)
    kept = Counter(calls)
    calls.clear()
    monkeypatch.setattr("trnlora.model.decoder.KEPT_TOKENS", 0)
    again, _, recomputed = sharded_gradients(*arguments, pack=pack, only_needed=True)
    layers = 3 * ModelConfig.from_folder(tiny_llama).num_hidden_layers  # of all ranks
    assert Counter(calls) - kept == {"rms_norm": 2 * layers, "swiglu": layers}
    assert torch.equal(loss, again)
    assert_equal_gradients(recomputed, gradients)


def assert_equal_gradients(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    """Every rank's, to the bit."""
    for own, named in zip(found, expected, strict=True):
        assert own.keys() == named.keys()
        assert all(torch.equal(gradient, named[name]) for name, gradient in own.items())


def assert_same_gradient(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 rounding, relative to the whole tensor, since single entries are sums that may cancel."""
    assert (found - expected).norm() < 1e-4 * expected.norm()


TARGET_SETS = {
    "qkv": {"target_modules": ["qkv_proj"], "share_a": True},
    "all": {"target_modules": "all-linear", "share_a": True},
    "all-separate": {"target_modules": "all-linear", "share_a": False},
    "q-v-up": {"target_modules": ["q_proj", "v_proj", "up_proj"], "share_a": True},
    "k-gate-o": {"target_modules": ["gate_proj", "k_proj", "o_proj"], "share_a": False, "use_rslora": True},
}


def assert_gradients_equal_peft(folder: Path, convert: Convert, lora: Lora) -> None:
    """Loss and gradients equal HF + PEFT's; copies of a tensor on several ranks have the same gradient."""
    row = packed([20, 28], 48, 1536)
    row = {name: column[:, :20] for name, column in row.items()}  # one document, so HF needs no mask
    config = ModelConfig.from_folder(folder)
    loss, adapters, gradients = sharded_gradients(folder, convert, lora, row)

    hf = AutoModelForCausalLM.from_pretrained(folder)
    modules = list(peft_modules(lora.target_modules))
    peft = get_peft_model(
        hf, LoraConfig(r=4, lora_alpha=8, use_rslora=lora.use_rslora, target_modules=modules, task_type="CAUSAL_LM")
    )
    whole = peft_adapter(adapters, config, convert, lora)
    keys = {name.replace(".weight", ".default.weight"): t for name, t in whole.items()}
    assert not peft.load_state_dict(keys, strict=False).unexpected_keys
    expected_loss = peft(row["input_ids"], labels=row["labels"]).loss * (row["labels"][:, 1:] != -100).sum()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss.detach(), atol=1e-3, rtol=1e-5)

    expected = {name.replace(".default", ""): p.grad for name, p in peft.named_parameters() if p.grad is not None}
    found = peft_adapter(gradients, config, convert, lora)
    assert found.keys() == expected.keys()
    for tensor in adapter_tensors(config, lora):  # a shared lora_A's gradient is the sum of PEFT's
        assert_same_gradient(found[tensor.peft_keys[0]], torch.stack([expected[k] for k in tensor.peft_keys]).sum(0))
        groups = {Cut.WHOLE: [list(range(convert.tp_size))], Cut.KV_ROWS: kv_replica_groups(config, convert)}
        for first, *others in groups.get(tensor.cut, []):
            for rank in others:
                assert torch.equal(gradients[rank][tensor.nxd_key], gradients[first][tensor.nxd_key])


@pytest.mark.parametrize("targets", TARGET_SETS)
@pytest.mark.parametrize("sharding", SHARDINGS, ids=lambda s: f"{s[2]}-tp{s[0]}x{s[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_peft(
    family_model: Callable[[str], Path], family: str, sharding: tuple[int, int, str], targets: str
) -> None:
    assert_gradients_equal_peft(family_model(family), conversion(*sharding), lora_params(**TARGET_SETS[targets]))


def test_a_family_that_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/adding_a_model_family.md, done once: Seed-OSS has biases on q, k and v, and an explicit head_dim."""
    folder = write_model(tmp_path / "model", "seed_oss", attention_bias=True, head_dim=16)
    with pytest.raises(UserError, match=r"the model is SeedOssForCausalLM; supported are LlamaForCausalLM, "):
        ModelConfig.from_folder(folder)
    row = Family("SeedOssForCausalLM", qkv_bias=True, required=("num_key_value_heads", "head_dim"))
    monkeypatch.setitem(trnlora.model.config.FAMILIES, "seed_oss", row)
    ids = torch.randint(1536, (2, 24))
    expected = hf_logits(folder, ids)
    for sharding in SHARDINGS:
        convert = conversion(*sharding)
        assert (sharded_logits(folder, convert, ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert_gradients_equal_peft(folder, convert, lora_params())


@pytest.mark.parametrize("p", [1 / 16, 0.5, 45875 / 2**16])
def test_masks_have_the_probability_and_no_pattern(p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = dropout_mask(random_words((3, 1000), generator), random_words((3, 999), generator), p)
    assert mask.shape == (1000, 999)
    deviation = 4 * (p * (1 - p)) ** 0.5
    assert abs(mask.float().mean() - p) < deviation / 999_000**0.5
    values = mask.float()
    for offset in range(1, 9):  # neighbours, whose words may be parts of one, are independent
        for both in (values[offset:] * values[:-offset], values[:, offset:] * values[:, :-offset]):
            assert abs(both.mean() - p * p) < 2 * deviation / 999_000**0.5, offset
    corner = values[1:, 1:] * values[:-1, 1:] * values[1:, :-1]
    assert abs(corner.mean() - p**3) < 2 * deviation / 999_000**0.5


def test_words_of_a_micro_batch_do_not_depend_on_its_padding() -> None:
    long, short = (random_words((tokens, 2, 7, 3), torch.Generator().manual_seed(5)) for tokens in (301, 160))
    assert torch.equal(long[:160], short)


def test_a_shard_with_a_wrong_tensor_name_is_refused(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama")
    config = ModelConfig.from_folder(folder)
    (shard,) = shards_of(folder, config, conversion(1, 1))
    qkv = "model.layers.0.self_attn.qkv_proj"
    shard[f"{qkv}.weight_qkv"] = shard.pop(f"{qkv}.weight_q")
    with pytest.raises(UserError, match=r"does not fit the model: .*weight_"):
        DecoderLM.from_shard(config, thread_backends([[0]])[0], 1, shard)
