"""Evaluations that share one vLLM engine, and the loss that they are compared with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import ROOT


class EvalWorker:
    """A process with one vLLM engine (eval_worker.py), for several evaluations of adapters of the tiny Llama."""

    def __init__(self, folder: Path) -> None:
        env = {key: value for key, value in os.environ.items() if key not in ("VLLM_API_KEY", "VLLM_LOGGING_LEVEL")}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/support/eval_worker.py")],
            cwd=folder,
            env=env | {"PYTHONPATH": str(ROOT / "tests")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def evaluate(self, folder: Path, params: str = "params.yaml") -> subprocess.CompletedProcess[str]:
        """The result as if stages/eval_vllm.py had run in `folder`."""
        printed, result = self._ask([str(folder), params])
        stderr = f"{result['error']}\n" if result["error"] else ""
        return subprocess.CompletedProcess(["eval_vllm"], 1 if stderr else 0, printed, stderr)

    def ask_every_route(self, flags: list[str]) -> dict[str, Any]:
        """What routes.py finds of a server with these flags."""
        return self._ask({"flags": flags})[1]

    def _ask(self, request: Any) -> tuple[str, dict[str, Any]]:
        """What the worker prints, and its result."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        printed = ""
        for line in self.process.stdout:
            if line.startswith('{"error": '):
                result: dict[str, Any] = json.loads(line)
                return printed, result
            printed += line
        raise AssertionError(f"the worker ended with exit code {self.process.wait()}: {printed}")


def peft_loss(model: Path, adapter: Path, rows: list[dict[str, Any]]) -> float:
    """The mean loss of rows, each with one labelled span, computed here with HF and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["token_ids"]])
        [(begin, _)] = row["labelled"]
        with torch.no_grad():
            logits = tuned(input_ids=ids).logits[0, begin - 1 : -1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, begin:], reduction="sum").item()
        count += ids.shape[1] - begin
    return total / count
