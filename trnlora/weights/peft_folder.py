"""PEFT folders: their config and header; and one to train further, checked and read tensor by tensor."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.targets import AdapterTensor, adapter_tensors, peft_modules
from trnlora.params import Lora
from trnlora.readers import StrictModel, read_json_as
from trnlora.weights.safetensors_header import HeaderEntry, read_header

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "trnlora.json"  # what the adapter was trained with, if this project wrote it (training/adapter_record.py)
SAVE_AGAIN = ": save the adapter again with PEFT, as safetensors"
# Settings that make an adapter more than scaling · B A on linear layers. All are absent or empty in a plain LoRA.
SPECIAL = (
    "use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "layer_replication", "layers_to_transform", "trainable_token_indices",
)  # fmt: skip
# Values of init_lora_weights, besides true and false, whose adapter is one for the model's own weights. PiSSA, OLoRA,
# CorDA and LoftQ change the model too (vllm/lora/peft_helper.py, _init_is_supported).
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


def _module_names(value: Any) -> Any:
    """PEFT takes names of modules, or all-linear, or a regular expression."""
    if isinstance(value, str) and value:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"it is not a regular expression: {error}") from None
    elif not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError("it must be a list of names, or a regular expression")
    return value


class PeftConfig(StrictModel):
    """What is read of adapter_config.json. PEFT's other keys are kept for `special`."""

    model_config = ConfigDict(extra="allow")

    peft_type: str
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0)]
    target_modules: Annotated[list[str] | str, BeforeValidator(_module_names)]
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True

    def is_target(self, module: str) -> bool:
        """Whether PEFT would train the linear layer `module`, e.g. model.layers.0.self_attn.q_proj."""
        if isinstance(self.target_modules, list):
            return any(module == name or module.endswith(f".{name}") for name in self.target_modules)
        return self.target_modules == "all-linear" or re.fullmatch(self.target_modules, module) is not None

    def special(self, settings: Iterable[str]) -> list[str]:
        """Those of `settings` that the adapter uses, and initial values that changed the model."""
        values = self.model_dump()
        used = [key for key in settings if values.get(key)]
        init = self.init_lora_weights
        return used + [f"init_lora_weights {init}"] * (isinstance(init, str) and init.lower() not in _PLAIN_INITS)


def read_peft_config(folder: Path, fix: str = SAVE_AGAIN) -> PeftConfig:
    """`folder`/adapter_config.json. Raises UserError (… `fix`) for values of other types and anything but a LoRA."""
    config = read_json_as(folder / CONFIG, PeftConfig, fix)
    if config.peft_type != "LORA":
        raise UserError(f"{folder / CONFIG} has peft_type {config.peft_type}, not LORA: choose a LoRA adapter")
    return config


def read_adapter_header(folder: Path, fix: str = SAVE_AGAIN) -> dict[str, HeaderEntry]:
    """`folder`/adapter_model.safetensors. Raises UserError (… `fix`) for a damaged file, or other than floats."""
    header = read_header(folder / WEIGHTS, str(folder / WEIGHTS), fix)
    for key, entry in header.items():
        if entry.dtype not in ("F32", "BF16", "F16"):
            raise UserError(f"{folder / WEIGHTS}: {key} is {entry.dtype}, not a dense float{fix}")
    return header


def check_init_adapter(folder: Path, config: ModelConfig, lora: Lora) -> None:
    """Check that the adapter in `folder` has the form that `lora` says, so that training can go on from it.

    Raises UserError for a missing or damaged file, another rank, scale or set of modules, keys or shapes that are not
    this model's, values that are not finite, and lora_A's that differ where lora.share_a wants one.
    """
    import torch

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"lora.init_adapter: {folder / name} is missing: save the adapter again with PEFT")
    where = f"lora.init_adapter: {folder / CONFIG}"
    try:
        found = read_peft_config(folder)
    except UserError as error:
        raise UserError(f"lora.init_adapter: {error}") from None
    if special := found.special(SPECIAL):
        raise UserError(f"{where} has {', '.join(special)}, which cannot be trained: choose a plain LoRA adapter")
    if found.r != lora.r:
        raise UserError(f"{where} has r {found.r}: set lora.r to it (it is {lora.r})")
    if (found.lora_alpha, found.use_rslora) != (lora.lora_alpha, lora.use_rslora):
        raise UserError(
            f"{where} has lora_alpha {found.lora_alpha:g} and use_rslora {found.use_rslora}: set lora.lora_alpha and "
            f"lora.use_rslora to them (they are {lora.lora_alpha} and {lora.use_rslora})"
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
    from safetensors import safe_open

    table = adapter_tensors(config, lora)
    expected = {key: tensor.shape for tensor in table for key in tensor.peft_keys}
    where = f"lora.init_adapter: {folder / WEIGHTS}"
    shapes = {key: entry.shape for key, entry in read_adapter_header(folder).items()}
    wrong = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
    if wrong:
        key = wrong[0]
        raise UserError(
            f"{where}: {key} has shape {shapes.get(key, 'none')}, expected {expected.get(key, 'none')} "
            f"({len(wrong)} such tensors): it must be trained on model.source, with lora.target_modules "
            f"{', '.join(peft_modules(lora.target_modules))}"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for tensor in table:
            yield tensor, [file.get_tensor(key).float() for key in tensor.peft_keys]
