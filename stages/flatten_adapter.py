"""Put the adapter's NxD shards together as a PEFT folder that PEFT, vLLM and NxDI load, and prove it.

    python stages/flatten_adapter.py [--params FILE]

Reads   artifacts/lora_adapter (NxD shards), artifacts/model, artifacts/prepared/validation.jsonl,
        metrics/finetune_lora.json
Writes  artifacts/adapter (adapter_config.json, adapter_model.safetensors and nothing else),
        artifacts/adapter.SHA256SUMS (beside it: the folder is to hold just the two),
        artifacts/merged (with flatten.merged_model: base + adapter as a plain HF folder; else empty),
        metrics/flatten_adapter.json, metrics/timing/flatten_adapter.json

The proof: HF + PEFT give the validation rows the loss that the trainer measured. A server that cannot match an
adapter's keys serves the base model without a word, so the keys are PEFT's own.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from rich.progress import track

from trnlora import paths
from trnlora.model.config import LlamaConfig
from trnlora.errors import UserError, run
from trnlora.files import atomic_dir, check_sums, read_json, read_jsonl, write_json, write_sums
from trnlora.params import load_params

BATCH_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=paths.PARAMS, metavar="FILE")
    args = parser.parse_args()
    params = load_params(args.params)
    config = LlamaConfig.from_folder(paths.MODEL)
    check_sums(paths.LORA_SHARDS, "finetune_lora")
    check_sums(paths.PREPARED, "prepare_data", ["validation.jsonl"])
    check_sums(paths.MODEL, "fetch_model")
    trainer_loss = read_json(paths.METRICS / "finetune_lora.json")["validation_loss"]
    examples = read_jsonl(paths.PREPARED / "validation.jsonl")

    os.environ["TQDM_DISABLE"] = "1"  # transformers' bars, before it is imported
    import torch
    import torch.nn.functional as F
    from peft import PeftModel
    from safetensors.torch import save_file
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    from trnlora.model.lora import load_adapter_shards, peft_adapter, peft_adapter_config
    from trnlora.weights.merge_adapter import write_merged
    from trnlora.backends.mkl import settle_vector_math

    settle_vector_math()
    started = time.perf_counter()
    shards = load_adapter_shards(paths.LORA_SHARDS, config, params.convert, params.lora)
    with atomic_dir(paths.ADAPTER) as partial:
        adapter = peft_adapter(shards, config, params.convert)
        save_file(adapter, partial / "adapter_model.safetensors")
        write_json(partial / "adapter_config.json", peft_adapter_config(params.lora, params.model.source))

        base = AutoModelForCausalLM.from_pretrained(paths.MODEL, dtype=getattr(torch, params.model.dtype))
        model = PeftModel.from_pretrained(base, partial).eval()
        nats, labelled = 0.0, 0
        with torch.no_grad():
            for batch in track(batches(examples), description="scoring with HF + PEFT"):
                rows = [torch.tensor(example["prompt_token_ids"] + example["response_token_ids"]) for example in batch]
                ids = pad_sequence(rows, batch_first=True)  # (B, T); padding is on the right, where no label looks
                mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
                logits = model(ids, attention_mask=mask).logits
                for example, row_logits in zip(batch, logits, strict=True):
                    response = torch.tensor(example["response_token_ids"])
                    before = len(example["prompt_token_ids"]) - 1  # the position that predicts its first token
                    predicted = row_logits[before : before + len(response)].float()
                    nats += F.cross_entropy(predicted, response, reduction="sum").item()
                    labelled += len(response)
        peft_loss = nats / labelled
        gap = abs(peft_loss - trainer_loss)
        if not gap <= params.eval.max_loss_gap:  # also when it is NaN
            raise UserError(
                f"HF + PEFT give the validation rows a loss of {peft_loss:.5f}, the trainer measured "
                f"{trainer_loss:.5f}: more than eval.max_loss_gap {params.eval.max_loss_gap:g} apart, so the adapter "
                "was not kept; check that artifacts/model is the model that was converted (`dvc status`)"
            )
    write_sums(paths.ADAPTER, paths.ADAPTER_SUMS)

    with atomic_dir(paths.MERGED) as partial:
        if params.flatten.merged_model:
            write_merged(paths.MODEL, partial, adapter, params.lora, params.convert.buffer_mib * 2**20)

    metrics = {"peft_validation_loss": peft_loss, "trainer_peft_loss_gap": gap, "labelled_tokens": labelled}
    write_json(paths.METRICS / "flatten_adapter.json", metrics)
    write_json(paths.METRICS / "timing" / "flatten_adapter.json", {"seconds": time.perf_counter() - started})
    print(f"adapter in {paths.ADAPTER}: loss {peft_loss:.4f} with HF + PEFT, {trainer_loss:.4f} in training")


def batches(examples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The examples by length, as many together as fit BATCH_TOKENS with their padding: memory goes with tokens."""
    grouped: list[list[dict[str, Any]]] = [[]]
    for example in sorted(examples, key=length):
        if grouped[-1] and length(example) * (len(grouped[-1]) + 1) > BATCH_TOKENS:
            grouped.append([])
        grouped[-1].append(example)
    return grouped


def length(example: dict[str, Any]) -> int:
    return len(example["prompt_token_ids"]) + len(example["response_token_ids"])


if __name__ == "__main__":
    run(main)
