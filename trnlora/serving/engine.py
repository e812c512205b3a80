"""A vLLM engine in this process: greedy answers and teacher-forced losses of the base model and of adapters."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trnlora.data.examples import PreparedExample, prompt_token_ids
from trnlora.errors import UserError
from trnlora.params import Params
from trnlora.serving.adapters import Adapter
from trnlora.serving.vllm_args import engine_args, environment, failure
from trnlora.training.adapter_record import GREEDY


@dataclass(frozen=True)
class Completion:
    """One answer of a model."""

    text: str
    tokens: int  # EOS included
    finish_reason: str | None  # "stop", or "length" at eval.max_tokens


class Engine:
    """A started vLLM. It can evaluate one adapter after another if it was started with room for each of them."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._lora_requests: dict[str, Any] = {}  # by absolute folder
        self._loaded: Any = None

    def _lora_request(self, adapter: Adapter) -> Any:
        """vLLM's handle of an adapter. vLLM caches adapters by id, so each folder gets its own."""
        from vllm.lora.request import LoRARequest

        folder = str(adapter.folder.absolute())
        if folder not in self._lora_requests:
            self._lora_requests[folder] = LoRARequest(adapter.name, len(self._lora_requests) + 1, folder)
        request = self._lora_requests[folder]
        if self._loaded is not None and self._loaded is not request:
            # Otherwise the adapter could take vLLM's last slot, which must stay empty: see vllm_args.engine_args.
            self._llm.llm_engine.remove_lora(self._loaded.lora_int_id)
        self._loaded = request
        return request

    def generate(
        self, title: str, adapter: Adapter | None, prompts: Sequence[list[int]], sampling: Any
    ) -> tuple[list[Any], float]:
        """vLLM's outputs in the order of `prompts` (token ids), and the seconds they took.

        title: the label of the progress bar; adapter: None for the base model. Raises UserError with vLLM's reason if
        it refuses a prompt or its engine fails.
        """
        from tqdm import tqdm

        def bar(rows: Any = None, **options: Any) -> Any:
            # vLLM asks for two bars: over the rows as it queues them, which takes no time, and over the answers.
            return rows if rows is not None else tqdm(**{**options, "desc": title, "leave": False})

        begun = time.perf_counter()
        try:
            outputs = self._llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                sampling,
                lora_request=self._lora_request(adapter) if adapter else None,
                # False, not a disabled bar: vLLM divides by a bar's elapsed time, which would be 0.
                use_tqdm=bar if sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE") else False,
            )
        except Exception as error:
            raise UserError(failure(f"vLLM failed ({title})", error)) from error
        return outputs, time.perf_counter() - begun

    def teacher_forced_loss(self, name: str, adapter: Adapter | None, rows: Sequence[PreparedExample]) -> float:
        """Mean cross-entropy in nats over the labelled tokens of all rows, as the trainer computes it.

        name: the model's name in what is printed. Raises as `generate` does.
        """
        from vllm import SamplingParams

        # prompt_logprobs 0: only the actual token's log-probability (vllm/sampling_params.py). vLLM must generate at
        # least one token.
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [row["token_ids"] for row in rows]
        outputs, seconds = self.generate(f"{name} loss", adapter, prompts, sampling)
        total, count = 0.0, 0
        for row, tokens, output in zip(rows, prompts, outputs, strict=True):
            for position in (position for start, end in row["labelled"] for position in range(start, end)):
                total -= output.prompt_logprobs[position][tokens[position]].logprob
                count += 1
        print(f"{name}: loss {total / count:.6f} over {count} tokens of {len(rows)} rows, {seconds:.1f} s", flush=True)
        return total / count

    def answer(
        self, name: str, adapter: Adapter | None, rows: Sequence[PreparedExample], max_tokens: int
    ) -> tuple[list[Completion], float]:
        """Greedy answers in the order of `rows`, and the seconds they took. Raises as `generate` does."""
        from vllm import SamplingParams

        sampling = SamplingParams(**GREEDY.model_dump(), max_tokens=max_tokens)
        prompts = [prompt_token_ids(row) for row in rows]
        outputs, seconds = self.generate(f"{name} answers", adapter, prompts, sampling)
        completions = [output.outputs[0] for output in outputs]
        answers = [Completion(c.text, len(c.token_ids), c.finish_reason) for c in completions]
        tokens = sum(answer.tokens for answer in answers)
        print(
            f"{name}: {len(rows)} answers, {tokens} tokens, {seconds:.1f} s, {tokens / seconds:.0f} tokens/s",
            flush=True,
        )
        return answers, seconds


def start_engine(params: Params, adapters: Sequence[Adapter]) -> Engine:
    """Start vLLM in this process, with room for `adapters`. Sets environment variables of this process.

    Raises UserError with vLLM's reason, in one line, if it does not start.
    """
    args = engine_args(params, adapters)
    verbose = "VLLM_LOGGING_LEVEL" in os.environ
    os.environ.update(environment(params))
    # The engine in this process, for every backend: no process can be left behind, and an error arrives as it is,
    # not as "engine core initialization failed".
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not verbose:
        os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"  # vLLM logs a page of text before such an error
    print("starting vLLM …", flush=True)
    begun = time.perf_counter()
    try:
        with contextlib.nullcontext() if verbose else quiet():
            from vllm import LLM

            from trnlora.backends.mkl import settle_vector_math

            settle_vector_math()
            engine = Engine(LLM(**args))
    except Exception as error:
        raise UserError(failure("vLLM did not start", error)) from error
    print(f"vLLM engine started in {time.perf_counter() - begun:.1f} s", flush=True)
    return engine


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what is printed meanwhile, also by C++ code; exceptions pass."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, devnull):
            os.close(descriptor)
