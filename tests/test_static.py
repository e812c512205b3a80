"""The static form of the torch backend computes what the torch backend does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import lora_params
from support.models import FAMILIES, write_model
from support.sharded import conversion, packed, sharded_gradients

from trnlora.backends.torch import Group, thread_backends
from trnlora.backends.torch_static import StaticAdamW, StaticTorchBackend
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.lora import add_lora, draw_dropout

TARGETS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "qkv": {"target_modules": ["qkv_proj"]},
    "separate": {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"], "share_a": False},
}
SHARDINGS = [(1, 1, "trn2"), (2, 1, "trn2"), (4, 2, "trn2"), (4, 2, "trn1")]  # 2 KV heads
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}


def static(tp_group: Group, kv_group: Group) -> StaticTorchBackend:
    return StaticTorchBackend(tp_group, kv_group, compiler=None)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def write(family: str) -> Path:
        path = folder / family
        config = {**SIZES, **FAMILIES[family]}
        if "attention_multiplier" in config:
            config["attention_multiplier"] = 0.1  # at 0.3 attention is so sharp that rounding errors exceed 1e-5
        return path if path.exists() else write_model(path, family, **config)

    return write


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("sharding", SHARDINGS, ids=lambda s: f"tp{s[0]}x{s[1]}-{s[2]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_torch_backend(
    model_of: Callable[[str], Path], family: str, sharding: tuple[int, int, str], targets: str
) -> None:
    """A packed row with padding, and dropout."""
    row = packed([7, 60, 1, 200], 300, 1536)
    arguments = model_of(family), conversion(*sharding), lora_params(**TARGETS[targets], lora_dropout=0.1)
    loss, adapters, gradients = sharded_gradients(*arguments, row)
    same_loss, same_adapters, same_gradients = sharded_gradients(
        *arguments, ids_of(row), recompute=family == "qwen3", make=static
    )
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)
    for rank, named in enumerate(gradients):
        assert named.keys() == same_gradients[rank].keys()
        for name, gradient in named.items():
            assert torch.equal(adapters[rank][name], same_adapters[rank][name])
            difference = (same_gradients[rank][name] - gradient).norm() / gradient.norm()
            assert difference <= 1e-5, (rank, name)


@pytest.mark.long
def test_the_graphs_of_inductor(model_of: Callable[[str], Path]) -> None:
    """Each block is one graph, which torch's own compiler translates for the CPU."""
    row = packed([7, 60, 1, 200], 300, 1536)
    arguments = model_of("llama"), conversion(1, 1), lora_params(lora_dropout=0.1)
    loss, _, gradients = sharded_gradients(*arguments, row)

    def compiled(tp_group: Group, kv_group: Group) -> StaticTorchBackend:
        return StaticTorchBackend(tp_group, kv_group, compiler="inductor")

    same_loss, _, same_gradients = sharded_gradients(*arguments, ids_of(row), make=compiled)
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients[0].items():
        assert (same_gradients[0][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def ids_of(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: column.to(StaticTorchBackend.id_dtype) for name, column in row.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_mixes_no_devices(model_of: Callable[[str], Path], family: str) -> None:
    """On torch's meta device, whose operations refuse tensors of another one."""
    config = ModelConfig.from_folder(model_of(family))
    (backend,) = thread_backends([[0]], static)
    shapes = {name: parameter.shape for name, parameter in DecoderLM.empty(config, backend, 1).named_parameters()}
    model = DecoderLM.from_shard(
        config, backend, 1, {name: torch.empty(shapes[name], device="meta") for name in shapes}
    )
    with torch.device("meta"):
        add_lora(model, lora_params(lora_dropout=0.1))
    names = ("input_ids", "position_ids", "document_ids", "labels")
    row = {name: torch.zeros(1, 300, dtype=backend.id_dtype, device="meta") for name in names}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    draw_dropout(model, 1, row["labels"])
    loss, labelled = model.loss(**row)
    loss.backward()
    backend.adamw(trained, 1e-3, 0.0).step()
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert len(gradients) == len(trained)
    assert {value.device.type for value in (loss, labelled, *gradients)} == {"meta"}


def test_adamw_is_torchs() -> None:
    """Also over a checkpoint in the middle: the states are interchangeable."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator)]
    optimizers: list[torch.optim.Optimizer] = []
    for make in (
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, fused=True),
        lambda p: StaticAdamW(p, 0.1, 0.2, lambda function: function),
    ):
        optimizers.append(make([torch.nn.Parameter(value.clone()) for value in values]))
    for step in range(8):
        gradients = [torch.randn(value.shape, generator=generator) for value in values]
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        first, second = optimizers
        for mine, other in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        if step == 3:
            states = [optimizer.state_dict() for optimizer in optimizers]
            first.load_state_dict(states[1])
            second.load_state_dict(states[0])
