"""Headers and indexes of weight files: what is not valid, or is not the model that config.json describes, is refused.

The files have a few bytes of data each. Their headers are written by hand, as no library writes wrong ones.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.headers import header_of, write_safetensors

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.tensors import hf_shapes
from trnlora.weights.fetch import check_tensors, check_weights
from trnlora.weights.safetensors_header import HeaderEntry, read_header
from trnlora.weights.storage import HFCheckpoint


def entry(dtype: Any = "F32", shape: Any = (4,), data_offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


TWICE = b'{"a": %b, "a": %b}' % (2 * (json.dumps(entry()).encode(),))

# Each with 16 bytes of data.
HEADERS: dict[str, tuple[Any, str]] = {
    "overlap": ({"a": entry(), "b": entry(shape=[2], data_offsets=[0, 8])}, "invalid offset for tensor"),
    "hole": ({"a": entry(shape=[1], data_offsets=[0, 4]), "b": entry(shape=[2], data_offsets=[8, 16])}, "offset"),
    "shape is longer": ({"a": entry(shape=[5])}, "invalid shape, data type, or offset"),
    "shape is shorter": ({"a": entry(shape=[3])}, "invalid shape, data type, or offset"),
    "another dtype": ({"a": entry(dtype="F16")}, "invalid shape, data type, or offset"),
    "beyond the file": ({"a": entry(shape=[5], data_offsets=[0, 20])}, r"it has \d+ bytes where its header says"),
    "data is left": ({"a": entry(shape=[1], data_offsets=[0, 4])}, r"it has \d+ bytes where its header says"),
    "reversed": ({"a": entry(data_offsets=[16, 0])}, "valid safetensors file"),
    "unknown dtype": ({"a": entry(dtype="F33")}, "unknown variant `F33`"),
    "dtype is a number": ({"a": entry(dtype=32)}, "JSON"),
    "shape of strings": ({"a": entry(shape=["4"])}, "invalid type: string"),
    "shape of floats": ({"a": entry(shape=[4.0])}, "invalid type: floating point"),
    "negative shape": ({"a": entry(shape=[-4])}, "invalid value: integer `-4`"),
    "huge shape": ({"a": entry(shape=[2**62, 8])}, "overflow"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "missing field `shape`"),
    "offsets of strings": ({"a": entry(data_offsets=["0", "16"])}, "invalid type: string"),
    "three offsets": ({"a": entry(data_offsets=[0, 16, 32])}, "invalid length 3"),
    "entry is a list": ({"a": [1, 2]}, "JSON"),
    "a name twice": (TWICE, 'the key "a" is there twice'),
    "metadata of numbers": ({"__metadata__": {"x": 1}, "a": entry()}, "expected a string"),
    "a list": ([], "invalid type: sequence"),
    "a number": (b"5", "invalid type: integer"),
    "not JSON": (b"{", "JSON"),
    "not UTF-8": (b'{"\xff": 1}', "UTF-8"),
    "deep": (b"[" * 50_000, "JSON"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_not_valid_is_refused(tmp_path: Path, case: str) -> None:
    header, message = HEADERS[case]
    path = write_safetensors(tmp_path / "x.safetensors", header, 16)
    with pytest.raises(UserError, match=message) as refusal:
        read_header(path, "org/name/model.safetensors", ": choose another")
    assert str(refusal.value).startswith("org/name/model.safetensors is not a valid safetensors file (")
    assert str(refusal.value).endswith("): choose another")


@pytest.mark.parametrize(
    "content", [b"", b"\x05", b"\xff" * 40, struct.pack("<Q", 2**40) + b"{}"], ids=["empty", "short", "ff", "huge"]
)
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        read_header(path, str(path), "")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="is missing"):
        read_header(path, str(path), "")


def test_a_valid_header_is_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, **header_of({"a": (2, 3), "b": ()}, "BF16")}
    text = json.dumps(header).encode()
    found = read_header(write_safetensors(tmp_path / "x.safetensors", text, 14), "", "")
    assert found == {"a": HeaderEntry("BF16", (2, 3), 8 + len(text)), "b": HeaderEntry("BF16", (), 20 + len(text))}


# Folders: a model of two layers in one file or two

CONFIG = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"


def model(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(CONFIG | changes)


def refused(folder: Path, config: ModelConfig) -> str:
    with pytest.raises(UserError) as refusal, HFCheckpoint(folder, "org/name", ": choose another") as checkpoint:
        check_tensors(checkpoint, config)
    assert str(refusal.value).startswith("org/name")
    assert str(folder) not in str(refusal.value)
    return str(refusal.value)


Shapes = dict[str, tuple[int, ...]]
TENSORS: dict[str, tuple[Callable[[Shapes], Any], str]] = {
    "missing": (lambda shapes: shapes.pop(UP), f"org/name has no tensor {UP}, which its config.json says"),
    "renamed": (lambda shapes: shapes.update({"up.weight": shapes.pop(UP)}), f"has no tensor {UP}"),
    "another shape": (lambda shapes: shapes.update({UP: (4, 6)}), "has the shape (4, 6), its config.json says (6, 4)"),
    "fewer dimensions": (lambda shapes: shapes.update({UP: (24,)}), "has the shape (24,)"),
    "a layer more": (
        lambda shapes: shapes.update({"model.layers.2.mlp.up_proj.weight": (6, 4)}),
        "model.layers.2.mlp.up_proj.weight (1 such tensors) does not belong to the model",
    ),
    "a bias": (lambda shapes: shapes.update({"model.layers.0.self_attn.q_proj.bias": (4,)}), "q_proj.bias (1 such"),
    "a scale": (lambda shapes: shapes.update({f"{UP}_scale": (1,)}), "up_proj.weight_scale (1 such tensors)"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_weights_that_are_not_the_configs_are_refused(tmp_path: Path, case: str) -> None:
    edit, message = TENSORS[case]
    shapes = hf_shapes(model())
    edit(shapes)
    write_safetensors(tmp_path / "model.safetensors", header_of(shapes))
    assert message in refused(tmp_path, model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight (9 such tensors) does not belong"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2.input_layernorm.weight"),
        ({"tie_word_embeddings": True}, ""),  # its lm_head is compared with the embeddings later
        ({"vocab_size": 9}, "model.embed_tokens.weight has the shape (8, 4), its config.json says (9, 4)"),
        ({"num_key_value_heads": 2}, "k_proj.weight has the shape (2, 4), its config.json says (4, 4)"),
        ({"model_type": "qwen2"}, "has no tensor model.layers.0.self_attn.q_proj.bias"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_that_is_not_the_weights_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", header_of(hf_shapes(model())))
    if message:
        assert message in refused(tmp_path, model(**changes))
    else:
        with HFCheckpoint(tmp_path) as checkpoint:
            check_tensors(checkpoint, model(**changes))


@pytest.mark.parametrize("dtype", ["I32", "F64"])
def test_tensors_that_are_no_dense_floats_are_refused(tmp_path: Path, dtype: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", header_of(hf_shapes(model()), dtype))
    assert f"model.safetensors: model.embed_tokens.weight is {dtype}, not a dense float" in refused(tmp_path, model())


def test_parts_of_one_layer_in_two_dtypes_are_refused(tmp_path: Path) -> None:
    shapes = hf_shapes(model())
    write_safetensors(tmp_path / ONE, header_of({UP: shapes.pop(UP)}, "F16"))
    write_safetensors(tmp_path / TWO, header_of(shapes))
    weight_map = {UP: ONE} | dict.fromkeys(shapes, TWO)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    line = refused(tmp_path, model())
    assert f"{UP} is torch.float16 and another part of its layer torch.float32: save the model in one dtype" in line


def test_buffers_of_early_llamas_and_a_copy_of_tied_embeddings_are_accepted(tmp_path: Path) -> None:
    config = model(tie_word_embeddings=True)
    more = {"model.layers.1.self_attn.rotary_emb.inv_freq": (1,), "lm_head.weight": (8, 4)}
    path = write_safetensors(tmp_path / "model.safetensors", header_of(hf_shapes(config) | more))
    assert check_weights(tmp_path, config, "org/name") == sum(
        rows * (columns[0] if columns else 1) for rows, *columns in hf_shapes(config).values()
    )
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", 1.0))  # the last value of lm_head
    with pytest.raises(
        UserError, match=r"^org/name: lm_head\.weight differs from model\.embed_tokens\.weight, but its"
    ):
        check_weights(tmp_path, config, "org/name")


WeightMap = dict[str, Any]
INDEXES: dict[str, tuple[Callable[[WeightMap], Any], str]] = {
    "a list": (lambda names: [], "it must hold keys and values"),
    "no weight_map": (lambda names: {}, "lists no weights in weight_map"),
    "null": (lambda names: {"weight_map": None}, "lists no weights in weight_map"),
    "empty": (lambda names: {"weight_map": {}}, "lists no weights in weight_map"),
    "list of names": (lambda names: {"weight_map": [ONE]}, "lists no weights in weight_map"),
    "a number": (lambda names: {"weight_map": names | {UP: 5}}, f"has 5 for {UP}, not the name of a safetensors"),
    "a path": (lambda names: {"weight_map": names | {UP: f"../{ONE}"}}, f"has '../{ONE}' for {UP}"),
    "an absolute path": (lambda names: {"weight_map": names | {UP: "/etc/passwd"}}, "has '/etc/passwd' for"),
    "another suffix": (lambda names: {"weight_map": names | {UP: "model.bin"}}, "has 'model.bin' for"),
    "the other file": (lambda names: {"weight_map": names | {UP: TWO}}, f"{TWO} has no tensor {UP}, which its"),
    "no such tensor": (lambda names: {"weight_map": names | {"ghost": TWO}}, f"{TWO} has no tensor ghost"),
    "no such file": (lambda names: {"weight_map": names | {UP: "gone.safetensors"}}, "gone.safetensors is missing, wh"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_is_not_that_of_its_files_is_refused(tmp_path: Path, case: str) -> None:
    edit, message = INDEXES[case]
    shapes = hf_shapes(model())
    first = {name: shapes.pop(name) for name in (UP, "model.norm.weight")}
    write_safetensors(tmp_path / ONE, header_of(first))
    write_safetensors(tmp_path / TWO, header_of(shapes))
    index = edit(dict.fromkeys(first, ONE) | dict.fromkeys(shapes, TWO))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert message in refused(tmp_path, model())


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    shapes = hf_shapes(model())
    write_safetensors(tmp_path / ONE, header_of({UP: shapes[UP]}))
    write_safetensors(tmp_path / TWO, header_of(shapes))
    weight_map = dict.fromkeys(shapes, TWO) | {UP: ONE}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    assert f"{TWO}: {UP} is in {ONE} too" in refused(tmp_path, model())
