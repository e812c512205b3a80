"""PEFT adapter folders for vLLM, the pipeline's own and others, checked before anything is started.

vLLM ignores tensors whose names match nothing and pads tensors that are too small, so it may silently serve the base
model (vllm issues 34186, 55193). Only file headers are read here, so the checks are fast.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from trnlora import paths
from trnlora.errors import UserError
from trnlora.files import check_sums
from trnlora.model.config import ModelConfig
from trnlora.model.targets import peft_modules
from trnlora.model.tensors import linear_sizes
from trnlora.params import Lora, Params
from trnlora.serving.access import RESERVED
from trnlora.training.adapter_record import GREEDY, AdapterRecord, Generation, check_base, read_record
from trnlora.weights.adapter_source import adapter_folder
from trnlora.weights.peft_folder import (
    CONFIG,
    RECORD,
    SAVE_AGAIN,
    SPECIAL,
    WEIGHTS,
    read_adapter_header,
    read_peft_config,
)

# The model names that the server's clients use.
BASE = "base"
TUNED = "tuned"  # the pipeline's own adapter

# What vLLM cannot serve (vllm/lora/peft_helper.py). All are absent or empty in a plain LoRA.
_UNSUPPORTED = (
    "use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "layer_replication",
)  # fmt: skip
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.(lora_[AB])\.weight")
_REBUILD = "run `dvc repro flatten_adapter`"


@dataclass(frozen=True)
class Adapter:
    """A checked PEFT folder that fits the model."""

    name: str  # the model name that clients use in their requests
    folder: Path
    r: int
    modules: frozenset[str]  # PEFT's names of the linear layers it changes
    record: AdapterRecord | None = None  # what it was trained with; None for one that this project did not write


def parse_adapters(pairs: list[str]) -> dict[str, Path]:
    """The folders, or bundles, by name, from arguments of the form `name=folder`.

    Raises UserError for any other form and for a name that is already taken.
    """
    folders: dict[str, Path] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or not equals or not folder:
            raise UserError(
                f'adapter {pair!r} must have the form name=folder, as in ADAPTERS="dolly=artifacts/adapter"'
            )
        if name in RESERVED:
            raise UserError(f"adapter name {name!r} has a meaning of its own in vLLM: choose another name")
        if name == BASE or name in folders:
            raise UserError(f"adapter name {name!r} is taken: give each adapter its own name, other than {BASE}")
        folders[name] = Path(folder)
    return folders


def check_adapters(pairs: list[str] | None, params: Params) -> list[Adapter]:
    """The adapters to serve: those of `pairs` (name=folder), or the pipeline's own if `pairs` is None.

    Raises UserError for an adapter that vLLM would refuse or not apply, and for the pipeline's own if its files are not
    those that flatten_adapter wrote.
    """
    if pairs is None:
        check_sums(paths.ADAPTER, "flatten_adapter", sums=paths.ADAPTER_SUMS)
        return [check_own_adapter(paths.ADAPTER, paths.MODEL, params.lora, TUNED)]
    return [check_adapter(adapter_folder(path), paths.MODEL, name) for name, path in parse_adapters(pairs).items()]


def check_own_adapter(folder: Path, model: Path, lora: Lora, name: str) -> Adapter:
    """Check what flatten_adapter writes: its files, with the rank and targets of `lora` in every layer of `model`.

    Extra files are refused because NxDI loads the last weight file it finds. Raises UserError.
    """
    written = {CONFIG, WEIGHTS, RECORD}
    if not folder.is_dir():
        raise UserError(f"the adapter {folder} is missing: {_REBUILD}")
    files = {path.name for path in folder.iterdir()}
    if files != written:
        wrong = sorted(files ^ written)
        raise UserError(
            f"{folder} must contain only {', '.join(sorted(written))}; missing or unexpected: {wrong}: {_REBUILD}"
        )
    trained = peft_modules(lora.target_modules)
    config = read_peft_config(folder, f": {_REBUILD}")
    where = folder / CONFIG
    if special := config.special(SPECIAL):
        raise UserError(f"{where} has {', '.join(special)}, which was not trained: {_REBUILD}")
    if (config.lora_alpha, config.use_rslora) != (lora.lora_alpha, lora.use_rslora):
        raise UserError(
            f"{where} has lora_alpha {config.lora_alpha:g} and use_rslora {config.use_rslora}, but those of `lora` are "
            f"{lora.lora_alpha} and {lora.use_rslora}: {_REBUILD}"
        )
    if not isinstance(config.target_modules, list) or set(config.target_modules) != set(trained):
        raise UserError(f"{where} must have target_modules {', '.join(trained)}: {_REBUILD}")
    if not config.task_type or not config.base_model_name_or_path:
        raise UserError(f"{where} lacks task_type or base_model_name_or_path: {_REBUILD}")
    if config.r != lora.r:
        raise UserError(f"{where} has r {config.r}, but lora.r is {lora.r}: {_REBUILD}")
    model_config = ModelConfig.from_folder(model)
    modules = _check_tensors(folder, model_config, lora.r, trained, every_layer=True)
    return Adapter(name, folder, lora.r, modules, _read_record(folder, model, f"{folder}"))


def check_adapter(folder: Path, model: Path, name: str) -> Adapter:
    """Check any LoRA adapter that PEFT saved for `model`: any rank, any of the linear layers, extra files allowed.

    Raises UserError for what vLLM would refuse later or silently ignore.
    """
    if not folder.is_dir():
        raise UserError(f"adapter {name}: there is no folder {folder}")
    if missing := sorted({CONFIG, WEIGHTS} - {path.name for path in folder.iterdir()}):
        raise UserError(f"adapter {name}: {folder} has no {' and no '.join(missing)}{SAVE_AGAIN}")
    config = read_peft_config(folder)
    if unsupported := config.special(_UNSUPPORTED):
        raise UserError(
            f"{folder / CONFIG} has {', '.join(unsupported)}, which vLLM does not serve: merge it into the model"
        )
    model_config = ModelConfig.from_folder(model)
    modules = _check_tensors(folder, model_config, config.r, linear_sizes(model_config))
    for key in read_adapter_header(folder):
        module = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if not config.is_target(module):
            raise UserError(
                f"{folder / CONFIG}: {module} is not among target_modules, but {WEIGHTS} has {key}{SAVE_AGAIN}"
            )
    return Adapter(name, folder, config.r, modules, _read_record(folder, model, f"adapter {name}: {folder}"))


def _read_record(folder: Path, model: Path, who: str) -> AdapterRecord | None:
    """The adapter's record, if there is one. Raises UserError if it was trained on other weights than `model` has."""
    record = read_record(folder)
    if record:
        check_base(record, model, who)
    return record


def common_generation(adapters: Collection[Adapter]) -> Generation:
    """The sampling defaults of a server with these adapters: those that they record, or else those of the evaluation.

    Raises UserError if they record different ones: vLLM has one set for all its models.
    """
    recorded = [(adapter.name, adapter.record.generation) for adapter in adapters if adapter.record]
    for name, generation in recorded[1:]:
        first, other = recorded[0]
        if generation != other:
            raise UserError(
                f"the adapters {first} and {name} were evaluated with other sampling ({other}; {generation}), and vLLM "
                "has one set of defaults for all its models: start a server for each"
            )
    return recorded[0][1] if recorded else GREEDY


def _check_tensors(
    folder: Path, config: ModelConfig, r: int, allowed: Collection[str], every_layer: bool = False
) -> frozenset[str]:
    """Check names and shapes of the adapter's tensors and that every A has its B; return the modules they belong to.

    every_layer: all `allowed` modules must be there, in every layer, as in what flatten_adapter writes.
    """
    where = folder / WEIGHTS
    fix = f": {_REBUILD}" if every_layer else SAVE_AGAIN
    shapes = {key: list(entry.shape) for key, entry in read_adapter_header(folder, fix).items()}
    sizes = linear_sizes(config)
    found: set[tuple[int, str, str]] = set()
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if not match or match[2] not in allowed or int(match[1]) >= config.num_hidden_layers:
            raise UserError(f"{where}: {key} matches no {_join(allowed)} of the model, so vLLM would ignore it")
        in_size, out_size = sizes[match[2]]
        expected = [r, in_size] if match[3] == "lora_A" else [out_size, r]
        if shape != expected:
            raise UserError(f"{where}: {key} has shape {shape}, not {expected}")
        found.add((int(match[1]), match[2], match[3]))
    pairs = {(layer, module) for layer, module, _ in found}
    if every_layer:
        pairs |= {(layer, module) for layer in range(config.num_hidden_layers) for module in allowed}
    if not pairs:
        raise UserError(f"{where} contains no tensors{fix}")
    if missing := sorted({(*pair, matrix) for pair in pairs for matrix in ("lora_A", "lora_B")} - found):
        layer, module, matrix = missing[0]
        raise UserError(f"{where} lacks {len(missing)} tensors, the first is {matrix} of {module} in layer {layer}")
    return frozenset(module for _, module in pairs)


def _join(names: Collection[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"
