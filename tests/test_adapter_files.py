"""Adapters' files, PEFT's and NxD's: what no reader takes. The model is a config.json; tensors are zeros."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import lora_params
from support.headers import header_of, write_safetensors
from support.records import write_record
from support.sharded import conversion

from trnlora.errors import UserError
from trnlora.files import write_json, write_sums
from trnlora.model.config import ModelConfig
from trnlora.model.targets import adapter_tensors, nxd_adapter_config, rank_shapes
from trnlora.serving.adapters import check_adapter, check_own_adapter
from trnlora.weights.adapter_shards import load_adapter_shards
from trnlora.weights.convert import write_hf_folder
from trnlora.weights.nxd_layout import shard_shapes
from trnlora.weights.peft_export import peft_adapter_config
from trnlora.weights.peft_folder import check_init_adapter
from trnlora.weights.storage import LORA_TAG, PRETRAINED_TAG, rank_file, save_rank

MODEL = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
CONFIG = ModelConfig.from_hf(MODEL)
LORA = lora_params(r=2, lora_alpha=4)
SHAPES = {key: tensor.shape for tensor in adapter_tensors(CONFIG, LORA) for key in tensor.peft_keys}
QUERY_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

READERS: dict[str, Callable[[Path, Path], Any]] = {
    "served": lambda adapter, model: check_adapter(adapter, model, "other"),
    "own": lambda adapter, model: check_own_adapter(write_record(adapter, model), model, LORA, "tuned"),
    "init_adapter": lambda adapter, model: check_init_adapter(adapter, CONFIG, LORA),
}


@pytest.fixture(scope="module")
def good_config() -> dict[str, Any]:
    return peft_adapter_config(LORA, "hf://org/name@main")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(MODEL), "utf-8")
    (tmp_path / "model/model.safetensors").touch()  # its checksum is recorded
    write_sums(tmp_path / "model")
    return tmp_path / "model"


def write_adapter(folder: Path, config: Any, header: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config), "utf-8")
    write_safetensors(folder / "adapter_model.safetensors", header or header_of(SHAPES))
    return folder


def refused(reader: str, adapter: Path, model: Path) -> str:
    with pytest.raises(UserError) as refusal:
        READERS[reader](adapter, model)
    assert "\n" not in str(refusal.value)
    assert "delete" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("reader", READERS)
def test_a_good_adapter_is_read(tmp_path: Path, model: Path, good_config: dict[str, Any], reader: str) -> None:
    READERS[reader](write_adapter(tmp_path / "adapter", good_config), model)
    if reader != "own":  # PEFT's regular expression, and what other tools leave out
        expression = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
        config = good_config | {"target_modules": expression, "lora_alpha": 4.0, "alpha_pattern": None}
        del config["init_lora_weights"], config["task_type"]
        READERS[reader](write_adapter(tmp_path / "adapter", config), model)


CONFIGS: list[tuple[str, list[Any], str]] = [
    ("r", ["2", 2.0, None, 0, -2, True, [2], 3], "r"),
    ("lora_alpha", ["4", None, 0, -4, [4]], "lora_alpha"),
    ("peft_type", ["IA3", None, 5], "peft_type"),
    ("target_modules", [None, [], "", "(", 5, [["q_proj"]], {"q_proj": 1}], "target_modules"),
    ("use_rslora", ["no", None, 1], "use_rslora"),
    ("rank_pattern", [{"q_proj": 4}, {"q_proj": "4"}, [4], "x"], "rank_pattern"),
    ("alpha_pattern", [{"q_proj": "4"}, {"q_proj": 0}, [4], "x"], "alpha_pattern"),
    ("init_lora_weights", ["pissa", "olora", 5], "init_lora_weights"),
    ("use_dora", [True], "use_dora"),
    ("modules_to_save", [["lm_head"]], "modules_to_save"),
    ("layer_replication", [[[0, 1]]], "layer_replication"),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("key", "value", "message"), [(key, value, message) for key, values, message in CONFIGS for value in values]
)
def test_a_config_that_is_refused_by_all_readers(
    tmp_path: Path, model: Path, good_config: dict[str, Any], reader: str, key: str, value: Any, message: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", good_config | {key: value})
    line = refused(reader, adapter, model)
    assert "adapter_config.json" in line or key == "r"  # another rank is found by the tensors' shapes
    assert message in line or key == "r"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", ["", "[]", "5", "null", "{", "{}", "[" * 9999])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, model: Path, reader: str, content: str) -> None:
    line = refused(reader, write_adapter(tmp_path / "adapter", content), model)
    assert f"{tmp_path}/adapter/adapter_config.json" in line


def test_the_own_adapter_has_the_scale_of_the_params(tmp_path: Path, model: Path, good_config: dict[str, Any]) -> None:
    adapter = write_adapter(tmp_path / "adapter", good_config | {"lora_alpha": 8})
    assert "lora_alpha 8 and use_rslora False, but those of `lora` are 4 and False" in refused("own", adapter, model)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "int8": (
        lambda header: header[QUERY_A].update(dtype="I8", shape=[2, 16]),
        "lora_A.weight is I8, not a dense float",
    ),
    "overlap": (lambda header: header[QUERY_A].update(data_offsets=[32, 64]), "is not a valid safetensors file (inva"),
    "shape": (lambda header: header[QUERY_A].update(shape=[4, 2]), "has shape"),
    "a matrix is missing": (lambda header: header.update({"x": header.pop(QUERY_A)}), "x"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", HEADERS)
def test_weights_that_are_refused_by_all_readers(
    tmp_path: Path, model: Path, good_config: dict[str, Any], reader: str, case: str
) -> None:
    edit, message = HEADERS[case]
    header = header_of(SHAPES)
    edit(header)
    line = refused(reader, write_adapter(tmp_path / "adapter", good_config, header), model)
    assert "adapter_model.safetensors: " in line or "adapter_model.safetensors is not" in line
    assert message in line


def test_an_adapter_whose_files_do_not_agree_is_refused(
    tmp_path: Path, model: Path, good_config: dict[str, Any]
) -> None:
    """PEFT trains target_modules; vLLM applies whatever the file holds."""
    adapter = write_adapter(tmp_path / "adapter", good_config | {"target_modules": ["k_proj"]})
    line = refused("served", adapter, model)
    assert "adapter_config.json: model.layers.0.self_attn.q_proj is not among target_modules, but adapter_model" in line


# NxD's shards: of the model, for `convert_nxd.py --to-hf`, and of the adapter

Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.0.mlp.down_proj"
DENSE = "not a dense float tensor"
SHARDS: dict[str, tuple[Callable[[Tensors, str], Any], str]] = {
    "a list": (lambda tensors, name: list(tensors.values()), "is not a flat dict of tensors"),
    "nested": (lambda tensors, name: {"model": tensors}, "is not a flat dict of tensors"),
    "names are numbers": (lambda tensors, name: dict(enumerate(tensors.values())), "is not a flat dict of tensors"),
    "a string": (lambda tensors, name: tensors | {"version": "1"}, "is not a flat dict of tensors"),
    "a missing tensor": (lambda tensors, name: {k: v for k, v in tensors.items() if k != name}, "shape none, expected"),
    "another shape": (lambda tensors, name: tensors | {name: torch.ones(1, 1)}, "shape (1, 1), expected"),
    "integers": (lambda tensors, name: tensors | {name: tensors[name].to(torch.int32)}, DENSE),
    "float64": (lambda tensors, name: tensors | {name: tensors[name].double()}, DENSE),
    "float16": (lambda tensors, name: tensors | {name: tensors[name].half()}, "is torch.float16"),
    "sparse": (lambda tensors, name: tensors | {name: tensors[name].to_sparse()}, DENSE),
    "without values": (lambda tensors, name: tensors | {name: tensors[name].to("meta")}, "has no values"),
    "code": (lambda tensors, name: tensors | {"code": Path("x")}, "it is damaged, or holds more than tensors"),
}


@pytest.mark.parametrize("case", SHARDS)
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_shard_that_is_no_dict_of_dense_floats_is_refused(tmp_path: Path, model: Path, kind: str, case: str) -> None:
    edit, message = SHARDS[case]
    convert = conversion(2, 2)
    if kind == "model":
        shapes = [shard_shapes(CONFIG, convert, rank) for rank in range(2)]
    else:
        shapes = [rank_shapes(adapter_tensors(CONFIG, LORA), 2, 2)] * 2
    tag, name = (PRETRAINED_TAG, f"{DOWN}.weight") if kind == "model" else (LORA_TAG, f"{DOWN}.lora_B.weight")
    shards = tmp_path / "shards"
    for rank in range(2):
        save_rank(rank_file(shards, tag, rank), {key: torch.ones(shape) for key, shape in shapes[rank].items()})
    write_json(shards / "adapter_config.json", nxd_adapter_config(LORA))
    damaged = rank_file(shards, tag, 1)
    torch.save(edit(torch.load(damaged, weights_only=True), name), damaged)
    readers: dict[str, Callable[[], Any]] = {
        "model": lambda: write_hf_folder(shards, model, tmp_path / "hf", CONFIG, convert),
        "adapter": lambda: load_adapter_shards(shards, CONFIG, convert, LORA),
    }
    with pytest.raises(UserError) as refusal:
        readers[kind]()
    assert str(refusal.value).startswith(str(damaged))
    assert message in str(refusal.value).replace("the shape", "shape")
    assert not (tmp_path / "hf").exists()


def test_a_view_is_read_where_it_is_and_a_transposed_one_is_refused(tmp_path: Path, model: Path) -> None:
    """torch.save writes the whole storage of a view; rows are read from where the view begins."""
    convert = conversion(1, 1)
    shapes = shard_shapes(CONFIG, convert, 0)
    file, name = rank_file(tmp_path / "shards", PRETRAINED_TAG, 0), f"{DOWN}.weight"
    whole = torch.arange(2.0 * 4 * 6).view(8, 6)
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    file.parent.mkdir(parents=True)
    torch.save(tensors | {name: whole[4:]}, file)
    write_hf_folder(tmp_path / "shards", model, tmp_path / "hf", CONFIG, convert)
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "hf/model.safetensors")[name], whole[4:])
    torch.save(tensors | {name: torch.zeros(6, 4).T}, file)
    with pytest.raises(UserError, match=r"down_proj\.weight is a view of another tensor: save a contiguous copy"):
        write_hf_folder(tmp_path / "shards", model, tmp_path / "again", CONFIG, convert)
