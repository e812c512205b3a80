"""Several adapters with different ranks and layers in one server, and the evaluation of an adapter from elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from support import ROOT
from support.adapters import write_adapter
from support.evaluation import EvalWorker
from support.server import Server, script

from trnlora.data.examples import read_examples
from trnlora.errors import UserError
from trnlora.evaluation.peft_loss import peft_loss
from trnlora.model.targets import TARGETS
from trnlora.serving import client
from trnlora.serving.adapters import check_adapter, parse_adapters


def test_an_adapter_saved_by_peft_is_read(others: list[Path], tiny_llama: Path) -> None:
    second = check_adapter(others[1], tiny_llama, "second")
    assert (second.r, second.modules) == (24, {"o_proj", "up_proj", "down_proj", "q_proj"})


def test_an_adapter_that_vllm_would_not_serve_is_refused(others: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    dora = write_adapter(tiny_llama, tmp_path / "dora", r=8, targets=["q_proj"], use_dora=True)
    with pytest.raises(UserError, match="use_dora, which vLLM does not serve"):
        check_adapter(dora, tiny_llama, "dora")
    half = Path(shutil.copytree(others[0], tmp_path / "half"))
    (half / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter half: .*half has no adapter_model\.safetensors"):
        check_adapter(half, tiny_llama, "half")
    head = write_adapter(tiny_llama, tmp_path / "head", r=8, targets=["embed_tokens"])
    with pytest.raises(UserError, match="vLLM would ignore it"):
        check_adapter(head, tiny_llama, "head")


@pytest.mark.parametrize("pair", ["dolly", "=path", "dolly=", "a b=path", "base=path"])
def test_a_malformed_adapter_is_refused(pair: str) -> None:
    with pytest.raises(UserError, match="name"):
        parse_adapters([pair])


def test_serve_checks_every_adapter_before_it_starts(workdir: Path, others: list[Path]) -> None:
    done = script("tools/serve.py", "--adapters", f"a={others[0]}", "b=nowhere", cwd=workdir)
    assert done.stderr == "error: adapter b: there is no folder nowhere\n"


@pytest.mark.slow
def test_base_and_adapters_answer_by_name_at_the_same_time(server: Server, workdir: Path, others: list[Path]) -> None:
    """Each answers as without parallel requests, and all differ. Adding one works; one too many is refused."""
    names = ["base", "first", "second"]
    prompt = "### Instruction:\nName a river.\n\n### Response:\n"
    expected = [server.complete(name, prompt, 24) for name in names]
    assert len(set(expected)) == 3
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda name: server.complete(name, prompt, 24), names * 2)) == expected * 2

    load = ("tools/load_adapter.py", "--port", str(server.port))
    assert "to which the running server applies no adapter" in script(*load, f"x={others[1]}", cwd=workdir).stderr
    done = script(*load, f"third={others[0]}", cwd=workdir)
    assumed, loaded = done.stdout.splitlines()
    assert assumed.startswith("third: no trnlora.json says the prompt template of its training"), done.stderr
    assert loaded == f"third is served from {others[0]}"
    assert server.complete("third", prompt, 24) == expected[1]
    with ThreadPoolExecutor(6) as pool:  # all of vLLM's slots are taken now
        assert list(pool.map(lambda name: server.complete(name, prompt, 24), names * 2)) == expected * 2
    assert "serve.max_loras is 4" in script(*load, f"fourth={others[0]}", cwd=workdir).stderr
    url = f"http://127.0.0.1:{server.port}"
    client.request(url, "/v1/unload_lora_adapter", {"lora_name": "third"})
    with pytest.raises(UserError, match=r"refused the request \(404\): The model `unknown` does not exist"):
        client.request(url, "/v1/completions", {"model": "unknown", "prompt": "x"})


@pytest.mark.slow
def test_an_adapter_from_elsewhere_is_scored(
    workdir: Path, others: list[Path], eval_worker: EvalWorker, tmp_path: Path
) -> None:
    """Needs no trained adapter and no losses from training."""
    workdir = Path(shutil.copytree(workdir, tmp_path / "workdir", symlinks=True))
    values = yaml.safe_load((workdir / "params.yaml").read_text("utf-8"))
    values["eval"] |= {"adapter": f"path://{others[1]}", "max_prompts": 6, "max_tokens": 8}
    (workdir / "eval.yaml").write_text(yaml.safe_dump(values), "utf-8")
    command = [sys.executable, str(ROOT / "stages/prepare_data.py"), "--params", "eval.yaml"]
    (workdir / "data").mkdir()
    shutil.copyfile(ROOT / "data/tasks.jsonl", workdir / "data/tasks.jsonl")
    subprocess.run(command, cwd=workdir, check=True, env=os.environ, capture_output=True)
    done = eval_worker.evaluate(workdir, "eval.yaml")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((workdir / "metrics/eval_vllm.json").read_text("utf-8"))
    assert metrics["changed_fraction"] >= 0.5
    assert not [key for key in metrics if key.startswith("loss_gap")]
    assert metrics["base"]["loss"] != metrics["tuned"]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("targets", [*([target] for target in TARGETS), list(TARGETS)], ids="+".join)
def test_vllm_applies_every_target(
    prepared: Path, tiny_llama: Path, eval_worker: EvalWorker, tmp_path: Path, targets: list[str]
) -> None:
    """Each target alone, and all: vLLM's loss is that of HF + PEFT, and not the base model's."""
    folder = write_adapter(tiny_llama, tmp_path / "adapter", r=8, targets=targets, scale=0.4)
    run = Path(shutil.copytree(prepared, tmp_path / "run", symlinks=True))
    values = yaml.safe_load((run / "params.yaml").read_text("utf-8"))
    values["eval"] |= {
        "adapter": f"path://{folder}", "max_prompts": 2, "max_tokens": 2, "min_changed_fraction": 0.0
    }  # fmt: skip
    (run / "eval.yaml").write_text(yaml.safe_dump(values), "utf-8")
    done = eval_worker.evaluate(run, "eval.yaml")
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "metrics/eval_vllm.json").read_text("utf-8"))
    expected, _ = peft_loss(tiny_llama, folder, "float32", read_examples(run / "artifacts/prepared/validation.jsonl"))
    print(f"{'+'.join(targets)}: base {found['base']['loss']:.6f}, {found['tuned']['loss']:.6f}, PEFT {expected:.6f}")
    assert found["tuned"]["loss"] == pytest.approx(expected, abs=1e-3)
    assert abs(found["tuned"]["loss"] - found["base"]["loss"]) > 0.003  # three times what is tolerated above
