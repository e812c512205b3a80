"""params.yaml is valid. Invalid ones are refused in one line."""

import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from support import ROOT

from trnlora.data.source_files import data_sources
from trnlora.errors import UserError
from trnlora.model.targets import TARGETS
from trnlora.params import TargetModule, check_params, load_params
from trnlora.profiles import load_profile, profile_values
from trnlora.sources import parse_source
from trnlora.weights.nxd_layout import check_divisible

# https://huggingface.co/meta-llama/Meta-Llama-3-8B, config.json
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


def test_is_valid() -> None:
    params = load_params(ROOT / "params.yaml")
    parse_source(params.model.source)
    for source in data_sources(params.data):
        parse_source(source.source)


def test_params_is_the_default_profile() -> None:
    same = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "params.yaml"], cwd=ROOT, capture_output=True)
    if same.returncode:
        pytest.skip("params.yaml differs from the commit's, or this is not a Git repository")
    assert (ROOT / "params.yaml").read_text("utf-8") == (ROOT / "profiles/smollm2-135m-cpu.yaml").read_text("utf-8")


def test_params_name_the_targets_that_the_table_has() -> None:
    assert set(get_args(TargetModule)) == {*TARGETS, "qkv_proj"}


def test_trn2_profile_divides_llama3_8b() -> None:
    params = load_profile("llama3-8b-trn2-nxd", ROOT / "profiles")
    check_divisible(LLAMA3_8B, params.convert)
    assert params.convert.tp_size * params.train.dp_size == 64  # logical cores of a trn2.48xlarge


@pytest.mark.parametrize(
    ("section", "key", "value", "line"),
    [
        ("lora", "share_a", False, r"lora\.share_a: false is not supported on nxd"),
        ("model", "dtype", "float16", r"model\.dtype: float16 is not supported on Trainium"),
        (
            "neuron",
            "instance",
            "trn1.32xlarge",
            r"instance trn1\.32xlarge does not fit convert\.hw_backend trn2",
        ),
        ("neuron", "instance", "trn3-gen1-server", r"neuron\.instance trn3-gen1-server needs backend: neuron"),
        (
            "neuron",
            "instance",
            "trn2.3xlarge",
            r"is 64 ranks, which AWS does not support on trn2\.3xlarge: choose them for 1, 4$",
        ),
        (
            "neuron",
            "instance",
            "trn2.48xl",
            r"neuron\.instance: Input should be 'trn1\.2xlarge', 'trn1\.32xlarge', 'trn2\.3xlarge'",
        ),
    ],
)
def test_what_nxd_does_not_have_is_refused(section: str, key: str, value: Any, line: str) -> None:
    values = profile_values("llama3-8b-trn2-nxd", ROOT / "profiles")
    values[section][key] = value
    with pytest.raises(UserError, match=line):
        check_params(values, ROOT / "params.yaml")


@pytest.mark.parametrize(
    ("section", "change", "line"),
    [
        # The bounds of single keys are in tests/test_bad_input.py.
        (
            "train",
            {"global_batch_size": 3, "micro_batch_size": 2},
            "must be a multiple of micro_batch_size × dp_size = 2",
        ),
        (
            "train",
            {"schedule": "wsd", "warmup_ratio": 0.9},
            "schedule wsd: warmup_ratio 0.9 + decay_ratio 0.2 must be at most 1",
        ),
        ("data", {"seq_len": 1024}, "must be above data.seq_len 1024"),
        ("model", {"sha256": "abc"}, "model.sha256"),
    ],
)
def test_is_refused_in_one_line(tmp_path: Path, section: str, change: dict[str, Any], line: str) -> None:
    values = yaml.safe_load((ROOT / "profiles/smollm2-135m-cpu.yaml").read_text("utf-8"))
    values[section] |= change
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    with pytest.raises(UserError) as refusal:
        load_params(path)
    assert line in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_backend_neuron_needs_trn2(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "profiles/smollm2-135m-cpu.yaml").read_text("utf-8"))
    values["convert"] |= {"hw_backend": "trn1", "tp_size": 1}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values | {"backend": "neuron"}), "utf-8")
    with pytest.raises(UserError, match=r"backend: neuron .* needs convert.hw_backend trn2; trn1 has nxd only"):
        load_params(path)


def test_a_missing_key_or_file_is_named(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "profiles/smollm2-135m-cpu.yaml").read_text("utf-8"))
    del values["eval"]["max_tokens"]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    with pytest.raises(UserError, match=r"eval\.max_tokens is missing"):
        load_params(path)
    with pytest.raises(UserError, match="run from the project's root"):
        load_params(tmp_path / "absent.yaml")
    path.write_text("train: [", "utf-8")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_params(path)
