"""Merge the adapter's NxD shards into a PEFT folder that PEFT, vLLM and NxDI load, and verify its loss.

    python stages/flatten_adapter.py [--params FILE]

Reads   artifacts/lora_adapter (NxD shards, training.json), artifacts/model,
        artifacts/prepared/{validation.jsonl,sources.json,prepared.json}, metrics/{finetune_lora,fetch_model}.json
Writes  artifacts/adapter (adapter_config.json, adapter_model.safetensors, trnlora.json and nothing else; the last has
        what the adapter was trained with, for the server and the evaluation: trnlora/training/adapter_record.py),
        artifacts/adapter.SHA256SUMS (beside it, because the folder must hold just these files),
        artifacts/merged (with flatten.merged_model: base + adapter as a plain HF folder; otherwise empty),
        metrics/flatten_adapter.json, metrics/timing/flatten_adapter.json

HF + PEFT must give the validation rows the loss that the trainer measured. (A server that cannot match an adapter's
keys serves the base model without a warning; these keys are PEFT's own.)
"""

import os
import time
from typing import Any

from trnlora import paths
from trnlora.cli import add_params, script_parser
from trnlora.data.examples import SOURCES, read_examples
from trnlora.errors import UserError, run
from trnlora.files import check_sums, partial_path, write_json, write_sums
from trnlora.metrics import metrics_file, stage_outputs, write_metrics
from trnlora.model.config import ModelConfig
from trnlora.params import Params, load_params
from trnlora.readers import read_json
from trnlora.training.adapter_record import make_record
from trnlora.weights.peft_folder import CONFIG, RECORD, WEIGHTS


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    params = load_params(parser.parse_args().params)
    started = time.perf_counter()
    folders, reads = [paths.ADAPTER, paths.MERGED], [paths.LORA_SHARDS, paths.MODEL, paths.PREPARED]
    with stage_outputs("flatten_adapter", folders, [paths.ADAPTER_SUMS], reads):
        trainer_loss, metrics = flatten(params)
        write_metrics("flatten_adapter", metrics, {"seconds": time.perf_counter() - started})
    loss = metrics["peft_validation_loss"]
    print(f"adapter in {paths.ADAPTER}: loss {loss:.4f} with HF + PEFT, {trainer_loss:.4f} in training")


def flatten(params: Params) -> tuple[float, dict[str, Any]]:
    """Write the adapter, its checksums and the merged model. Returns the loss in training and the stage's metrics."""
    config = ModelConfig.from_folder(paths.MODEL)
    check_sums(paths.LORA_SHARDS, "finetune_lora")
    check_sums(paths.PREPARED, "prepare_data", ["validation.jsonl", SOURCES])
    check_sums(paths.MODEL, "fetch_model")
    record = make_record()
    trainer_loss = read_json(metrics_file("finetune_lora"))["validation_loss"]
    examples = read_examples(paths.PREPARED / "validation.jsonl")

    os.environ["TQDM_DISABLE"] = "1"  # transformers' progress bars; must be set before it is imported
    from safetensors.torch import save_file

    from trnlora.evaluation.peft_loss import peft_loss
    from trnlora.weights.adapter_shards import load_adapter_shards
    from trnlora.weights.merge_adapter import write_merged
    from trnlora.weights.peft_export import peft_adapter, peft_adapter_config

    shards = load_adapter_shards(paths.LORA_SHARDS, config, params.convert, params.lora)
    adapter = peft_adapter(shards, config, params.convert, params.lora)
    partial = partial_path(paths.ADAPTER)
    save_file(adapter, partial / WEIGHTS)
    write_json(partial / CONFIG, peft_adapter_config(params.lora, params.model.source))
    write_json(partial / RECORD, record.model_dump())
    loss, labelled = peft_loss(paths.MODEL, partial, params.model.dtype, examples)
    gap = abs(loss - trainer_loss)
    if not gap <= params.eval.max_loss_gap:  # also when it is NaN
        raise UserError(
            f"HF + PEFT give the validation rows a loss of {loss:.5f}, the trainer measured {trainer_loss:.5f}: "
            f"more than eval.max_loss_gap {params.eval.max_loss_gap:g} apart, so the adapter was not kept; "
            "check that artifacts/model is the model that was converted (`dvc status`)"
        )
    write_sums(partial, partial_path(paths.ADAPTER_SUMS))
    if params.flatten.merged_model:
        merged = partial_path(paths.MERGED)
        write_merged(paths.MODEL, merged, adapter, params.lora, params.convert.buffer_mib * 2**20)
    return trainer_loss, {"peft_validation_loss": loss, "trainer_peft_loss_gap": gap, "labelled_tokens": labelled}


if __name__ == "__main__":
    run(main)
