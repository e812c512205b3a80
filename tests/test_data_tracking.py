"""DVC notices every change of a user's data: prepare_data runs again, then what depends on it, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.hub import Hub
from support.project import Project
from support.repro import ran

pytestmark = pytest.mark.slow

DEPENDENT = {"finetune_lora", "flatten_adapter", "eval_vllm"}


def rows(first: int, last: int) -> str:
    """Rows of a user's own, with columns under other names."""
    return "".join(
        json.dumps({"question": f"How much is {n} and {n}?", "answer": f"It is {2 * n}."}) + "\n"
        for n in range(first, last)
    )


def assert_only_prepare_data_runs(project: Project) -> None:
    assert [stage for stage in ran(project.dvc("repro", "prepare_data")) if stage != "check_params"] == ["prepare_data"]
    changed = json.loads(project.dvc("status", "--json"))
    assert changed.keys() <= DEPENDENT, changed
    assert "finetune_lora" in changed


def assert_only_prepare_data_would_run(project: Project) -> None:
    changed = json.loads(project.dvc("status", "--json")).keys()
    assert changed - DEPENDENT - {"check_params"} == {"prepare_data"}


def test_every_change_of_the_data_runs_prepare_data(finished_copy: Project) -> None:
    project = finished_copy
    folder = project.root / "data" / "mine"
    folder.mkdir()
    (folder / "a.jsonl").write_text(rows(0, 60), "utf-8")
    columns = {"instruction": "question", "response": "answer"}

    def set_data(**changes: Any) -> None:
        project.set_params(data={"columns": columns, **changes})

    set_data(source="path://data/mine/a.jsonl")  # a file
    assert_only_prepare_data_runs(project)
    assert ran(project.dvc("repro", "prepare_data")) == []
    (folder / "a.jsonl").write_text(rows(0, 59) + rows(100, 101), "utf-8")  # one row edited
    assert_only_prepare_data_would_run(project)
    set_data(source=[{"source": "path://data/mine", "weight": 2.0}])  # a folder: the same file
    assert_only_prepare_data_runs(project)
    (folder / "b.jsonl").write_text(rows(60, 90), "utf-8")  # one file added
    assert_only_prepare_data_would_run(project)
    (folder / "b.jsonl").unlink()
    set_data(source=[{"source": "path://data/mine", "weight": 1.5}])  # a weight changed
    assert_only_prepare_data_would_run(project)
    swapped = {"instruction": "answer", "response": "question"}
    set_data(source=[{"source": "path://data/mine", "weight": 2.0}], columns=swapped)  # the columns
    assert_only_prepare_data_would_run(project)


def test_a_source_that_dvc_does_not_track_is_refused(finished_copy: Project) -> None:
    project = finished_copy
    outside = project.root.parent / "outside.jsonl"
    outside.write_text(rows(0, 60), "utf-8")
    project.set_params(
        data={"source": f"path://{outside}", "columns": {"instruction": "question", "response": "answer"}}
    )
    printed = project.run(".venv/bin/dvc", "repro", "prepare_data", check=False)
    assert f"error: path://{outside}: prepare_data does not depend on it in dvc.yaml" in printed
    pipeline = project.root / "dvc.yaml"
    pipeline.write_text(
        pipeline.read_text("utf-8").replace("      - data\n", f"      - data\n      - {outside}\n"), "utf-8"
    )
    assert_only_prepare_data_runs(project)
    outside.write_text(rows(0, 61), "utf-8")
    assert_only_prepare_data_would_run(project)


def test_a_hub_data_set_is_tracked_by_its_revision(finished_copy: Project, tmp_path: Path) -> None:
    project = finished_copy
    columns = {"instruction": "question", "response": "answer"}
    with Hub({"README.md": b"# rows", "rows.jsonl": rows(0, 60).encode()}) as hub:
        project.env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.port}", "HF_HOME": str(tmp_path / "hub")}
        project.set_params(data={"source": f"hf://org/name@{'a' * 40}", "columns": columns})
        assert_only_prepare_data_runs(project)
        hub.files["rows.jsonl"] = rows(0, 61).encode()
        project.set_params(data={"source": f"hf://org/name@{'b' * 40}"})
        assert_only_prepare_data_runs(project)
    metrics = json.loads((project.root / "metrics/prepare_data.json").read_text("utf-8"))
    assert metrics["rows_read"] == 61
