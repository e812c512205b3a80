"""Load a run's base model and adapter with NxD's own LoRA: torchrun … load_adapter.py, in the run's folder.

Its logits must equal those of our layers with the same adapter.
"""

import os

import neuronx_distributed as nxd
import torch
import torch.distributed as dist
from neuronx_distributed.modules.lora import LoraConfig, LoraModel

from trnlora import paths
from trnlora.backends import nxd as backend
from trnlora.backends import nxd_training
from trnlora.model.config import ModelConfig
from trnlora.model.decoder import DecoderLM
from trnlora.model.lora import add_lora
from trnlora.params import load_params
from trnlora.weights.storage import LORA_TAG, PRETRAINED_TAG, load_rank, rank_file

params = load_params()
dist.init_process_group("gloo")
nxd_training.create_groups(params)
config = ModelConfig.from_folder(paths.MODEL)


def base_model() -> DecoderLM:
    model = DecoderLM.empty(
        config, backend.NxdBackend(params.neuron, torch.float32), params.convert.kv_size_multiplier
    ).to_empty(device="cpu")
    nxd.load_checkpoint(str(paths.SHARDS), tag=PRETRAINED_TAG, model=model, strict=True)
    return model.eval()


def logits(model: DecoderLM) -> torch.Tensor:
    ids = torch.arange(24)[None]
    with torch.no_grad():
        return model.logits(model(ids, ids, torch.ones_like(ids)))


model = base_model()
plain = logits(model)
adapter = LoraModel(
    model,
    LoraConfig(
        load_lora_from_ckpt=True,
        lora_save_dir=str(paths.LORA_SHARDS.absolute()),  # NxD prepends the folder to a file's name twice
        lora_load_tag=f"{LORA_TAG}/model",
        merge_sharded_lora=False,
    ),
)
# LoraModel.load_state_dict could take base and adapter in one call, but it raises for every key of the base that is
# missing from the adapter.
adapter.is_base_model_loaded = True
assert not adapter.load_lora_adapter().unexpected_keys

stored = load_rank(rank_file(paths.LORA_SHARDS, LORA_TAG, int(os.environ["RANK"])))
loaded = adapter.state_dict()
assert loaded.keys() == stored.keys(), sorted(loaded.keys() ^ stored.keys())
assert all(loaded[name].equal(tensor) for name, tensor in stored.items())
assert all(tensor.any() for tensor in stored.values())

ours = base_model()
add_lora(ours, params.lora)
with torch.no_grad():
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(stored[name])
found, expected = logits(model.eval()), logits(ours)
assert (expected - plain).abs().max() > 1e-3
assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
