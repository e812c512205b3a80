"""PEFT folders that vLLM is to serve, the pipeline's own and others, checked before anything is started.

vLLM ignores tensors whose names match nothing and pads those of too small a shape, and may so serve the base model
without a word (vllm issues 34186, 55193). Only headers are read here, so the checks are quick.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from trnlora.errors import UserError
from trnlora.files import read_json
from trnlora.model.config import LlamaConfig

_FILES = {"adapter_config.json", "adapter_model.safetensors"}
_CONFIG_KEYS = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules")
# What vLLM cannot serve (vllm/lora/peft_helper.py), each absent or empty in a plain LoRA.
_UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alora_invocation_tokens", "use_qalora")
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.(lora_[AB])\.weight")
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Adapter:
    """A folder that fits the model. `modules`: PEFT's names of the linear layers that it changes."""

    name: str  # by which clients ask for it
    folder: Path
    r: int
    modules: frozenset[str]


def check_own_adapter(folder: Path, model: Path, r: int, name: str) -> Adapter:
    """What flatten_adapter writes: rank `r` on q, k and v of every layer of `model`, two files and no more.

    NxDI takes the last of several weight files, hence the count. Raises UserError for anything else.
    """
    mend = "run `dvc repro flatten_adapter`"
    if not folder.is_dir():
        raise UserError(f"the adapter {folder} is missing: {mend}")
    files = {path.name for path in folder.iterdir()}
    if files != _FILES:
        wrong = sorted(files ^ _FILES)
        raise UserError(f"{folder} must hold just {' and '.join(sorted(_FILES))}; missing or unexpected: {wrong}")
    config = read_json(folder / "adapter_config.json")
    where = f"{folder}/adapter_config.json"
    if missing := [key for key in _CONFIG_KEYS if not config.get(key)]:
        raise UserError(f"{where} lacks {', '.join(missing)}: {mend}")
    if config["peft_type"] != "LORA" or set(config["target_modules"]) != set(_QKV):
        raise UserError(f"{where} must say peft_type LORA and target_modules {', '.join(_QKV)}")
    if config["r"] != r:
        raise UserError(f"{where} has r {config['r']}, params have lora.r {r}: {mend}")
    llama = LlamaConfig.from_folder(model)
    every = {(layer, module) for layer in range(llama.num_hidden_layers) for module in _QKV}
    _check_tensors(folder, model, llama, r, _QKV, every)
    return Adapter(name, folder, r, frozenset(_QKV))


def check_adapter(folder: Path, model: Path, name: str) -> Adapter:
    """Any LoRA that PEFT has saved for `model`: of any rank, on any of the linear layers, other files beside it.

    Raises UserError with what vLLM would refuse later, or leave out without a word.
    """
    if not folder.is_dir():
        raise UserError(f"adapter {name}: there is no folder {folder}")
    if missing := sorted(_FILES - {path.name for path in folder.iterdir()}):
        raise UserError(
            f"adapter {name}: {folder} has no {' and no '.join(missing)}: save it with PEFT, as safetensors"
        )
    config = read_json(folder / "adapter_config.json")
    where = f"{folder}/adapter_config.json"
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int) or not config.get("lora_alpha"):
        raise UserError(f"{where} must say peft_type LORA, r and lora_alpha: save the adapter with PEFT")
    if unsupported := [key for key in _UNSUPPORTED if config.get(key)]:
        raise UserError(f"{where} has {', '.join(unsupported)}, which vLLM does not serve: merge it into the model")
    llama = LlamaConfig.from_folder(model)
    modules = _check_tensors(folder, model, llama, config["r"], tuple(_sizes(llama)))
    return Adapter(name, folder, config["r"], modules)


def _sizes(llama: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers by PEFT's names."""
    hidden, mlp = llama.hidden_size, llama.intermediate_size
    q, kv = llama.num_attention_heads * llama.head_dim, llama.num_key_value_heads * llama.head_dim
    attention = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    return attention | {"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}


def _check_tensors(
    folder: Path,
    model: Path,
    llama: LlamaConfig,
    r: int,
    allowed: tuple[str, ...],
    required: set[tuple[int, str]] | None = None,
) -> frozenset[str]:
    """Names and shapes of the adapter's tensors; returns the modules that they are of.

    `required`: (layer, module) that must be there, by default those of which one of A and B is.
    """
    where = f"{folder}/adapter_model.safetensors"
    sizes = _sizes(llama)
    seen: set[tuple[int, str, str]] = set()
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                match = _KEY.fullmatch(key)
                if not match or match[2] not in allowed or int(match[1]) >= llama.num_hidden_layers:
                    raise UserError(f"{where}: {key} matches no {_or(allowed)} of {model}, vLLM would ignore it")
                inputs, outputs = sizes[match[2]]
                shape, found = [r, inputs] if match[3] == "lora_A" else [outputs, r], tensors.get_slice(key).get_shape()
                if found != shape:
                    raise UserError(f"{where}: {key} has shape {found}, not {shape}")
                seen.add((int(match[1]), match[2], match[3]))
    except SafetensorError as error:
        raise UserError(f"{where} is not a safetensors file ({error}): save the adapter anew") from None
    pairs = required or {(layer, module) for layer, module, _ in seen}
    if not pairs:
        raise UserError(f"{where} holds no tensors: save the adapter anew")
    if missing := sorted({(*pair, matrix) for pair in pairs for matrix in ("lora_A", "lora_B")} - seen):
        layer, module, matrix = missing[0]
        raise UserError(f"{where} lacks {len(missing)} tensors, the first is {matrix} of {module} in layer {layer}")
    return frozenset(module for _, module, _ in seen)


def _or(names: tuple[str, ...]) -> str:
    return " or ".join((", ".join(names[:-1]), names[-1]))


def parse_adapters(pairs: list[str]) -> dict[str, Path]:
    """`name=folder` each. Raises UserError for another form, and for a name that is taken."""
    folders: dict[str, Path] = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or not equals or not folder:
            raise UserError(
                f'adapter {pair!r} must have the form name=folder, as in ADAPTERS="dolly=artifacts/adapter"'
            )
        if name == "base" or name in folders:
            raise UserError(f"adapter name {name!r} is taken: give every adapter a name of its own, other than base")
        folders[name] = Path(folder)
    return folders
