"""The trainer on both backends from the same shards: `cpu`, and `nxd` with the real NxD on a CPU.

NxD is not in requirements.lock. Without it, these tests are skipped. To run them:

    git clone https://github.com/aws-neuron/neuronx-distributed nxd              (fbac349, Neuron SDK 2.29, was used)
    pip install --no-deps --target nxd-site boto3 botocore s3transfer jmespath tenacity \\
        transformers==4.48.0 tokenizers==0.21.4 huggingface-hub==0.36.0
    NXD_SOURCE=$PWD/nxd/src NXD_SITE=$PWD/nxd-site .venv/bin/pytest tests/neuron
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
REHEARSAL = Path(__file__).parent / "rehearsal"

pytestmark = pytest.mark.long

STEPS = 10
QKV = ["qkv_proj"]
RANKS = {"trn2": 4, "trn1": 8}  # AWS supports four on trn2 only
CUTS = [("trn2", 1), ("trn2", 2), ("trn1", 1), ("trn1", 2)]  # with multiplier 2, each KV head is on two ranks


@pytest.fixture(scope="session")
def nxd_environment() -> dict[str, str]:
    """Environment variables with which a process imports the real NxD on a CPU."""
    source, site = os.environ.get("NXD_SOURCE"), os.environ.get("NXD_SITE")
    if not source or not site:
        pytest.skip(f"needs NxD's source: NXD_SOURCE=<clone>/src NXD_SITE=<its packages>, see {Path(__file__).name}")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(REHEARSAL), source, site]),
        "NXD_CPU_MODE": "1",
        "NXD_LOG_LEVEL": "error",
        "OMP_NUM_THREADS": "1",
    }


def run_stage(name: str, folder: Path, env: dict[str, str] | None = None) -> None:
    run_script(ROOT / "stages" / f"{name}.py", folder, env)


def run_script(script: Path, folder: Path, env: dict[str, str] | None = None, launcher: Sequence[str] = ()) -> None:
    command = [sys.executable, *launcher, str(script)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def write_params(folder: Path, **sections: dict[str, Any] | str) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load((path if path.exists() else ROOT / "params.yaml").read_text("utf-8"))
    for section, values in sections.items():
        params[section] = values if isinstance(values, str) else {**params[section], **values}
    path.write_text(yaml.safe_dump(params), "utf-8")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Path]) -> Callable[[int], Path]:
    """prepared(kv_heads): a folder with rows and a model of 8 heads and this number of KV heads."""
    folders: dict[int, Path] = {}

    def make(kv_heads: int) -> Path:
        if kv_heads not in folders:
            folder = folders[kv_heads] = tmp_path_factory.mktemp(f"prepared-{kv_heads}")
            (folder / "artifacts").mkdir()
            make_llama(
                folder / "artifacts" / "model", hidden_size=256, num_attention_heads=8, num_key_value_heads=kv_heads
            )
            rows = (ROOT / "data" / "tasks.jsonl").read_text("utf-8").splitlines(keepends=True)[:200]
            (folder / "rows.jsonl").write_text("".join(rows), "utf-8")
            write_params(folder, data={"source": "path://rows.jsonl", "sha256": None, "seq_len": 256})
            run_stage("prepare_data", folder)
        return folders[kv_heads]

    return make


@pytest.fixture(scope="module")
def train(
    prepared: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory, nxd_environment: dict[str, str]
) -> Callable[..., Path]:
    """train(backend, hw_backend, multiplier, dp_size, **sections): a folder after 10 steps on `backend`."""
    folders: dict[str, Path] = {}

    def run(backend: str, hw_backend: str, multiplier: int, dp_size: int = 1, **sections: dict[str, Any]) -> Path:
        key = repr((backend, hw_backend, multiplier, dp_size, sections))
        if key in folders:
            return folders[key]
        folder = tmp_path_factory.mktemp(backend) / "run"
        tp_size = RANKS[hw_backend] // dp_size
        shutil.copytree(prepared(tp_size // multiplier), folder, symlinks=True)
        neuron = {"logical_core_size": 1, "sequence_parallel": False, "selective_checkpointing": False}
        base_train = {"epochs": 9, "max_steps": STEPS, "lr": 2.0e-4, "global_batch_size": 2, "dp_size": dp_size}
        write_params(
            folder,
            backend=backend,
            convert={"hw_backend": hw_backend, "tp_size": tp_size, "kv_size_multiplier": multiplier},
            lora={"lora_dropout": 0.0, **sections.pop("lora", {})},
            train={**base_train, **sections.pop("train", {})},
            neuron={**neuron, **sections.pop("neuron", {})},
            **sections,
        )
        run_stage("convert_nxd", folder)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        # record.py changes modules in its own process, but on cpu the stage would fork its ranks from another process.
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(RANKS[hw_backend])]
        if backend == "nxd":
            env |= nxd_environment | {"NEURON_PLATFORM_TARGET_OVERRIDE": hw_backend}
            launcher = []
        (folder / "record").mkdir()
        run_script(REHEARSAL / "record.py", folder, {**env, "RECORD": str(folder / "record")}, launcher)
        folders[key] = folder
        return folder

    return run


def curve(folder: Path, name: str) -> list[float]:
    with (folder / f"plots/training/plots/metrics/train/{name}.tsv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file, delimiter="\t")]


def adapter(folder: Path) -> list[dict[str, torch.Tensor]]:
    files = sorted((folder / "artifacts/lora_adapter/lora/model").iterdir())
    return [torch.load(file, weights_only=True) for file in files]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics/finetune_lora.json").read_text("utf-8"))


def records(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "record").iterdir())  # one per rank
    return [torch.load(file, weights_only=True) for file in files]


def assert_same_run(found: Path, expected: Path) -> None:
    """Both runs have the same logits, adapter and, for every step, loss, gradients, gradient norm and learning rate."""
    print()
    worst = {"logits": 0.0, "weights": 0.0, "lora_A": 0.0, "lora_B": 0.0}
    for one, other in zip(records(found), records(expected), strict=True):
        worst["logits"] = max(worst["logits"], (one["logits"] - other["logits"]).abs().max().item())
        assert len(one["steps"]) == STEPS
        for step, other_step in zip(one["steps"], other["steps"], strict=True):
            for name, gradient in other_step["gradients"].items():
                weight = other_step["weights"][name]
                worst["weights"] = max(worst["weights"], (step["weights"][name] - weight).abs().max().item())
                difference = (step["gradients"][name] - gradient).abs().max().item()
                if largest := gradient.abs().max().item():
                    kind = "lora_A" if ".lora_A." in name else "lora_B"
                    worst[kind] = max(worst[kind], difference / largest)
                else:
                    assert difference == 0, f"{name} has no gradient while lora_B is 0"
    print(f"logits differ by {worst['logits']:.1e}")
    print(f"gradients differ by {worst['lora_A']:.1e} (A), {worst['lora_B']:.1e} (B) of the largest in their tensor")
    print(f"adapters during the run differ by {worst['weights']:.1e}")
    assert worst["logits"] < 1e-4  # the logits are up to 15
    assert worst["lora_A"] < 1e-4
    assert worst["lora_B"] < 1e-4
    assert worst["weights"] < 1e-5

    for name in ("loss", "grad_norm", "lr"):
        a, b = curve(found, name), curve(expected, name)
        print(f"{name} differs by {max(abs(x - y) for x, y in zip(a, b, strict=True)):.1e}")
        assert len(a) == STEPS
        assert a == pytest.approx(b, abs=2e-5, rel=1e-5), name
    shards = adapter(expected)
    assert [sorted(shard) for shard in adapter(found)] == [sorted(shard) for shard in shards]
    worst_value = 0.0
    for one, other in zip(adapter(found), shards, strict=True):
        for key, tensor in one.items():
            assert (tensor.dtype, tensor.shape) == (torch.float32, other[key].shape)
            assert tensor.any()
            worst_value = max(worst_value, (tensor - other[key]).abs().max().item())
    print(f"saved adapters differ by {worst_value:.1e}")
    assert worst_value < 1e-5
    losses = ("base_validation_loss", "validation_loss", "train_loss")
    one_run, other_run = metrics(found), metrics(expected)
    for name in losses:
        assert one_run.pop(name) == pytest.approx(other_run.pop(name), abs=1e-5)
    assert one_run == other_run


@pytest.mark.parametrize("targets", [QKV, "all-linear"], ids=str)
@pytest.mark.parametrize(("hw_backend", "multiplier"), CUTS)
def test_ten_steps_equal_the_torch_backend(
    train: Callable[..., Path], hw_backend: str, multiplier: int, targets: list[str] | str
) -> None:
    lora = {"target_modules": targets}
    found = train("nxd", hw_backend, multiplier, lora=lora)
    assert_same_run(found, train("cpu", hw_backend, multiplier, lora=lora))
    run_stage("flatten_adapter", found)  # HF + PEFT have the loss that the nxd backend measured


def test_the_best_adapter_is_kept_and_training_stops_early(train: Callable[..., Path]) -> None:
    """The learning rate rises until the training diverges, so that an earlier adapter is the best one."""
    options = {
        "lr": 1.0, "warmup_ratio": 1.0, "validate_every_steps": 1, "keep": "best", "early_stopping_patience": 2
    }  # fmt: skip
    found, expected = (metrics(train(backend, "trn2", 1, train=options)) for backend in ("nxd", "cpu"))
    assert found["stopped_early"]
    assert found["kept_step"] == found["steps"] - 2
    for key in ("kept_step", "steps"):
        assert found[key] == expected[key], key
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-3)
    run_stage("flatten_adapter", train("nxd", "trn2", 1, train=options))  # HF + PEFT have the loss of the kept adapter


def test_some_of_the_fused_layers_targets(train: Callable[..., Path]) -> None:
    """Of q, k and v, and of gate and up, only some are trained: NxD's layers have the others too."""
    lora = {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True}
    assert_same_run(train("nxd", "trn2", 2, lora=lora), train("cpu", "trn2", 2, lora=lora))


@pytest.mark.parametrize("targets", [QKV, "all-linear"], ids=str)
def test_sequence_parallelism_and_recomputed_attention_change_nothing(
    train: Callable[..., Path], targets: list[str] | str
) -> None:
    """NxD's own LoRA does not sum the gradients of whole weights over the ranks here: each rank would train its own."""
    both, lora = {"sequence_parallel": True, "selective_checkpointing": True}, {"target_modules": targets}
    found = train("nxd", "trn2", 2, neuron=both, lora=lora)
    assert_same_run(found, train("cpu", "trn2", 2, lora=lora))
    plain = train("nxd", "trn2", 2, lora=lora)
    for recomputed, once in zip(records(found), records(plain), strict=True):
        assert recomputed["attentions"] - once["attentions"] == STEPS * 2 * 2  # micro-batches per step, layers


def test_two_replicas_with_dropout(train: Callable[..., Path]) -> None:
    """dp 2 × tp 2, each KV head on both ranks. Both backends draw the same dropout; replicas draw different ones."""
    # On q, k and v only: in the last layer, the torch backend computes what follows them for labelled tokens alone, so
    # that its masks there have another shape.
    dropout = {"lora_dropout": 0.05, "target_modules": QKV}
    assert_same_run(train("nxd", "trn2", 2, 2, lora=dropout), train("cpu", "trn2", 2, 2, lora=dropout))


def test_the_profiles_shape(train: Callable[..., Path]) -> None:
    """As in profiles/llama3-8b-trn2-nxd.yaml: replicas, KV head copies, sequence parallelism, recomputation."""
    both = {"sequence_parallel": True, "selective_checkpointing": True}
    lora = {"target_modules": "all-linear"}
    assert_same_run(train("nxd", "trn2", 2, 2, neuron=both, lora=lora), train("cpu", "trn2", 2, 2, lora=lora))


@pytest.mark.parametrize("targets", [QKV, "all-linear"], ids=str)
def test_nxd_loads_the_adapter_that_the_torch_backend_saved(
    train: Callable[..., Path], nxd_environment: dict[str, str], targets: list[str] | str
) -> None:
    """With NxD's own LoRA layers, which then compute the same logits as ours."""
    env = nxd_environment | {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"}
    folder = train("cpu", "trn2", 2, lora={"target_modules": targets})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--rdzv-backend=c10d"]
    done = subprocess.run(
        [*command, "--rdzv-endpoint=127.0.0.1:0", str(REHEARSAL / "load_adapter.py")],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_shards_of_the_other_hardware_are_refused(
    train: Callable[..., Path], nxd_environment: dict[str, str], tmp_path: Path
) -> None:
    """NxD takes its KV groups from the hardware it runs on: trn1's shards would train with mixed gradients on trn2."""
    folder = tmp_path / "run"
    shutil.copytree(train("cpu", "trn1", 2, lora={"target_modules": QKV}), folder, symlinks=True)
    write_params(folder, backend="nxd")
    env = nxd_environment | {"NEURON_PLATFORM_TARGET_OVERRIDE": "trn2"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "stages/finetune_lora.py")],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "NxD adds KV gradients over the ranks [(0, 1), (2, 3), (4, 5), (6, 7)], equal heads are on" in done.stderr
