"""Products with frozen weights: packed ones, LoRA's on top, and which library computes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.adapters import lora_params
from support.models import FAMILIES, write_model
from support.sharded import conversion, packed, sharded_gradients, shards_of
from torch import Tensor

from trnlora import processor
from trnlora.backends import torch as torch_backend
from trnlora.backends.frozen_linear import (
    ROW_MULTIPLE,
    FrozenWeights,
    library_of_products,
    lora_linear,
    packed_dtype,
)
from trnlora.backends.torch import thread_backends
from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM

SIZES = [12, 4, 4]
TOLERANCE = {None: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_products(dtype: torch.dtype | None, biased: bool, rows: int) -> None:
    weights = [noise(size, 24, seed=size + place) for place, size in enumerate(SIZES)]
    biases = [noise(size, seed=size) for size in SIZES] if biased else []
    frozen = FrozenWeights(weights, biases, dtype)
    x, y = noise(rows, 24), noise(rows, sum(SIZES))
    expected = F.linear(x, torch.cat(weights), torch.cat(biases) if biased else None)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(frozen.multiply(x), expected, atol=10 * tolerance, rtol=tolerance)
    torch.testing.assert_close(
        frozen.multiply_transposed(y), y @ torch.cat(weights), atol=10 * tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("trained", [(True, True, True), (True, False, True), (False, False, True)])
@pytest.mark.parametrize("share_a", [True, False])
def test_lora_on_top_by_finite_differences(trained: tuple[bool, ...], share_a: bool) -> None:
    weights = FrozenWeights([noise(size, 8).double() for size in SIZES], [noise(size).double() for size in SIZES])
    pairs = list(zip(SIZES, trained, strict=True))
    a = noise(3 if share_a else 3 * sum(trained), 8).double().requires_grad_()
    b: list[Any] = [noise(size, 3).double().requires_grad_() if is_trained else None for size, is_trained in pairs]
    x = noise(2, 5, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, *b: lora_linear(x, weights, 0.7, a, b), (x, a, *b))
    with torch.no_grad():
        low = 0.7 * x @ a.t()
        lows = iter([low] * 3 if share_a else low.split(3, dim=-1))
        deltas = [
            next(lows) @ m.t() if is_trained else low.new_zeros(2, 5, size)
            for m, (size, is_trained) in zip(b, pairs, strict=True)
        ]
        expected = weights.multiply(x.flatten(0, 1)).view(2, 5, -1) + torch.cat(deltas, dim=-1)
        torch.testing.assert_close(lora_linear(x, weights, 0.7, a, b), expected)


@pytest.mark.parametrize("rows", [0, 2 * ROW_MULTIPLE, 2 * ROW_MULTIPLE + 5])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, True), (False, False, True)])
@pytest.mark.parametrize("share_a", [True, False])
def test_lora_on_packed_weights(rows: int, trained: tuple[bool, ...], share_a: bool) -> None:
    """Values and gradients are those with plain weights, whichever library multiplies by LoRA's."""
    weights = [noise(size, 24, seed=size + place) for place, size in enumerate(SIZES)]
    results = []
    for dtype in (None, torch.float32):
        a = noise(3 if share_a else 3 * sum(trained), 24).requires_grad_()
        pairs = zip(SIZES, trained, strict=True)
        b = [noise(size, 3).requires_grad_() if is_trained else None for size, is_trained in pairs]
        x = noise(rows, 24).requires_grad_()
        y = lora_linear(x, FrozenWeights(weights, (), dtype), 0.7, a, b)
        inputs = (x, a, *(matrix for matrix in b if matrix is not None))
        results.append((y.detach(), *torch.autograd.grad(y, inputs, noise(rows, sum(SIZES), seed=2))))
    for plain, packed_one in zip(*results, strict=True):
        torch.testing.assert_close(packed_one, plain, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("tp_size", "multiplier"), [(1, 1), (3, 1), (6, 2)])
def test_packed_weights_give_the_same_loss_and_gradients(
    tmp_path: Path, family: str, tp_size: int, multiplier: int
) -> None:
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96, "vocab_size": 1536}
    model = write_model(tmp_path / "model", family, **sizes, intermediate_size=144, head_dim=8)
    row = packed([20, 13, 9], 48, 1536)
    arguments = (model, conversion(tp_size, multiplier), lora_params(target_modules="all-linear"), row)
    plain, _, gradients = sharded_gradients(*arguments)
    loss, _, packed_gradients = sharded_gradients(*arguments, pack=torch.float32)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for rank, own in enumerate(gradients):
        assert own.keys() == packed_gradients[rank].keys()
        for name, gradient in own.items():
            torch.testing.assert_close(packed_gradients[rank][name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("vendor", "instructions", "library"),
    [
        ("AuthenticAMD", "AVX512", "oneDNN"),
        ("AuthenticAMD", "AVX2", "MKL"),
        ("GenuineIntel", "AVX512", "MKL"),
        (None, "AVX512", "MKL"),
    ],
)
def test_the_library_follows_from_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str | None, instructions: str, library: str
) -> None:
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    if vendor:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 25\n")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: instructions)
    assert library_of_products() == library
    assert packed_dtype("highest") is (torch.float32 if library == "oneDNN" else None)


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "avx512_vbmi"])
def test_bf16_needs_its_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu avx512f {flag} amx_tile\n")
    if flag.endswith("bf16"):
        assert packed_dtype("bf16") is torch.bfloat16
        return
    with pytest.raises(UserError, match=r"^train\.matmul_precision: bf16 needs a processor with .*: write highest$"):
        packed_dtype("bf16")


def test_a_packed_weight_leaves_the_model_and_its_file_is_mapped_again(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read through the model's own mapping of its shard would stay in memory."""
    config = ModelConfig.from_folder(tiny_llama)
    (shard,) = shards_of(tiny_llama, config, conversion(1, 1))
    model = DecoderLM.from_shard(config, thread_backends([[0]])[0], 1, shard)
    largest = max(value.nbytes for value in shard.values())
    monkeypatch.setattr(torch_backend, "MAPPED_BYTES", largest)
    mapped = []

    def read() -> dict[str, Tensor]:
        mapped.append(0)
        return shard

    torch_backend.pack_frozen_weights(model, read, lambda name: torch.float32 if "mlp" in name else None)
    left = {name for name, _ in model.named_parameters()}
    assert left == {name for name in shard if ".mlp." not in name}
    read_bytes = sum(value.nbytes for name, value in shard.items() if ".mlp." in name)
    assert len(mapped) >= read_bytes // (2 * largest)
    assert len(mapped) > 1
