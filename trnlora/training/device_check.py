"""Ten training steps of a tiny model on `cpu` and on the active backend, from the same shards, compared rank by rank.

The model is random, with as many heads as the cut needs. Cut, targets of LoRA and recomputation are those of the
params. Where the active backend is `cpu` or `cuda`, the other side is the static form of the torch backend on the CPU.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytorch_lightning as pl
import torch
from rich.table import Column, Table
from rich.text import Text
from safetensors.torch import save_file
from torch import Tensor

from trnlora.backends.training import TrainingBackend, training_backend
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import IGNORED, DecoderLM
from trnlora.model.targets import adapter_tensors
from trnlora.model.tensors import hf_shapes
from trnlora.params import Params
from trnlora.training.initial_adapter import set_adapter
from trnlora.training.recorder import Recorder
from trnlora.training.run import quiet_lightning, trainer_options
from trnlora.weights.convert import write_shards
from trnlora.weights.nxd_layout import kv_replica_groups

STEPS = 10
EPOCHS = 2
SEQ_LEN = 512  # what attention kernels need, at least
SIDES = ("cpu", "device")
COMPILER = "aot_eager"  # of the static form on a CPU: torch's tracing and gradients, without C++
# The largest allowed differences, relative to the largest value (logits), the value (losses) or the tensor's norm.
TOLERANCES = {
    "float32": {"logits": 1e-4, "losses": 1e-5, "gradients": 3e-4, "adapter": 1e-4},
    "bfloat16": {"logits": 5e-2, "losses": 1e-2, "gradients": 1e-1, "adapter": 1e-2},
}


def tiny_params(params: Params, side: str, dtype: str) -> Params:
    """`params` for the check: their cut, backend and LoRA targets, with a short run."""
    rows = 2 * params.train.dp_size * params.train.micro_batch_size
    return params.model_copy(
        update={
            "backend": params.backend if side != "cpu" and params.on_trainium else "cpu",
            "model": params.model.model_copy(update={"dtype": dtype}),
            "data": params.data.model_copy(update={"seq_len": SEQ_LEN}),
            "lora": params.lora.model_copy(update={"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}),
            "train": params.train.model_copy(
                update={
                    "epochs": EPOCHS, "max_steps": None, "lr": 1e-3, "global_batch_size": rows, "keep": "last",
                    "validate_every_steps": None, "early_stopping_patience": None,
                    "activation_checkpointing": params.train.activation_checkpointing and side != "cpu",
                }
            ),
        }
    )  # fmt: skip


def tiny_config(params: Params) -> ModelConfig:
    """A Llama of two layers with one KV head for each rank that holds another one, and two queries for each rank."""
    tp_size = params.convert.tp_size
    return ModelConfig.from_hf(
        {
            "model_type": "llama", "vocab_size": 512 * tp_size, "hidden_size": 256, "intermediate_size": 128 * tp_size,
            "num_hidden_layers": 2, "num_attention_heads": 2 * tp_size, "head_dim": 64,
            "num_key_value_heads": tp_size // params.convert.kv_size_multiplier, "tie_word_embeddings": False,
        }
    )  # fmt: skip


def write_tiny_shards(folder: Path, params: Params, dtype: str) -> None:
    """Write the tiny model with random weights of `dtype` to `folder`, as HF's file and as shards."""
    config = tiny_config(params)
    generator = torch.Generator().manual_seed(params.train.seed)
    weights = {
        name: (torch.randn(shape, generator=generator) * 0.06 + (len(shape) == 1)).to(getattr(torch, dtype))
        for name, shape in hf_shapes(config).items()
    }
    model = folder / "model"
    model.mkdir(parents=True)
    save_file(weights, model / "model.safetensors")
    write_shards(model, folder / "shards", config, params.convert)


def packed_rows(count: int, vocabulary: int, seed: int) -> dict[str, Tensor]:
    """Random packed rows, each of several documents and padding, as `trnlora.training.batches.read_packed_rows`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (count, SEQ_LEN), generator=generator)
    documents, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for row in range(count):
        ends = torch.randint(1, SEQ_LEN, (4,), generator=generator).sort().values.tolist()
        for number, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            documents[row, start:stop] = number
            positions[row, start:stop] = torch.arange(stop - start)
    labels = torch.where((documents > 0) & (positions > 3), ids, IGNORED)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "document_ids": documents}


def train_side(params: Params, side: str, dtype: str, folder: Path) -> None:
    """Train on one side, as one rank of all, and write its record to `folder`."""
    quiet_lightning()
    params = tiny_params(params, side, dtype)
    config = tiny_config(params)
    is_static = side != "cpu" and not params.on_trainium
    backend = _static_form() if is_static else training_backend(params.backend)
    rows = STEPS // EPOCHS * params.train.global_batch_size - 1  # the last step of an epoch has fewer
    module = Recorder(
        build=functools.partial(_build, backend, params, config, folder / "shards"),
        train=params.train,
        adapter=adapter_tensors(config, params.lora),
        train_rows=packed_rows(rows, config.vocab_size, seed=1),
        validation_rows=packed_rows(2, config.vocab_size, seed=2),
        total_steps=STEPS,
        sum_dtype=backend.SUM_DTYPE,
    )
    trainer = pl.Trainer(**trainer_options(params, backend, STEPS), num_sanity_val_steps=-1)
    trainer.fit(module)
    record = {**module.record, "validation_loss": module.validation_loss}
    torch.save(record, folder / side / f"{os.environ['RANK']}.pt")
    trainer.strategy.barrier("end")


def _build(backend: TrainingBackend, params: Params, config: ModelConfig, shards: Path, mesh: Any) -> DecoderLM:
    model = backend.build_model(mesh, params, config, shards, kv_replica_groups(config, params.convert))
    generator = torch.Generator().manual_seed(3)
    # B is not 0, or A would have no gradient.
    table = adapter_tensors(config, params.lora)
    set_adapter(model, [(row, 0.05 * torch.randn(row.shape, generator=generator)) for row in table], params.convert)
    return model


def _static_form() -> TrainingBackend:
    """The static form on the CPU: what the check needs of a training module."""
    from trnlora.backends import torch_training
    from trnlora.backends.torch_static import build_static_model

    return cast(
        TrainingBackend,
        SimpleNamespace(
            SUM_DTYPE=torch_training.SUM_DTYPE,
            trainer_placement=torch_training.trainer_placement,
            build_model=functools.partial(build_static_model, compiler=COMPILER, device=torch.device("cpu")),
        ),
    )


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest relative difference of one rank's values."""

    dtype: str
    rank: int
    what: str  # a key of TOLERANCES
    value: float
    where: str  # the step and the tensor that differ most

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype][self.what]

    @property
    def is_too_large(self) -> bool:
        return not self.value <= self.tolerance  # also for NaN


def compare(folder: Path, dtype: str) -> Iterator[Difference]:
    """The differences between the records of the two sides in `folder`, of each rank."""
    for file in sorted((folder / SIDES[0]).iterdir(), key=lambda file: int(file.stem)):
        one, other = (torch.load(folder / side / file.name, weights_only=True) for side in SIDES)
        rank = int(file.stem)
        logits, expected = other["logits"].float(), one["logits"].float()
        yield Difference(dtype, rank, "logits", float((logits - expected).abs().max() / expected.abs().max()), "")
        losses = [(abs(b["loss"] / a["loss"] - 1), f"step {n}") for n, (a, b) in _steps(one, other)]
        losses.append((abs(other["validation_loss"] / one["validation_loss"] - 1), "validation"))
        yield Difference(dtype, rank, "losses", *_worst(losses))
        for what, key in (("gradients", "gradients"), ("adapter", "weights")):
            values = [
                (
                    float((b[key][name] - tensor).norm() / tensor.norm()),
                    f"step {n}, {name.removeprefix('model.model.')}",
                )
                for n, (a, b) in _steps(one, other)
                for name, tensor in a[key].items()
            ]
            yield Difference(dtype, rank, what, *_worst(values))


def _worst(values: list[tuple[float, str]]) -> tuple[float, str]:
    return max(values, key=lambda value: math.inf if math.isnan(value[0]) else value[0])


def _steps(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[int, tuple[Any, Any]]]:
    return enumerate(zip(one["steps"], other["steps"], strict=True), 1)


def difference_table(differences: list[Difference]) -> Table:
    """A row for each rank, a column for each kind of value. Red: beyond the tolerance, which is in the last row."""
    table = Table("dtype", "rank", *(Column(what, justify="right") for what in TOLERANCES["float32"]))
    for dtype, tolerances in TOLERANCES.items():
        of_dtype = [difference for difference in differences if difference.dtype == dtype]
        for rank in sorted({difference.rank for difference in of_dtype}):
            values = {difference.what: difference for difference in of_dtype if difference.rank == rank}
            cells = [
                Text(f"{values[what].value:.1e}", style="red" if values[what].is_too_large else "")
                for what in tolerances
            ]
            table.add_row(dtype, str(rank), *cells)
        table.add_row(dtype, "allowed", *(f"{tolerance:.0e}" for tolerance in tolerances.values()), end_section=True)
    return table
