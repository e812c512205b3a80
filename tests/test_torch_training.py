"""The model that the training on a CPU builds: what it uses, by processes."""

from pathlib import Path
from typing import Any

from support import ROOT
from support.ranks import in_ranks
from support.sharded import conversion, shards_of
from torch.distributed.device_mesh import init_device_mesh

from trnlora.backends.frozen_linear import ROW_MULTIPLE, library_of_products
from trnlora.backends.torch import ProcessGroup, _ParallelLinear
from trnlora.backends.torch_training import build_model
from trnlora.model.config import ModelConfig
from trnlora.profiles import load_profile
from trnlora.weights.storage import PRETRAINED_TAG, rank_file, save_rank

RANKS = 3


def build(rank: int, folder: Path) -> dict[str, Any]:
    """What the models of some params use."""
    profile = load_profile("smollm2-135m-cpu", ROOT / "profiles")
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data_parallel", "tensor_parallel"))
    variants: dict[str, dict[str, dict[str, Any]]] = {
        "default": {},
        "dropout": {"lora": {"lora_dropout": 0.1}},
        "bfloat16": {"model": {"dtype": "bfloat16"}},
    }
    found = {}
    for name, sections in variants.items():
        changed = {section: getattr(profile, section).model_copy(update=values) for section, values in sections.items()}
        params = profile.model_copy(update={**changed, "convert": conversion(RANKS, 1)})
        kv_groups = [[rank] for rank in range(RANKS)]
        model = build_model(mesh, params, ModelConfig.from_folder(folder), folder / "shards", kv_groups)
        group = model.backend.tp_group  # type: ignore[attr-defined]
        assert isinstance(group, ProcessGroup)
        base = [
            layer for path, layer in model.named_modules() if isinstance(layer, _ParallelLinear) and "lora_" not in path
        ]
        found[name] = {
            "base layers": len(base),
            "packed": sum(layer.packed is not None for layer in base),
            "their parameters": sum(len(list(layer.parameters())) for layer in base),
            "only needed tokens": model.only_needed_tokens,
            "their multiple": model.row_multiple,
            "shared memory": group.shared is not None,
        }
    return found


def test_a_rank_packs_shares_memory_and_computes_only_what_is_needed(tiny_llama: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_folder(tiny_llama)
    (tmp_path / "config.json").symlink_to(tiny_llama / "config.json")
    for rank, shard in enumerate(shards_of(tiny_llama, config, conversion(RANKS, 1))):
        file = rank_file(tmp_path / "shards", PRETRAINED_TAG, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_rank(file, shard)
    layers = 4 * config.num_hidden_layers + 1
    packed = layers if library_of_products() == "oneDNN" else 0
    unpacked_parameters = 6 * config.num_hidden_layers + 1  # q, k and v have one each
    for found in in_ranks(RANKS, build, tmp_path):
        assert found["default"] == {
            "base layers": layers,
            "packed": packed,
            "their parameters": 0 if packed else unpacked_parameters,
            "only needed tokens": True,
            "their multiple": ROW_MULTIPLE if packed else 1,
            "shared memory": True,
        }
        assert found["dropout"] == found["default"] | {"only needed tokens": False}
        assert found["bfloat16"] == found["default"] | {
            "packed": 0, "their parameters": unpacked_parameters, "their multiple": 1,
        }  # fmt: skip
