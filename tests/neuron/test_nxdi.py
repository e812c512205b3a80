"""NxD Inference's own adapter loader, on the folder that flatten_adapter writes and on that of the usual guide.

Skipped without NxDI's source. To run it, do what docs/trainium.md says of the stand-in, and:

    git clone https://github.com/aws-neuron/neuronx-distributed-inference nxdi        (4bcdc54 was used)
    NXDI_SOURCE=$PWD/nxdi/src … .venv/bin/pytest tests/neuron
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trnlora.files import write_json
from trnlora.model.config import ModelConfig
from trnlora.model.targets import TARGETS, adapter_tensors, nxd_adapter_config
from trnlora.params import load_params
from trnlora.serving.neuron_lora import name_adapters_in_compiled, write_lora_json, write_zero_adapter
from trnlora.weights.adapter_shards import rank_part
from trnlora.weights.peft_export import peft_adapter, peft_adapter_config
from trnlora.weights.storage import LORA_TAG, rank_file, save_rank

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.long

# Loads a folder with the real LoraCheckpoint. Prints the norms of the weights that it found for each module, or null.
ASK = """
import json, sys
from neuronx_distributed_inference.modules.lora_serving.config import LoraServingConfig
from neuronx_distributed_inference.modules.lora_serving.lora_checkpoint import LoraCheckpoint
folder, layers = sys.argv[1], int(sys.argv[2])
loader = LoraCheckpoint(LoraServingConfig(max_loras=1, lora_ckpt_paths={"tuned": folder}))
state = loader.load_lora_state_dicts(loader.ckpt_paths)["tuned"]
modules = [f"self_attn.qkv_proj.{m}_proj" for m in "qkv"] + ["self_attn.o_proj.o_proj"]
modules += [f"mlp.{m}_proj" for m in ("gate", "up", "down")]
names = [f"layers.{n}.{module}.lora_{x}" for n in range(layers) for module in modules for x in "AB"]
found = {name: loader._get_module_checkpoint(name, state) for name in names}
print(json.dumps({name: None if w is None else w.norm().item() for name, w in found.items()}))
"""


# The engine's config as NxDI saves it with compiled graphs, in sys.argv[2] with the adapters of lora_ckpt_json
# sys.argv[1]; then loaded again from there. Prints the adapters' paths, or the error.
SAVE = """
import sys
from neuronx_distributed_inference.models.config import InferenceConfig, NeuronConfig
from neuronx_distributed_inference.modules.lora_serving.config import LoraServingConfig
lora = LoraServingConfig(max_loras=2, max_cpu_loras=2, lora_ckpt_json=sys.argv[1], dynamic_multi_lora=True)
InferenceConfig(NeuronConfig(lora_config=lora)).save(sys.argv[2])
"""
LOAD = """
import json, sys
from neuronx_distributed_inference.models.config import InferenceConfig
try:
    lora = InferenceConfig.load(sys.argv[1]).neuron_config.lora_config
except ValueError as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([lora.lora_ckpt_paths, lora.lora_ckpt_paths_cpu, lora.target_modules]))
"""


def matched(folder: Path, layers: int) -> dict[str, float | None]:
    result: dict[str, float | None] = json.loads(nxdi(ASK, folder, layers))
    return result


def nxdi(code: str, *arguments: Any) -> str:
    """The last line that `code` prints with NxDI on its path."""
    source, site, nxdi = (os.environ.get(name) for name in ("NXD_SOURCE", "NXD_SITE", "NXDI_SOURCE"))
    if not source or not site or not nxdi:
        pytest.skip("needs NxD's and NxDI's source: NXD_SOURCE, NXD_SITE, NXDI_SOURCE, see test_nxdi.py")
    path = [str(Path(__file__).parent / "rehearsal"), source, nxdi, site]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "NXD_CPU_MODE": "1", "NXD_LOG_LEVEL": "error"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return (done.stdout.splitlines() or [""])[-1]


def test_every_module_is_matched_and_moved_shards_are_not(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    params = load_params(ROOT / "params.yaml")
    convert, lora = params.convert, params.lora.model_copy(update={"target_modules": "all-linear"})
    config = ModelConfig.from_folder(make_llama(tmp_path / "llama"))
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(convert.tp_size)]
    for tensor in adapter_tensors(config, lora):
        whole = torch.randn(tensor.shape)
        for rank, shard in enumerate(shards):
            part = rank_part(tensor, whole, config, convert, rank)
            shard[tensor.nxd_key] = torch.cat([shard[tensor.nxd_key], part]) if tensor.nxd_key in shard else part
    for rank, shard in enumerate(shards):
        save_rank(rank_file(tmp_path / "nxd", LORA_TAG, rank), shard)

    adapter = peft_adapter(shards, config, convert, lora)
    (tmp_path / "peft").mkdir()
    save_file(adapter, tmp_path / "peft/adapter_model.safetensors")
    write_json(tmp_path / "peft/adapter_config.json", peft_adapter_config(lora, "hf://org/name@main"))
    found = matched(tmp_path / "peft", config.num_hidden_layers)
    assert len(found) == config.num_hidden_layers * 14
    for name, norm in found.items():
        key = f"base_model.model.model.{name.replace('qkv_proj.', '').replace('o_proj.o_proj', 'o_proj')}.weight"
        scale = lora.scaling if "lora_A" in name else 1.0  # NxDI puts the scale into A
        assert norm == pytest.approx(adapter[key].norm().item() * scale, rel=1e-5)

    # The base model's name: the same matrices, all zero, so that lora_B adds nothing.
    write_zero_adapter(tmp_path / "peft", tmp_path / "zero")
    assert matched(tmp_path / "zero", config.num_hidden_layers) == dict.fromkeys(found, 0.0)

    # The usual guide: the .pt files moved up, target_modules rewritten.
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "nxd/lora/model", moved)
    config_of_guide = {**nxd_adapter_config(lora), "target_modules": list(TARGETS)}
    write_json(moved / "adapter_config.json", config_of_guide)
    # The keys of fused layers match nothing; those of o_proj and down_proj match, but a file has one rank's part of A.
    for name, norm in matched(moved, config.num_hidden_layers).items():
        if ".o_proj." not in name and ".down_proj." not in name:
            assert norm is None, name
        elif "lora_A" in name:
            assert norm is not None
            assert norm < 0.9 * found[name], name  # type: ignore[operator]


def test_compiled_graphs_are_loaded_again_with_the_adapters_of_this_start(adapter: Path, tmp_path: Path) -> None:
    first = {"tuned": adapter, "base": tmp_path / "first/base"}
    write_zero_adapter(adapter, first["base"])
    write_lora_json(tmp_path / "lora.json", first)
    nxdi(SAVE, tmp_path / "lora.json", tmp_path / "compiled")
    # What NxDI saves it does not load, also while every file is still there: vllm-neuron would compile again.
    assert "appears more than once" in json.loads(nxdi(LOAD, tmp_path / "compiled"))

    shutil.rmtree(tmp_path / "first")
    (tmp_path / "lora.json").unlink()
    second = {"tuned": adapter, "base": tmp_path / "second/base"}
    write_zero_adapter(adapter, second["base"])
    name_adapters_in_compiled(tmp_path / "compiled", second)
    on_device, on_host, modules = json.loads(nxdi(LOAD, tmp_path / "compiled"))
    assert on_device == on_host == {name: str(folder) for name, folder in second.items()}
    assert set(modules) == {"q_proj", "k_proj", "v_proj"}
