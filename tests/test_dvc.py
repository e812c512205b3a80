"""The pipeline in DVC: its dependency lists, and all six stages run end to end on a tiny random Llama."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT
from support.project import Project
from support.repro import ORDER, Finished, check_cache, params_read, ran

from trnlora.dependencies import stage_code
from trnlora.params import Neuron

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]


@pytest.mark.parametrize("stage", ORDER)
def test_code_deps_are_the_imports_of_the_stage(stage: str) -> None:
    listed = [dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")]
    assert listed == stage_code(stage, ROOT), "run `make deps`"


def reruns_after_a_change_of(module: str) -> set[str]:
    """The stages that depend on a file, and those that depend on what they write."""
    changed = {module}
    found: list[str] = []
    for name, stage in STAGES.items():
        if any(dep == one or dep.startswith(f"{one}/") for dep in stage["deps"] for one in changed):
            found.append(name)
            if name != "check_params":  # whose out is always the same
                changed |= set(outs_of(stage))
    return set(found)


def test_a_change_reruns_what_it_can_affect() -> None:
    for plumbing in ("errors", "paths", "cli", "metrics"):
        assert reruns_after_a_change_of(f"trnlora/{plumbing}.py") == set()
    assert reruns_after_a_change_of("trnlora/params.py") == {"check_params"}
    assert reruns_after_a_change_of("trnlora/evaluation/scoring.py") == {"eval_vllm"}
    assert reruns_after_a_change_of("trnlora/weights/peft_export.py") == {"flatten_adapter", "eval_vllm"}
    assert reruns_after_a_change_of("trnlora/weights/reshard.py") == set(ORDER[3:])
    assert {"convert_nxd", "finetune_lora"} <= reruns_after_a_change_of("trnlora/weights/nxd_layout.py")


def test_stages_are_in_flow_order() -> None:
    assert list(STAGES) == ORDER
    made: set[str] = set()
    for stage in STAGES.values():
        for dep in stage["deps"]:
            if dep.startswith(("artifacts/", "metrics/")):
                assert any(dep == out or dep.startswith(f"{out}/") for out in made), f"{dep} is not made earlier"
        made |= set(outs_of(stage))


def test_every_stage_waits_for_check_params() -> None:
    """So that params are refused before DVC deletes an out, whichever stage is asked for."""
    made = set(outs_of(STAGES["check_params"]))
    for name in ORDER[1:]:
        assert any(dep == out or dep.startswith(f"{out}/") for dep in STAGES[name]["deps"] for out in made), name
        made |= set(outs_of(STAGES[name]))
    assert STAGES["check_params"]["outs"] == [{"artifacts/params_checked": {"persist": True}}]  # it stays


def test_no_stage_depends_on_a_measured_time() -> None:
    for name, stage in STAGES.items():
        assert not [dep for dep in stage["deps"] if "timing" in dep], name


def outs_of(stage: dict[str, Any]) -> list[str]:
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


@pytest.mark.slow
def test_a_run_writes_its_outputs_and_reads_the_params_it_lists(finished: Finished) -> None:
    project = finished.project
    for stage in STAGES.values():
        for out in outs_of(stage):
            assert (project.root / out).exists(), out
    read = params_read(project)
    assert read.pop("check_params")  # it checks all of them, whichever it reads one by one
    assert STAGES["check_params"]["params"] == [{"params.yaml": None}]
    listed = {stage: set(STAGES[stage]["params"]) for stage in ORDER[1:]}
    listed["fetch_model"] -= {"model.dtype"}  # read only for a GGUF
    # Only to refuse what vLLM cannot serve: what is fetched does not depend on them. check_params sees their changes.
    read["fetch_model"] -= {"backend", "eval.engine", "serve.max_model_len"}
    listed["flatten_adapter"] -= {"convert.buffer_mib"}  # read only for a merged model
    only_on_nxd = {f"neuron.{name}" for name in Neuron.model_fields}
    listed["finetune_lora"] -= only_on_nxd
    listed["eval_vllm"] -= {"convert.hw_backend", "convert.tp_size"} | only_on_nxd
    assert read == listed


@pytest.mark.slow
def test_nothing_runs_again_until_something_changes(finished_copy: Project) -> None:
    project = finished_copy
    again = project.dvc("repro")
    assert ran(again) == []
    assert "up to date" in again
    assert plan(project) == "every stage is up to date"

    eval_py = project.root / "stages" / "eval_vllm.py"
    eval_py.write_text(eval_py.read_text("utf-8") + "# a comment\n", "utf-8")
    assert ran(project.dvc("repro", "--dry")) == ["eval_vllm"]
    assert re.fullmatch(r"to run, in at most about \d+ s by the last run's times: eval_vllm \(\d+ s\)", plan(project))

    (project.root / "metrics/timing/eval_vllm.json").unlink()
    (project.root / "artifacts/prepared/test.jsonl").unlink()
    names = ["prepare_data", "finetune_lora", "flatten_adapter", "eval_vllm"]
    assert re.findall("[a-z]+_[a-z]+", plan(project)) == names
    assert plan(project).endswith(", eval_vllm")  # its time is not known


def plan(project: Project) -> str:
    """What `make repro` says that it will run."""
    return project.run(".venv/bin/python", "tools/repro_plan.py").strip()


@pytest.mark.slow
def test_a_damaged_out_is_restored_from_the_cache(project: Project) -> None:
    """Damaged in place twice: as the stage left it, and as a checkout restored it. Neither may be the cached file."""
    project.dvc("repro", "fetch_model")
    weights = project.root / "artifacts/model/model.safetensors"
    whole = weights.read_bytes()
    for _ in range(2):
        with weights.open("rb+") as file:
            file.seek(len(whole) // 2)
            file.write(b"damage")
        assert ran(project.dvc("repro", "fetch_model")) == []  # the run cache has it
        assert weights.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("cache_type", [pytest.param("reflink,copy", marks=pytest.mark.long), "hardlink,symlink"])
def test_a_rewritten_out_leaves_the_cache_alone(
    project: Project, tmp_path: Path, make_llama: Callable[..., Path], cache_type: str
) -> None:
    """A stage run by hand changes its out but not the cached copy, even if cache.type makes them the same file."""
    project.dvc("config", "cache.type", cache_type)
    project.dvc("repro", "fetch_model")
    weights = project.root / "artifacts/model/model.safetensors"
    size = weights.stat().st_size
    smaller = make_llama(tmp_path / "smaller", num_hidden_layers=1)
    project.set_params(model={"source": f"path://{smaller}"})
    project.run(".venv/bin/python", "stages/fetch_model.py")
    assert weights.stat().st_size < size
    check_cache(project)
    project.dvc("checkout", "--force", "fetch_model")
    assert weights.stat().st_size == size
