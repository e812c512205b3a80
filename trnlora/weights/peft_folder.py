"""PEFT folders: where their files come from; and one to train further, checked and read tensor by tensor."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.targets import AdapterTensor, adapter_tensors, peft_modules
from trnlora.params import Lora
from trnlora.readers import read_json
from trnlora.sources import hub_snapshot, parse_source

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "trnlora.json"  # what the adapter was trained with, if this project wrote it (training/adapter_record.py)
# Settings that make an adapter more than scaling · B A on linear layers. All are absent or empty in a plain LoRA.
SPECIAL = (
    "use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "alora_invocation_tokens",
    "use_qalora", "layer_replication", "layers_to_transform", "trainable_token_indices",
)  # fmt: skip


def fetch_adapter(uri: str) -> Path:
    """The folder of an adapter's path:// or hf:// source, downloaded if it is on the hub and not in its cache."""
    source = parse_source(uri)
    if source.scheme == "hf":
        return hub_snapshot(source, [CONFIG, WEIGHTS, RECORD])
    return source.path


def check_init_adapter(folder: Path, config: ModelConfig, lora: Lora) -> None:
    """Check that the adapter in `folder` has the form that `lora` says, so that training can go on from it.

    Raises UserError for a missing or damaged file, another rank, scale or set of modules, keys or shapes that are not
    this model's, values that are not finite, and lora_A's that differ where lora.share_a wants one.
    """
    import torch

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"lora.init_adapter: {folder / name} is missing: save the adapter again with PEFT")
    found = read_json(folder / CONFIG)
    where = f"lora.init_adapter: {folder / CONFIG}"
    if found.get("peft_type") != "LORA":
        raise UserError(f"{where} has peft_type {found.get('peft_type')}, not LORA: choose a LoRA adapter")
    if special := [key for key in SPECIAL if found.get(key)]:
        raise UserError(f"{where} has {', '.join(special)}, which cannot be trained: choose a plain LoRA adapter")
    if found.get("r") != lora.r:
        raise UserError(f"{where} has r {found.get('r')}: set lora.r to it (it is {lora.r})")
    alpha, use_rslora = found.get("lora_alpha"), bool(found.get("use_rslora"))
    if (alpha, use_rslora) != (lora.lora_alpha, lora.use_rslora):
        raise UserError(
            f"{where} has lora_alpha {alpha} and use_rslora {use_rslora}: set lora.lora_alpha and lora.use_rslora to "
            f"them (they are {lora.lora_alpha} and {lora.use_rslora})"
        )
    for tensor, values in _tensors(folder, config, lora):
        if not values[0].isfinite().all():
            raise UserError(f"lora.init_adapter: {tensor.peft_keys[0]} in {folder} holds NaN or Inf: choose another")
        if not all(torch.equal(values[0], other) for other in values[1:]):
            raise UserError(
                f"lora.init_adapter: {tensor.peft_keys[0]} and {tensor.peft_keys[1]} in {folder} differ, as PEFT "
                "trains them: set lora.share_a to false"
            )


def read_init_adapter(folder: Path, config: ModelConfig, lora: Lora) -> Iterator[tuple[AdapterTensor, "Tensor"]]:
    """Each tensor of the adapter and its values, float32, in the order of `adapter_tensors`. Reads one at a time."""
    for tensor, values in _tensors(folder, config, lora):
        yield tensor, values[0]


def _tensors(folder: Path, config: ModelConfig, lora: Lora) -> Iterator[tuple[AdapterTensor, list["Tensor"]]]:
    """Each tensor, and the float32 values of all its `peft_keys`. Raises UserError for other keys and shapes."""
    from safetensors import SafetensorError, safe_open

    table = adapter_tensors(config, lora)
    expected = {key: list(tensor.shape) for tensor in table for key in tensor.peft_keys}
    where = f"lora.init_adapter: {folder / WEIGHTS}"
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
            wrong = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
            if wrong:
                key = wrong[0]
                raise UserError(
                    f"{where}: {key} has shape {shapes.get(key, 'none')}, expected {expected.get(key, 'none')} "
                    f"({len(wrong)} such tensors): it must be trained on model.source, with lora.target_modules "
                    f"{', '.join(peft_modules(lora.target_modules))}"
                )
            for tensor in table:
                yield tensor, [file.get_tensor(key).float() for key in tensor.peft_keys]
    except SafetensorError as error:
        raise UserError(f"{where} is not a safetensors file ({error}): save the adapter again with PEFT") from None
