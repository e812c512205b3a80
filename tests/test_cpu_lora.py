"""vLLM's LoRA kernels for a CPU as this project replaces them: each token gets its adapter's product, or nothing."""

import pytest
import torch
from torch import Tensor

SLOTS, R, SIZE, OUTPUTS = 3, 4, 24, 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[1], [2] * 7, [-1] * 3, [0, -1, 2, 2, -1, 0, 1, -1]])
def test_each_token_gets_the_product_of_its_adapter(slots: list[int], dtype: torch.dtype) -> None:
    from trnlora.serving.cpu_lora import bgmv_expand_slice, bgmv_shrink

    torch.manual_seed(0)
    a = torch.randn(SLOTS, 1, R, SIZE, dtype=dtype)
    b = torch.randn(SLOTS, 1, OUTPUTS - 10, R, dtype=dtype)
    x = torch.randn(len(slots), SIZE, dtype=dtype)
    indices = torch.tensor(slots)

    low = torch.full((len(slots), R), 7.0)  # what was there is written over
    bgmv_shrink(x, a, low, indices, 0.5)
    expected = products(x, a, slots) * 0.5
    torch.testing.assert_close(low.double(), expected, rtol=1e-5, atol=1e-5)

    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 5e-2)
    for add in (True, False):
        before = torch.randn(len(slots), OUTPUTS, dtype=dtype)
        y = before.clone()
        bgmv_expand_slice(low, b, y, indices, 5, OUTPUTS - 10, add)
        delta = products(low, b, slots)
        inside = before[:, 5:-5].double() + delta if add else delta
        torch.testing.assert_close(y[:, 5:-5].double(), inside, rtol=rtol, atol=atol)
        assert torch.equal(y[:, :5], before[:, :5])
        assert torch.equal(y[:, -5:], before[:, -5:])


def products(x: Tensor, weights: Tensor, slots: list[int]) -> Tensor:
    """Token by token in float64; zeros for tokens without an adapter."""
    rows = [weights[slot, 0].double() @ row if slot >= 0 else 0 * weights[0, 0, :, 0].double()
            for row, slot in zip(x.double(), slots, strict=True)]  # fmt: skip
    return torch.stack(rows)


def test_vllm_calls_these_kernels() -> None:
    """For prompts and for the tokens after them: vLLM's modules have these functions under the names that they call."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    from trnlora.serving import cpu_lora

    for module in (lora_ops, punica_cpu):
        assert module.bgmv_shrink is cpu_lora.bgmv_shrink
        assert module.bgmv_expand_slice is cpu_lora.bgmv_expand_slice
    assert {"bgmv_shrink", "bgmv_expand_slice"} <= {
        *lora_ops.sgmv_shrink.__code__.co_names, *lora_ops.sgmv_expand_slice.__code__.co_names
    }  # fmt: skip
