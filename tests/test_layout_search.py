"""The model of a step's time against published measurements, and the search that ranks layouts by it."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import Params, check_params
from trnlora.preflight import step_time as model
from trnlora.preflight.collectives import Collective
from trnlora.preflight.instances import INSTANCES, USABLE, core_memory, instance_of
from trnlora.preflight.layout_search import layout_key, search
from trnlora.preflight.plan import GIB, make_plan
from trnlora.preflight.step_time import collective_time, step_time
from trnlora.profiles import load_profile, profile_values
from trnlora.readers import read_json

LLAMA = ModelConfig.from_hf(read_json(ROOT / "profiles/configs/Llama-3.1-8B.json"))
TINYLLAMA = dataclasses.replace(
    LLAMA, num_hidden_layers=22, hidden_size=2048, intermediate_size=5632, num_key_value_heads=4, head_dim=64,
    vocab_size=32000,
)  # fmt: skip


def config_of(params: Params) -> ModelConfig:
    name = params.model.source.partition("@")[0].rpartition("/")[2]
    return ModelConfig.from_hf(read_json(ROOT / "profiles/configs" / f"{name}.json"))


def profile(name: str) -> tuple[Params, ModelConfig]:
    params = load_profile(name, ROOT / "profiles")
    return params, config_of(params)


@dataclasses.dataclass(frozen=True)
class Published:
    """A run of alpharomercoma/torchneuronx: LoRA of rank 16 on all linear layers, torch_xla with NxD and its flash
    attention, one row per micro-batch and 8 per step, trn{1,2}/results/{train,extras}/*.json and .telemetry.csv.
    """

    instance: str
    tp_size: int
    seq_len: int
    tokens_per_second: float
    device_gib: float | None = None  # of one core, as neuron-monitor reported it
    recompute: bool = True
    config: ModelConfig = LLAMA

    def params(self) -> Params:
        values = profile_values("llama3-8b-trn2-nxd", ROOT / "profiles")
        trn1 = self.instance.startswith("trn1")
        values["convert"] |= {"hw_backend": "trn1" if trn1 else "trn2", "tp_size": self.tp_size}
        values["convert"]["kv_size_multiplier"] = 1
        values["train"] |= {"dp_size": 1, "global_batch_size": 8}
        values["data"]["seq_len"] = self.seq_len
        values["serve"]["max_model_len"] = 16384
        values["neuron"] |= {
            "instance": self.instance, "logical_core_size": 1 if trn1 else 2, "sequence_parallel": False,
        }  # fmt: skip
        params = check_params(values, Path("params.yaml"))
        # Whole layers are recomputed there, which this project's nxd does not do.
        train = params.train.model_copy(update={"activation_checkpointing": self.recompute})
        return params.model_copy(update={"train": train})


FITTED = [
    Published("trn2.3xlarge", 4, 2048, 3533, 5.8),
    Published("trn2.3xlarge", 4, 4096, 6878, 7.0),
    Published("trn2.3xlarge", 4, 8192, 8310, 9.8),
    Published("trn1.2xlarge", 2, 2048, 2952, 10.7),
    Published("trn1.2xlarge", 2, 4096, 3575, 14.1),
]
OTHERS = [
    Published("trn2.3xlarge", 4, 2048, 5266, 12.0, recompute=False),
    Published("trn2.3xlarge", 4, 2048, 5386, config=TINYLLAMA),
]


@pytest.mark.parametrize(("runs", "bound"), [(FITTED, 0.14), (OTHERS, 0.05)], ids=["fitted", "others"])
def test_modelled_speed_against_published_runs(runs: list[Published], bound: float) -> None:
    """docs/scale.md has the errors. OTHERS took no part in the fit."""
    for run in runs:
        params = run.params()
        instance = instance_of(params)
        assert instance is not None
        time = step_time(params, run.config, instance, attention_kernel=True)
        modelled = 8 * run.seq_len / time.total
        print(f"{run.instance} {run.seq_len}: {modelled:,.0f} ({modelled / run.tokens_per_second - 1:+.1%}), {time}")
        assert modelled == pytest.approx(run.tokens_per_second, rel=bound)


@pytest.mark.parametrize("run", [run for run in FITTED + OTHERS if run.device_gib], ids=lambda run: str(run.seq_len))
def test_planned_memory_against_published_runs(run: Published) -> None:
    """What is beside the arithmetic is at most about the share of memory that the plan leaves."""
    assert run.device_gib is not None
    planned = make_plan(run.params(), run.config, None).core_bytes / GIB
    print(f"{run.instance} {run.seq_len}: {planned:.2f} of {run.device_gib} GiB ({planned / run.device_gib:.0%})")
    assert 0.78 <= planned / run.device_gib <= 0.92


@pytest.mark.parametrize(
    "name", ["llama3-8b-trn2", "llama3.1-8b-trn2", "llama3-70b-trn2", "qwen3-8b-trn2", "mistral-7b-trn2"]
)
def test_native_profiles_have_the_layout_that_the_search_puts_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without the floor, which is unknown for native PyTorch."""
    params, config = profile(name)
    assert search(params, config)[0].key == layout_key(params)
    monkeypatch.setattr(model, "LAYER_FLOOR", 0.0)
    assert search(params, config)[0].key == layout_key(params)


@pytest.mark.parametrize("name", ["llama3-8b-trn2", "llama3-8b-trn2-nxd", "llama3-8b-trn2-3xl", "llama3-8b-trn1"])
def test_every_layout_found_is_one_that_runs(name: str) -> None:
    params, config = profile(name)
    layouts = search(params, config)
    instance = instance_of(params)
    assert instance is not None
    assert len({layout.key for layout in layouts}) == len(layouts)
    assert layout_key(params) in {layout.key for layout in layouts}
    for layout in layouts:
        found = layout.params
        assert check_params(found.model_dump(), Path("params.yaml")) == found
        assert found.train.dp_size * found.convert.tp_size in instance.ranks(params)
        assert layout.plan.core_bytes <= USABLE * core_memory(instance, found)
        assert layout.plan.tokens_per_step == params.train.global_batch_size * params.data.seq_len
        same = found.model_dump(exclude={"convert", "train", "neuron"})
        assert same == params.model_dump(exclude={"convert", "train", "neuron"})
    times = [layout.time.total for layout in layouts]
    assert times == sorted(times)


def test_no_layout_is_left_out() -> None:
    """All that fit on a trn2.3xlarge, by hand: 4 ranks (1 rank has no room for 15 GiB and activations)."""
    params, config = profile("llama3-8b-trn2-3xl")
    assert {layout.key for layout in search(params, config)} == {
        (1, 4, 1, 1, True), (1, 4, 1, 2, True), (1, 4, 1, 4, True), (2, 2, 1, 1, True), (2, 2, 1, 2, True),
    }  # fmt: skip


def test_a_search_without_a_layout_is_refused() -> None:
    params, config = profile("llama3-70b-trn2")
    small = params.model_copy(update={"neuron": params.neuron.model_copy(update={"instance": "trn2.3xlarge"})})
    with pytest.raises(UserError, match=r"no layout fits trn2\.3xlarge: shorten data\.seq_len, or name a larger"):
        search(small, config)
    with pytest.raises(UserError, match="not backend cpu"):
        search(load_profile("smollm2-135m-cpu", ROOT / "profiles"), config)


def test_a_collective_takes_the_time_of_its_slowest_part() -> None:
    """By hand, for tp 32 × dp 2 on a trn2.48xlarge: memory at 46.4 / 64 TB/s a core, links at 256 GB/s a chip."""
    params, _ = profile("llama3-8b-trn2-nxd")
    instance = next(i for i in INSTANCES if i.name == "trn2.48xlarge")
    hidden = 4096 * 4096 * 4  # 64 MiB: 16 hops (4 ranks: 2); 8 chips
    memory, links = 5 * 31 / 32 * hidden / (46.4e12 / 64), 2 * 7 / 8 * hidden / 256e9
    assert memory < links
    tp = Collective("all-reduce", "tp", 3, hidden)
    assert collective_time(tp, params, instance) == pytest.approx(3 * (links + 2 * 16 * 2e-6))
    gathered = Collective("all-gather", "tp", 1, 2**20)  # 5 hops
    assert collective_time(gathered, params, instance) == pytest.approx(7 / 8 * 2**20 / 256e9 + 5 * 2e-6)
    # Within a chip: memory alone.
    one_chip = params.model_copy(update={"convert": params.convert.model_copy(update={"tp_size": 4})})
    in_chip = 5 * 3 / 4 * hidden / (46.4e12 / 64) + 2 * 2 * 2e-6
    assert collective_time(tp, one_chip, instance) == pytest.approx(3 * in_chip)
    # Between two replicas: over all links, four cores of a chip at once.
    dp = Collective("all-reduce", "dp", 1, 32 * 2**20)
    assert collective_time(dp, params, instance) == pytest.approx(2 / 2 * 2**25 * 4 / 512e9 + 2 * 1 * 2e-6)
    four = params.model_copy(update={"train": params.train.model_copy(update={"dp_size": 4})})  # on two instances
    assert collective_time(dp, four, instance) > collective_time(dp, params, instance) + 32 * 2**20 * 32 * 8 / 3200e9


def test_the_table_marks_the_guides_layout_and_ones_own() -> None:
    command = [sys.executable, "tools/plan.py", "--profile", "llama3-8b-trn2-nxd", "--search"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows[:12]] == [str(n) for n in range(1, 13)]
    named = {row[-1]: row for row in rows if row[-1]}
    assert named["the guide's"][1:4] == ["2", "32", "4"]
    assert named["this profile"][1:6] == ["2", "32", "4", "1", "yes"]
    assert int(named["this profile"][0]) > 12  # shown although it is not among the first
    assert re.search(
        r"^\d+ layouts fit trn2\.48xlarge with backend nxd, 16 rows of 4096 tokens per step", printed, re.M
    )
    time = re.search(r"^modelled +([\d,]+) ms per step", printed, re.M)
    assert time
    assert time[1] == named["this profile"][11]
