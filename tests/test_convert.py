"""The files of the conversion stage: golden digests, reverse conversion, dtypes, kills, a full disk."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.models import FAMILIES
from support.sharded import conversion
from test_layout import CASES, GOLDEN, case_name, golden_weights, llama

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import Convert
from trnlora.weights.convert import check_space, write_hf_folder, write_shards
from trnlora.weights.storage import PRETRAINED_TAG, load_rank, rank_file, save_rank

ROOT = Path(__file__).parent.parent

# Every layout of the tiny Llama: 6 heads, 3 KV heads.
LAYOUTS = [
    conversion(tp, multiplier, hw_backend)
    for hw_backend, tp, multiplier in (
        ("trn2", 1, 1),
        ("trn2", 3, 1),
        ("trn2", 2, 2),
        ("trn2", 6, 2),
        ("trn1", 3, 1),
        ("trn1", 6, 2),
    )
]


def layout_name(convert: Convert) -> str:
    return f"{convert.hw_backend}-tp{convert.tp_size}x{convert.kv_size_multiplier}"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_golden_digests_in_files(case: dict[str, Any], tmp_path: Path) -> None:
    config = llama(**GOLDEN["configs"][case["config"]])
    convert = conversion(case["tp"], case["kv_size_multiplier"], case["hw_backend"])
    (tmp_path / "model").mkdir()
    save_file(golden_weights(config), tmp_path / "model" / "model.safetensors")
    write_shards(tmp_path / "model", tmp_path / "shards", config, convert)
    for rank, expected in enumerate(case["ranks"]):
        path = rank_file(tmp_path / "shards", PRETRAINED_TAG, rank)
        assert str(path).endswith(expected["file"])
        tensors = torch.load(path, weights_only=True)  # as NxD reads it: no mmap
        assert tensors.keys() == expected["tensors"].keys()
        for name, tensor in tensors.items():
            assert str(tensor.dtype) == expected["tensors"][name]["dtype"]
            assert list(tensor.shape) == expected["tensors"][name]["shape"]
            assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == expected["tensors"][name]["sha256"], name


@pytest.mark.parametrize("convert", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reverse_conversion_is_exact(convert: Convert, dtype: torch.dtype, tiny_llama: Path, tmp_path: Path) -> None:
    """From every layout and dtype, with tied embeddings: gives the bytes of the HF folder again."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors")
    config = ModelConfig.from_folder(model)
    write_shards(model, tmp_path / "shards", config, convert)
    shard = load_rank(rank_file(tmp_path / "shards", PRETRAINED_TAG, 0))
    assert {tensor.dtype for tensor in shard.values()} == {dtype}
    write_hf_folder(tmp_path / "shards", model, tmp_path / "back", config, convert)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("convert", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted_back_exactly(
    family: str, convert: Convert, family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = family_model(family)
    config = ModelConfig.from_folder(model)
    write_shards(model, tmp_path / "shards", config, convert)
    write_hf_folder(tmp_path / "shards", model, tmp_path / "back", config, convert)
    tensors, back = load_file(model / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_an_indexed_folder_is_written_and_gives_the_same_shards(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, convert = ModelConfig.from_folder(tiny_llama), conversion(3, 1)
    write_shards(tiny_llama, tmp_path / "whole", config, convert)
    monkeypatch.setattr("trnlora.weights.storage.MAX_FILE_BYTES", 400_000)
    write_hf_folder(tmp_path / "whole", tiny_llama, tmp_path / "cut", config, convert)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    write_shards(tmp_path / "cut", tmp_path / "again", config, convert)
    for rank in range(3):
        first, second = (load_rank(rank_file(tmp_path / name, PRETRAINED_TAG, rank)) for name in ("whole", "again"))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_shards_of_the_stock_converter_for_trn2_are_recognised(tiny_llama: Path, tmp_path: Path) -> None:
    """NxD's converter writes these for trn2 with a multiplier: queries in order, but K and V in rounds."""
    config, convert = ModelConfig.from_folder(tiny_llama), conversion(6, 2)
    for hw_backend in ("trn1", "trn2"):
        write_shards(tiny_llama, tmp_path / hw_backend, config, conversion(6, 2, hw_backend))
    for rank in range(6):
        grouped, rounds = (load_rank(rank_file(tmp_path / name, PRETRAINED_TAG, rank)) for name in ("trn2", "trn1"))
        stock = {
            name: (rounds if name.endswith(("weight_k", "weight_v")) else grouped)[name].clone() for name in grouped
        }
        save_rank(rank_file(tmp_path / "stock", PRETRAINED_TAG, rank), stock)
    with pytest.raises(
        UserError, match=r"in trn1's order, but convert\.hw_backend is trn2: NxD's converter writes such"
    ):
        write_hf_folder(tmp_path / "stock", tiny_llama, tmp_path / "back", config, convert)
    assert not (tmp_path / "back").exists()


def test_copies_that_differ_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    config, convert = ModelConfig.from_folder(tiny_llama), conversion(3, 1)
    write_shards(tiny_llama, tmp_path / "shards", config, convert)
    path = rank_file(tmp_path / "shards", PRETRAINED_TAG, 2)
    shard = {name: tensor.clone() for name, tensor in load_rank(path).items()}
    shard["model.norm.weight"].add_(1)
    save_rank(path, shard)
    with pytest.raises(UserError, match=r"different copies of model\.norm\.weight"):
        write_hf_folder(tmp_path / "shards", tiny_llama, tmp_path / "back", config, convert)
    assert not (tmp_path / "back").exists()


def test_too_little_space_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    with pytest.raises(UserError, match=r"needs 15\.0 GiB and its disk has 1\.0 GiB free"):
        check_space(tmp_path / "shards", 15 * 2**30)


@pytest.mark.long
def test_kill_9_leaves_no_shard_under_a_final_name(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Kill the stage at random moments, then rerun it: the digests are those of an undisturbed run."""
    (tmp_path / "artifacts").mkdir()
    make_llama(
        tmp_path / "artifacts" / "model", hidden_size=768, intermediate_size=3072, num_hidden_layers=8, head_dim=128
    )
    params = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    # This random model has logits in the hundreds: float32 rounds them by more than the default tolerance.
    params["convert"].update(tp_size=3, kv_size_multiplier=1, buffer_mib=1, max_logits_diff=0.01)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    shards = tmp_path / "artifacts" / "shards"

    def start() -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "stages" / "convert_nxd.py")]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)

    def digests() -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(shards.rglob("*.pt"))}

    started = time.monotonic()
    assert start().wait(timeout=120) == 0
    seconds = time.monotonic() - started
    clean = digests()
    assert len(clean) == 3
    moments = random.Random(0)
    for _ in range(10):
        shutil.rmtree(shards, ignore_errors=True)
        process = start()
        # imports take most of the time, so half of the kills are in the last third
        time.sleep(seconds * moments.choice([moments.uniform(0.1, 1.0), moments.uniform(0.66, 1.0)]))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        assert digests() in ({}, clean)  # all final names or none
    assert start().wait(timeout=120) == 0
    assert digests() == clean
    assert not list((tmp_path / "artifacts").glob(".*.partial"))
