"""Several adapters in one server, with other ranks and layers, and the evaluation of an adapter from elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT
from support.evaluation import EvalWorker
from test_serving import Server, script

from trnlora.errors import UserError
from trnlora.serving import client
from trnlora.serving.adapters import check_adapter, parse_adapters


def write_peft(model: Path, folder: Path, r: int, targets: list[str], seed: int, **config: Any) -> Path:
    """An adapter as PEFT saves it, with its README.md, that changes the model's answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM", **config)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lora)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    peft_model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def two(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("two")
    first = write_peft(tiny_llama, root / "first", 16, ["q_proj", "k_proj", "v_proj"], 1)
    return [first, write_peft(tiny_llama, root / "second", 24, ["o_proj", "up_proj", "down_proj", "q_proj"], 2)]


@pytest.fixture(scope="module")
def workdir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters-workdir")
    values = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    values["serve"] |= {"max_num_seqs": 16, "runtime_adapters": True, "max_loras": 3}
    (root / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    (root / "artifacts").mkdir()
    (root / "artifacts" / "model").symlink_to(tiny_llama)
    return root


def test_an_adapter_saved_by_peft_is_read(two: list[Path], tiny_llama: Path) -> None:
    second = check_adapter(two[1], tiny_llama, "second")
    assert (second.r, second.modules) == (24, {"o_proj", "up_proj", "down_proj", "q_proj"})


def test_an_adapter_that_vllm_would_not_serve_is_refused(two: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    dora = write_peft(tiny_llama, tmp_path / "dora", 8, ["q_proj"], 1, use_dora=True)
    with pytest.raises(UserError, match="use_dora, which vLLM does not serve"):
        check_adapter(dora, tiny_llama, "dora")
    half = Path(shutil.copytree(two[0], tmp_path / "half"))
    (half / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter half: .*half has no adapter_model\.safetensors"):
        check_adapter(half, tiny_llama, "half")
    head = write_peft(tiny_llama, tmp_path / "head", 8, ["embed_tokens"], 1)
    with pytest.raises(UserError, match="vLLM would ignore it"):
        check_adapter(head, tiny_llama, "head")


@pytest.mark.parametrize("pair", ["dolly", "=path", "dolly=", "a b=path", "base=path"])
def test_a_malformed_adapter_is_refused(pair: str) -> None:
    with pytest.raises(UserError, match="name"):
        parse_adapters([pair])


def test_serve_checks_every_adapter_before_it_starts(workdir: Path, two: list[Path]) -> None:
    done = script("tools/serve.py", "--adapters", f"a={two[0]}", "b=nowhere", cwd=workdir)
    assert done.stderr == "error: adapter b: there is no folder nowhere\n"


@pytest.fixture(scope="module")
def server(workdir: Path, two: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = ("--adapters", f"first={two[0]}", f"second={two[1]}")
    running = Server(workdir, tmp_path_factory.mktemp("serve"), *adapters)
    yield running
    running.process.terminate()
    running.process.wait()


@pytest.mark.slow
def test_base_and_adapters_answer_by_name_at_the_same_time(server: Server, workdir: Path, two: list[Path]) -> None:
    """Each answers as if it were asked alone, and all differ. Then one is added, and those without room are refused."""
    names = ["base", "first", "second"]
    assert [model["id"] for model in server.request("/v1/models")["data"]] == names
    prompt = "### Instruction:\nName a river.\n\n### Response:\n"
    alone = [server.complete(name, prompt, 24) for name in names]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda name: server.complete(name, prompt, 24), names * 2)) == alone * 2

    load = ("tools/load_adapter.py", "--port", str(server.port))
    assert "to which the running server applies no adapter" in script(*load, f"x={two[1]}", cwd=workdir).stderr
    done = script(*load, f"third={two[0]}", cwd=workdir)
    assert done.stdout == f"third is served from {two[0]}\n", done.stderr
    assert server.complete("third", prompt, 24) == alone[1]
    assert [server.complete(name, prompt, 24) for name in names] == alone
    assert "serve.max_loras is 3" in script(*load, f"fourth={two[0]}", cwd=workdir).stderr
    with pytest.raises(UserError, match=r"refused the request \(404\): The model `nobody` does not exist"):
        client.request(f"http://127.0.0.1:{server.port}", "/v1/completions", {"model": "nobody", "prompt": "x"})


@pytest.mark.slow
def test_an_adapter_from_elsewhere_is_scored(workdir: Path, two: list[Path], eval_worker: EvalWorker) -> None:
    """Without a trained adapter and without the losses measured in training."""
    values = yaml.safe_load((workdir / "params.yaml").read_text("utf-8"))
    values["eval"] |= {"adapter": f"path://{two[1]}", "max_prompts": 6, "max_tokens": 8}
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
