"""Greedy answers of a vLLM in another Python environment, which has vLLM but none of this project's packages.

    PYTHON -m trnlora.serving.vllm_worker REQUEST ANSWERS PROGRESS     (device_engine.py starts it)

Imports the standard library and vLLM only, on Python 3.10 and later. REQUEST is a JSON file of a `Request`, ANSWERS the
JSON file of `Answers` that is written, as a whole, at the end. PROGRESS is the number of an open file descriptor for
lines that the user sees; everything else that vLLM prints goes where this process's output goes.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO, TypedDict

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>: the signal that a process gets when its parent dies


class Request(TypedDict):
    """What to answer, and with which engine."""

    engine: dict[str, Any]  # keyword arguments of vllm.LLM
    # By the model's name: the PEFT folder of its adapter; None: the engine's own model. Answered one after another.
    models: dict[str, str | None]
    prompts: list[list[int]]  # token ids
    sampling: dict[str, Any]  # keyword arguments of vllm.SamplingParams


class ModelAnswers(TypedDict):
    """One model's answers, in the order of the prompts."""

    texts: list[str]
    tokens: list[int]  # per answer, EOS included
    finish_reasons: list[str | None]
    seconds: float  # for all answers


class Answers(TypedDict):
    """What the worker writes."""

    start_seconds: float  # of the engine
    models: dict[str, ModelAnswers]


def main() -> None:
    # Both so that vLLM's own processes end with this one, however its parent ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    request_file, answers_file, progress = sys.argv[1:]
    request: Request = json.loads(Path(request_file).read_text("utf-8"))
    with os.fdopen(int(progress), "w") as user:
        partial = Path(f"{answers_file}.partial")
        partial.write_text(json.dumps(answer(request, user)), "utf-8")
    partial.replace(answers_file)


def answer(request: Request, user: TextIO) -> Answers:
    """Start the engine and let each model answer all prompts. user: where lines for the user are written."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    begun = time.perf_counter()
    llm = LLM(**request["engine"])
    start_seconds = time.perf_counter() - begun
    print(f"vLLM engine started in {start_seconds:.1f} s", file=user, flush=True)

    sampling = SamplingParams(**request["sampling"])
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    models: dict[str, ModelAnswers] = {}
    for number, (name, folder) in enumerate(request["models"].items(), 1):
        lora = LoRARequest(name, number, folder) if folder else None
        begun = time.perf_counter()
        outputs = llm.generate(prompts, sampling, lora_request=lora, use_tqdm=_bar(name, user))
        seconds = time.perf_counter() - begun
        completions = [output.outputs[0] for output in outputs]
        models[name] = {
            "texts": [completion.text for completion in completions],
            "tokens": [len(completion.token_ids) for completion in completions],
            "finish_reasons": [completion.finish_reason for completion in completions],
            "seconds": seconds,
        }
        tokens = sum(models[name]["tokens"])
        print(
            f"{name}: {len(outputs)} answers, {tokens} tokens, {seconds:.1f} s, {tokens / seconds:.0f} tokens/s",
            file=user,
            flush=True,
        )
    return {"start_seconds": start_seconds, "models": models}


def _bar(name: str, user: TextIO) -> Any:
    """What vLLM is given as use_tqdm: a bar over the answers, if the user sits at a terminal."""
    if not user.isatty() or os.environ.get("TQDM_DISABLE"):
        return False

    def bar(rows: Any = None, **options: Any) -> Any:
        from tqdm import tqdm

        # vLLM asks for two bars: over the rows as it queues them, which takes no time, and over the answers.
        own = {"desc": f"{name} answers", "leave": False, "file": user}
        return rows if rows is not None else tqdm(**{**options, **own})

    return bar


if __name__ == "__main__":
    main()
