"""What NxD Inference reads about adapters: an adapter of zeros for the base model, and the files that name both.

With LoRA on, vllm-neuron needs an adapter for every request: `_prepare_adapter_id_in_new_request` reads
`request_data.lora_request.lora_name` without asking whether there is a lora_request, and the exception ends the engine
(read: vllm-neuron 0.4.1 and 0.5.0, vllm_neuron/worker/neuronx_distributed_model_runner.py). NxDI could add an adapter
of zeros itself (LoraServingConfig.enable_base_model_only), but the plugin never sets that. So the base model is served
as an adapter whose lora_B is zero: it adds exactly 0.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from trnlora.files import write_json
from trnlora.readers import read_json
from trnlora.weights.peft_folder import CONFIG, WEIGHTS

NXDI_CONFIG = "neuron_config.json"  # in the folder of compiled graphs (NxDI, models/config.py, CONFIG_FILE)


def write_zero_adapter(adapter: Path, target: Path) -> None:
    """Write to the folder `target` what `adapter` (a PEFT folder) would be if every tensor were zero, in float32.

    Config, names and shapes are the same, so both adapters fit one engine.
    """
    target.mkdir(parents=True)
    shutil.copyfile(adapter / CONFIG, target / CONFIG)
    with safe_open(adapter / WEIGHTS, framework="numpy") as tensors:
        shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118 (not a dict)
    save_file({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}, target / WEIGHTS)


def write_lora_json(file: Path, adapters: Mapping[str, Path]) -> None:
    """Write NxDI's lora_ckpt_json: the adapters in device memory and in host memory, by name.

    Source: aws-neuron-sdk, libraries/nxd-inference/tutorials/trn2-llama3.1-8b-multi-lora-tutorial.ipynb.
    """
    file.write_text(json.dumps(_lora_json(adapters)), encoding="utf-8")


def _lora_json(adapters: Mapping[str, Path]) -> dict[str, Any]:
    folders = {name: str(folder.absolute().relative_to("/")) for name, folder in adapters.items()}
    return {"lora-ckpt-dir": "/", "lora-ckpt-paths": folders, "lora-ckpt-paths-cpu": folders}


def name_adapters_in_compiled(compiled: Path, adapters: Mapping[str, Path]) -> None:
    """Let the graphs in the folder `compiled`, if there are any, be loaded again with `adapters` by name.

    NxDI saves LoraServingConfig with them, with lora_ckpt_json and the paths that it read from it. Loading that again
    reads the file again and then refuses every path: "The adapter ID … appears more than once" (NxDI 4bcdc54,
    modules/lora_serving/config.py). The plugin takes this for missing graphs and compiles at every start. Without
    lora_ckpt_json the paths alone are read, so they are set to where the adapters are now.
    """
    file = compiled / NXDI_CONFIG
    if not file.exists():
        return
    config = read_json(file)
    if lora := config.get("neuron_config", {}).get("lora_config"):
        paths = {name: str(folder.absolute()) for name, folder in adapters.items()}
        lora |= {"lora_ckpt_json": None, "lora_ckpt_paths": paths, "lora_ckpt_paths_cpu": paths}
        write_json(file, config)
