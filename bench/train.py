"""Speed and memory of finetune_lora at tp 1, compared with HF's Trainer + PEFT on the same rows.

    python bench/train.py [--pairs N] [--steps N] [--targets …] [--unshared] [--memory] [--dir DIR]

Reads artifacts/model, artifacts/prepared.

Trains on the packed rows that finetune_lora reads, one row per step, in the same order and from the same lora_A. The
ways below take turns. Prints the median of N runs, peak resident memory, and how far the loss of any step is from hf:

ours               the stage itself at tp 1: a packed row, attention within each document
hf                 HF Trainer + PEFT as most people run it: the row's documents as a batch, padded to the longest
hf-packed          HF Trainer + PEFT with DataCollatorWithFlattening: the row's documents concatenated, no padding
hf-oneDNN, hf-packed-oneDNN
                   the same two with ours' packed weights in place of their frozen linear layers, which the libraries
                   themselves do not offer; only where ours uses them

HF's lora_A's are shared as in NxD (lora.share_a in params.yaml). Dropout is 0, so that all compute the same. Padding
does not count as tokens. The seconds are those of the optimizer steps. Also measures the processor's peak, which is
float32 matrix products of the model's shapes in isolation, each by the faster of MKL and oneDNN, and prints which share
of it a step of ours reaches, counting only the products that LoRA needs for the tokens that the loss depends on.

--unshared  give each document a first token of its own, so that no two begin in the same way
--memory    instead: peak resident memory of ours and hf for one document of 256 … 4096 tokens, all of them labelled
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.params import Params, Train, load_params

ROOT = Path(__file__).resolve().parent.parent
ONEDNN = "-oneDNN"  # ends the name of a way with packed weights
WAYS = ["ours", "hf", "hf-packed", "hf" + ONEDNN, "hf-packed" + ONEDNN]
LENGTHS = [256, 512, 1024, 2048, 4096]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each way (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run (default: %(default)s)")
    parser.add_argument("--targets", default="all-linear", help="with commas (default: %(default)s)")
    parser.add_argument("--unshared", action="store_true", help="no two documents begin in the same way")
    parser.add_argument("--memory", action="store_true", help="measure memory by sequence length instead")
    parser.add_argument("--dir", type=Path, help="where the runs write (default: the temporary folder)")
    parser.add_argument("--run", nargs=2, metavar=("WAY", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        way, folder = args.run
        os.chdir(folder)
        result = run_ours() if way == "ours" else gemm_peak() if way == "peak" else run_hf(way)
        print(json.dumps(result))
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # the same for all ways
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="bench-train-") as name:
        folder = Path(name)
        (folder / "artifacts").mkdir()
        (folder / "artifacts" / "model").symlink_to(ROOT / "artifacts" / "model")
        if args.memory:
            memory(folder, args.targets)
        else:
            prepared = folder / "artifacts" / "prepared"
            if args.unshared:
                unshare(ROOT / "artifacts" / "prepared", prepared)
            else:
                prepared.symlink_to(ROOT / "artifacts" / "prepared")
            speed(folder, args.targets, args.pairs, args.steps)


def run(way: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--run", way, str(folder)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def set_up(folder: Path, targets: str, **train: Any) -> None:
    """Write the default profile's params with one rank and no dropout, and convert the model."""
    import yaml

    params = yaml.safe_load((ROOT / "profiles" / "smollm2-135m-cpu.yaml").read_text("utf-8"))
    params["convert"] |= {"tp_size": 1, "kv_size_multiplier": 1}
    params["lora"] |= {
        "lora_dropout": 0.0,
        "target_modules": targets if targets == "all-linear" else targets.split(","),
    }
    params["train"] |= {"global_batch_size": 1, "micro_batch_size": 1, **train}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
    if not (folder / "artifacts" / "shards").exists():
        subprocess.run(
            [sys.executable, ROOT / "stages" / "convert_nxd.py"], cwd=folder, stdout=subprocess.DEVNULL, check=True
        )


def speed(folder: Path, targets: str, pairs: int, steps: int) -> None:
    from trnlora.backends.frozen_linear import library_of_products
    from trnlora.reporting.provenance import processor

    set_up(folder, targets, max_steps=steps)
    packs = library_of_products() == "oneDNN"
    ways = [way for way in WAYS if packs or not way.endswith(ONEDNN)]
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in (*ways, "peak")}
    for number in range(pairs):
        for way, results in runs.items():
            results.append(run(way, folder))
            if way == "peak":
                print(f"run {number + 1}: peak {rates(results[-1])} GFLOP/s", flush=True)
            else:
                r = results[-1]
                print(
                    f"run {number + 1}: {way} {r['tokens'] / r['seconds']:.0f} tokens/s, loss {r['losses'][-1]:.5f}",
                    flush=True,
                )

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{steps} steps of one packed row, {os.environ['OMP_NUM_THREADS']} threads, float32")
    for column in ("", "tokens/s", "ours / this", "RSS GiB", "last loss", "from hf"):
        table.add_column(column, justify="right" if column else "left")
    for way in ways:
        speeds = [run["tokens"] / run["seconds"] for run in runs[way]]
        # per run, since a machine's speed drifts
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs["ours"], runs[way], strict=True)]
        table.add_row(
            way, f"{statistics.median(speeds):.0f}", f"{statistics.median(ratios):.2f}",
            f"{max(run['rss_gib'] for run in runs[way]):.2f}", f"{runs[way][-1]['losses'][-1]:.5f}",
            f"{max(abs(a - b) for a, b in zip(runs[way][-1]['losses'], runs['hf'][-1]['losses'], strict=True)):.0e}",
        )  # fmt: skip
    Console().print(table)
    shares = [
        run["flops"] / run["seconds"] / peak["best"] for run, peak in zip(runs["ours"], runs["peak"], strict=True)
    ]
    share = f"{statistics.median(shares):.0%}"
    peak = sorted(runs["peak"], key=lambda run: run["best"])[len(runs["peak"]) // 2]
    print(f"{processor()}; matrix products in isolation, median run: {rates(peak)} GFLOP/s")
    ours = runs["ours"][-1]
    print(f"a step of ours reaches {share} of the best; it computes {ours['needed']} of {ours['tokens']} tokens")


def rates(peak: dict[str, Any]) -> str:
    return ", ".join(f"{name} {flops / 1e9:.0f}" for name, flops in peak.items())


def unshare(prepared: Path, target: Path) -> None:
    """Copy a prepared folder, with a first token of its own for each document of a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trnlora.files import write_sums

    shutil.copytree(prepared, target)
    for split in ("train", "validation"):
        table = pq.read_table(target / f"{split}.parquet")
        ids, positions = table["input_ids"].to_pylist(), table["position_ids"].to_pylist()
        documents = table["document_ids"].to_pylist()
        for row in range(len(ids)):
            for place, position in enumerate(positions[row]):
                if position == 0:
                    ids[row][place] = 1000 + documents[row][place]
        column = table.schema.get_field_index("input_ids")
        table = table.set_column(column, "input_ids", pa.array(ids, table.schema.field(column).type))
        pq.write_table(table, target / f"{split}.parquet")
    write_sums(target)


def memory(folder: Path, targets: str) -> None:
    """Peak memory of ours and hf for a document of each length."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="peak RSS in GiB, one document, all tokens labelled")
    for column in ("tokens", "ours", "ours, activation_checkpointing", "hf", "hf / ours"):
        table.add_column(column, justify="right")
    for length in LENGTHS:
        one_document(folder / "artifacts" / "prepared", length)
        set_up(folder, targets, max_steps=2, epochs=2)
        plain, hf = run("ours", folder)["rss_gib"], run("hf", folder)["rss_gib"]
        set_up(folder, targets, max_steps=2, epochs=2, activation_checkpointing=True)
        checkpointed = run("ours", folder)["rss_gib"]
        print(f"{length} tokens: {plain:.2f}, {checkpointed:.2f}, {hf:.2f} GiB", flush=True)
        table.add_row(str(length), f"{plain:.2f}", f"{checkpointed:.2f}", f"{hf:.2f}", f"{hf / plain:.2f}")
    Console().print(table)


def one_document(prepared: Path, length: int) -> None:
    """Write a prepared folder: a training row of one document of `length` random tokens, and short validation rows."""
    import torch

    from trnlora.data.examples import SOURCES
    from trnlora.data.packing import write_parquet
    from trnlora.files import write_sums
    from trnlora.model.config import ModelConfig

    shutil.rmtree(prepared, ignore_errors=True)
    prepared.mkdir()
    vocabulary = ModelConfig.from_folder(ROOT / "artifacts" / "model").vocab_size
    for split, tokens in (("train", length), ("validation", 64)):
        ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        row = {"input_ids": ids, "labels": ids, "position_ids": list(range(tokens)), "document_ids": [1] * tokens}
        write_parquet(prepared / f"{split}.parquet", [{**row, "row_ids": [1]}])
    shutil.copy(ROOT / "artifacts" / "prepared" / SOURCES, prepared)  # which the stage names in errors
    write_sums(prepared)


def run_ours() -> dict[str, Any]:
    """Run the stage in the current folder."""
    from trnlora.readers import read_json

    subprocess.run([sys.executable, ROOT / "stages" / "finetune_lora.py"], stdout=subprocess.DEVNULL, check=True)
    metrics = read_json(paths.METRICS / "finetune_lora.json")
    timing = read_json(paths.METRICS / "timing" / "finetune_lora.json")
    curve = paths.CURVES / "plots" / "metrics" / "train" / "loss.tsv"
    tokens = metrics["train_tokens"]
    counts = needed()
    return {
        "tokens": tokens,
        "seconds": tokens / timing["tokens_per_second"],
        "losses": [float(line.split("\t")[1]) for line in curve.read_text("utf-8").splitlines()[1:]],
        "rss_gib": timing["peak_rss_gib_per_rank"],
        "flops": sum(2 * m * k * n * times for m, k, n, times in products(counts)),
        "needed": sum(count for count, _ in counts),
    }


def needed() -> list[tuple[int, int]]:
    """For each packed row, in the order of training: the tokens that its loss depends on, and the labelled ones."""
    import torch

    from trnlora.model.decoder import IGNORED, next_tokens
    from trnlora.model.needed_tokens import needed_tokens

    counts = []
    for row in packed_rows():
        tensors = {name: torch.as_tensor(column)[None] for name, column in row.items()}
        labelled = next_tokens(tensors["labels"]) != IGNORED
        found = needed_tokens(tensors["input_ids"], tensors["position_ids"], tensors["document_ids"], labelled)
        counts.append((len(found.places) if found else 0, int(labelled.sum())))
    return counts


def packed_rows() -> list[dict[str, Any]]:
    """The packed rows in the order of training."""
    from trnlora.training.batches import epoch_order, read_packed_rows

    train = load_params().train
    assert train.max_steps is not None
    rows = read_packed_rows(paths.PREPARED / "train.parquet")
    count = len(rows["labels"])
    order = [row for epoch in range(train.epochs) for row in epoch_order(count, epoch, train.seed).tolist()]
    return [{name: column[row] for name, column in rows.items()} for row in order[: train.max_steps]]


def documents() -> list[list[dict[str, list[int]]]]:
    """The documents (input_ids, labels) of each packed row, in the order of training."""
    return [
        [
            {name: row[name][row["document_ids"] == document].tolist() for name in ("input_ids", "labels")}
            for document in range(1, int(row["document_ids"].max()) + 1)
        ]
        for row in packed_rows()
    ]


def products(steps: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """(m, k, n, count) of the matrix products that LoRA needs for steps of so many (tokens, labelled tokens).

    For each frozen weight: the forward product and the gradient of its input. The lowest layer's q, k and v need no
    such gradient, since no adapter is below them. Also A, B and their gradients. The head, and what follows the
    attention of the last layer, only at labelled tokens. Without attention.
    """
    from trnlora.model.config import ModelConfig
    from trnlora.model.targets import adapter_tensors
    from trnlora.model.tensors import linear_sizes

    config, layers = ModelConfig.from_folder(paths.MODEL), ModelConfig.from_folder(paths.MODEL).num_hidden_layers
    first = [tensor for tensor in adapter_tensors(config, load_params().lora) if ".layers.0." in tensor.nxd_key]
    found = []
    for tokens, labelled in steps:
        for name, (k, n) in linear_sizes(config).items():
            if name in ("q_proj", "k_proj", "v_proj"):
                found += [(tokens, k, n, layers), (tokens, n, k, layers - 1)]
            else:
                for m, count in ((tokens, layers - 1), (labelled, 1)):
                    found += [(m, k, n, count), (m, n, k, count)]
        for tensor in first:
            n, k = tensor.shape
            if ".qkv_proj." in tensor.nxd_key:
                below = layers - 1 if ".lora_A." in tensor.nxd_key else layers
                found += [(tokens, k, n, layers), (n, tokens, k, layers), (tokens, n, k, below)]
            else:
                for m, count in ((tokens, layers - 1), (labelled, 1)):
                    found += [(m, k, n, count), (n, m, k, count), (m, n, k, count)]
        found += [(labelled, config.hidden_size, config.vocab_size, 1)]
        found += [(labelled, config.vocab_size, config.hidden_size, 1)]
    return found


def gemm_peak() -> dict[str, Any]:
    """FLOP/s of the model's matrix products with nothing between them, the best of several runs for each.

    By MKL, by oneDNN, and (best) each by the faster one.
    """
    import torch

    from trnlora.backends.frozen_linear import FrozenWeights

    flops = 0.0
    seconds = dict.fromkeys(("MKL", "oneDNN", "best"), 0.0)
    for m, k, n, times in products(needed()[:1]):
        x, weight = torch.randn(m, k), torch.randn(n, k)
        fastest = {}
        for name, weights in (("MKL", FrozenWeights([weight])), ("oneDNN", FrozenWeights([weight], (), torch.float32))):
            fastest[name] = math.inf
            for _ in range(5):
                started = time.perf_counter()
                weights.multiply(x)
                fastest[name] = min(fastest[name], time.perf_counter() - started)
        fastest["best"] = min(fastest.values())
        flops += 2 * m * k * n * times
        for name, each in fastest.items():
            seconds[name] += each * times
    return {name: flops / each for name, each in seconds.items()}


def use_packed_weights(model: Any) -> None:
    """Let the frozen linear layers of a model multiply by packed weights."""
    from functools import partial

    import torch

    from trnlora.backends.frozen_linear import FrozenWeights, frozen_linear

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            biases = [] if module.bias is None else [module.bias]
            weights = FrozenWeights([module.weight], biases, torch.float32)
            module.forward = partial(frozen_linear, weights=weights)  # type: ignore[method-assign]


def hf_model(params: Params) -> Any:
    """The base model with PEFT's LoRA; lora_A's are shared and initialized as in finetune_lora."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trnlora.model.config import ModelConfig
    from trnlora.model.targets import adapter_tensors, peft_modules
    from trnlora.training.initial_adapter import random_lora_a

    base = AutoModelForCausalLM.from_pretrained(paths.MODEL, dtype=torch.float32)
    config = LoraConfig(
        r=params.lora.r, lora_alpha=params.lora.lora_alpha, use_rslora=params.lora.use_rslora,
        target_modules=list(peft_modules(params.lora.target_modules)), task_type="CAUSAL_LM",
    )  # fmt: skip
    model: Any = get_peft_model(base, config)
    table = adapter_tensors(ModelConfig.from_folder(paths.MODEL), params.lora)
    for tensor, values in random_lora_a(table, params.train.seed):
        a, *others = (model.get_submodule(key.removesuffix(".weight") + ".default") for key in tensor.peft_keys)
        a.weight.data.copy_(values)
        for other in others:
            other.weight = a.weight
    return model


def run_hf(way: str) -> dict[str, Any]:
    """Run HF Trainer + PEFT on the rows in the current folder, in one of WAYS."""
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    params = load_params()
    steps = documents()
    model = hf_model(params)
    if way.endswith(ONEDNN):
        use_packed_weights(model)
    tokenizer = AutoTokenizer.from_pretrained(paths.MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collate = DataCollatorWithFlattening() if "packed" in way else DataCollatorForSeq2Seq(tokenizer)
    losses: list[float] = []
    seconds = 0.0

    class Clock(TrainerCallback):
        def on_step_begin(self, *unused: Any, **unused_too: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *unused: Any, **unused_too: Any) -> None:
            nonlocal seconds
            seconds += time.perf_counter() - self.started

        def on_log(self, *unused: Any, logs: dict[str, float] | None = None, **unused_too: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(steps)

    arguments = TrainingArguments(
        output_dir="hf", per_device_train_batch_size=1, max_steps=len(steps), logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, max_grad_norm=params.train.max_grad_norm,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = InOrder(
        model=model, args=arguments, train_dataset=steps, optimizers=optimizer_of(model, params.train, len(steps)),
        callbacks=[Clock()], data_collator=lambda batch: collate(batch[0]),  # an item is a step's documents
    )  # fmt: skip
    trainer.train()
    return {
        "tokens": sum(len(document["input_ids"]) for step in steps for document in step),
        "seconds": seconds,
        "losses": losses,
        "rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # Linux counts in KiB
    }


def optimizer_of(model: Any, train: Train, steps: int) -> Any:
    """AdamW and finetune_lora's learning rate schedule."""
    import torch

    from trnlora.training.schedule import learning_rate_factor

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.lr, weight_decay=train.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(train, step, steps))
    return optimizer, schedule


if __name__ == "__main__":
    main()
