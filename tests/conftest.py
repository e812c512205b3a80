"""Fixtures that several test files share. Their parts are in tests/support."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ROOT
from support.adapters import write_adapter
from support.browser import Browser
from support.evaluation import EvalWorker, peft_loss
from support.models import FAMILIES, write_llama, write_model
from support.project import Project, copy_project, make_project
from support.records import write_prepared_with, write_record
from support.repro import Finished, run_undisturbed
from support.results import answer, write_answers
from support.rows import rows_of
from support.runs import Runs, prepare
from support.server import Server
from support.stages import set_params

from trnlora.evaluation.harness import RESULTS as HARNESS
from trnlora.files import write_jsonl, write_sums
from trnlora.training.launch import rank_environment

# Many container images set it. Then each of the many processes that the tests start would compile all its imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Several of them run at once. A waiting thread must not keep a core from the thread that it waits for.
os.environ.setdefault("GOMP_SPINCOUNT", rank_environment(1, None)["GOMP_SPINCOUNT"])


# `make test` runs two workers of pytest-xdist. Tests that share one of these fixtures run in the same worker, so that
# each is made once. `tryfirst`: xdist's hook of the same name reads the groups, so they must be set before it.
SHARED_FIXTURES = {
    "server": "vllm", "eval_worker": "vllm", "browser": "vllm", "finished": "pipeline", "runs": "training",
    "eight_heads": "all-linear",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        used = [group for fixture, group in SHARED_FIXTURES.items() if fixture in getattr(item, "fixturenames", ())]
        if used:
            item.add_marker(pytest.mark.xdist_group(used[0]))


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """make_llama(folder, **config) writes a random Llama and its tokenizer; config overrides the default sizes."""
    return write_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder: random float32 Llama with tied embeddings, 1 M parameters, tokenizer with a chat template."""
    return write_llama(tmp_path_factory.mktemp("models") / "tiny_llama")


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family_model(family): a random tiny model of that family, whose biases and norms are random too."""
    folder = tmp_path_factory.mktemp("families")

    def model(family: str) -> Path:
        if not (folder / family).exists():
            write_model(folder / family, family, **FAMILIES[family])
        return folder / family

    return model


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    running = Browser()
    yield running
    running.driver.quit()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with the tiny Llama and prepared rows. Copy it before writing to it."""
    return prepare(tmp_path_factory.mktemp("prepared"), tiny_llama)


@pytest.fixture(scope="session")
def runs(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(prepared, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def converted(runs: Runs, tmp_path: Path) -> Callable[..., Path]:
    """converted(name, **sections): a folder in tmp_path with these params and its model converted."""
    return lambda name, **sections: runs.converted(tmp_path / name, **sections)


@pytest.fixture
def trained(runs: Runs, tmp_path: Path) -> Callable[..., Path]:
    """trained(name, **sections): the same, trained. Runs with the same params are made once per session."""
    return lambda name, **sections: runs.trained(tmp_path / name, **sections)


@pytest.fixture
def project(tmp_path: Path, tiny_llama: Path) -> Project:
    """The project's files as a fresh repository, with params for the tiny Llama. No stage has run."""
    return make_project(tmp_path / "project", tiny_llama)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Finished:
    """The same after an undisturbed `dvc repro`. Only for reading: use `finished_copy` in tests that change it."""
    return run_undisturbed(tmp_path_factory.mktemp("finished") / "project", tiny_llama)


@pytest.fixture
def finished_copy(finished: Finished, tmp_path: Path) -> Project:
    return copy_project(finished.project, tmp_path / "project")


@pytest.fixture(scope="session")
def eval_worker(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EvalWorker]:
    folder = tmp_path_factory.mktemp("eval-worker")
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "model").symlink_to(tiny_llama)
    set_params(folder, serve={"max_model_len": 1024, "max_num_seqs": 16, "kv_cache_gib": 1})
    worker = EvalWorker(folder)
    with worker.process:  # closes its stdin, so that it ends, and waits for it
        yield worker


@pytest.fixture(scope="session")
def recorded_project(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Project:
    """For `run_project`: nothing ran, but `dvc commit` has recorded what is there as a run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    project = make_project(tmp_path_factory.mktemp("recorded") / "project", tiny_llama)
    for source in {*(ROOT / "metrics").rglob("*.json"), *(ROOT / "plots").rglob("*.*")} - {ROOT / HARNESS}:
        target = project.root / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    answers = [answer(number, "Nairobi", "In Paris.", "Nairobi") for number in range(21)]
    answers += [
        answer(97, "one two three", "one two three", "one 2 three"),
        answer(98, "a < b", "<script>document.title = 'broken'</script>", "a < c", cut_off=True),
        answer(99, "`x`", "`x`", "`x`"),
    ]
    write_answers(project.root, answers)
    for out in ("params_checked", "model/config.json", "shards/x", "lora_adapter/x", "adapter/x", "adapter.SHA256SUMS"):
        target = project.root / "artifacts" / out
        target.parent.mkdir(exist_ok=True)
        target.write_text(f"{out}\n")
    for folder in ("merged", "prepared"):
        (project.root / "artifacts" / folder).mkdir()
    pq.write_table(pa.table({"row": range(77)}), project.root / "artifacts/prepared/train.parquet")
    project.dvc("commit", "--force", "--quiet")
    project.commit("Results")
    return project


@pytest.fixture
def run_project(recorded_project: Project, tmp_path: Path) -> Project:
    """The project with this repository's metrics and curves, and 24 answers, recorded in a committed dvc.lock."""
    return copy_project(recorded_project, tmp_path / "run_project")


@pytest.fixture(scope="session")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder of rank 16 on q, k and v of the tiny Llama: the files that flatten_adapter writes."""
    folder = write_adapter(tiny_llama, tmp_path_factory.mktemp("adapter") / "adapter")
    (folder / "README.md").unlink()
    return write_record(folder, tiny_llama)


@pytest.fixture(scope="session")
def others(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two more adapters, as PEFT saves them: rank 16 on q, k and v, and rank 24 on other layers."""
    root = tmp_path_factory.mktemp("other-adapters")
    first = write_adapter(tiny_llama, root / "first", seed=1)
    targets = ["o_proj", "up_proj", "down_proj", "q_proj"]
    return [first, write_adapter(tiny_llama, root / "second", r=24, targets=targets, seed=2)]


@pytest.fixture(scope="session")
def workdir(tiny_llama: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run the tools in: params.yaml and artifacts/{model,adapter}. Copy it before writing to it."""
    root = tmp_path_factory.mktemp("workdir")
    serve = {"max_model_len": 1024, "max_num_seqs": 16, "kv_cache_gib": 1, "runtime_adapters": True, "max_loras": 4}
    scored = {"max_tokens": 16, "max_prompts": 10, "min_changed_fraction": 0.5, "max_loss_gap": 1.0e-3}
    # Not the template that `adapter` records: what is served must be that, whatever params.yaml says.
    data = {"prompt_template": "alpaca"}
    set_params(root, serve=serve, eval=scored, lora={"r": 16, "target_modules": ["qkv_proj"]}, data=data)
    (root / "artifacts").mkdir()
    (root / "artifacts" / "model").symlink_to(tiny_llama)
    (root / "artifacts" / "adapter").symlink_to(adapter)
    write_sums(adapter, root / "artifacts" / "adapter.SHA256SUMS")
    return root


@pytest.fixture(scope="session")
def evaluated(workdir: Path, tiny_llama: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `workdir` with prepared rows of the default data set and PEFT's losses on them. Copy it as well."""
    from transformers import AutoTokenizer

    from trnlora.data.encode import RowEncoder, prepared_example
    from trnlora.data.templates import load_template

    workdir = Path(shutil.copytree(workdir, tmp_path_factory.mktemp("evaluated") / "workdir", symlinks=True))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = rows_of(ROOT / "data" / "tasks.jsonl")
    encoder = RowEncoder(tokenizer, load_template("dolly", {}, tokenizer), 512, "drop", False, "as_text")
    (workdir / "artifacts" / "prepared").mkdir()
    for split, part in (("validation", rows[::80]), ("test", rows[1::60])):
        examples, _ = encoder.encode(part)
        write_jsonl(workdir / "artifacts" / "prepared" / f"{split}.jsonl", map(prepared_example, examples))
    write_prepared_with(workdir / "artifacts" / "prepared")
    (workdir / "artifacts" / "adapter").unlink()
    own = shutil.copytree(adapter, workdir / "artifacts" / "adapter")
    write_record(own, tiny_llama, prepared=workdir / "artifacts" / "prepared")
    write_sums(own, workdir / "artifacts" / "adapter.SHA256SUMS")
    validation = [json.loads(line) for line in (workdir / "artifacts/prepared/validation.jsonl").open("rb")]
    loss = peft_loss(tiny_llama, adapter, validation)
    (workdir / "metrics").mkdir()
    (workdir / "metrics" / "finetune_lora.json").write_text(json.dumps({"validation_loss": loss}))
    (workdir / "metrics" / "flatten_adapter.json").write_text(json.dumps({"peft_validation_loss": loss}))
    return workdir


@pytest.fixture(scope="session")
def server(
    workdir: Path, adapter: Path, others: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """vLLM's server with the base model and the adapters tuned, first and second, for tests that only send requests."""
    served = zip(("tuned", "first", "second"), (adapter, *others), strict=True)
    adapters = [f"{name}={folder}" for name, folder in served]
    running = Server(workdir, tmp_path_factory.mktemp("serve"), "--adapters", *adapters)
    yield running
    running.stop()
