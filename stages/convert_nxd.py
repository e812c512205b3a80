"""Convert the HF folder to NxD's tensor-parallel shards, and prove them: sharded logits equal HF's.

    python stages/convert_nxd.py [--params FILE]

Reads   artifacts/model (HF folder)
Writes  artifacts/shards/pretrained_weight/model/dp_rank_00_tp_rank_RR_pp_rank_00.pt, one file a rank,
        metrics/convert_nxd.json, metrics/timing/convert_nxd.json

`nxd.load_checkpoint("artifacts/shards", tag="pretrained_weight")` reads the result on Trainium.
"""

import argparse
import os
import time
from pathlib import Path

from rich.progress import track

from trnlora import paths
from trnlora.architecture import LlamaConfig
from trnlora.errors import UserError, run
from trnlora.files import atomic_dir, write_json
from trnlora.layout import check_divisible, shard_pieces
from trnlora.params import load_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=paths.PARAMS, metavar="FILE")
    args = parser.parse_args()
    convert = load_params(args.params).convert

    # The rules are checked before anything heavy is imported.
    config = LlamaConfig.from_folder(paths.MODEL)
    check_divisible(config, convert)

    os.environ["TQDM_DISABLE"] = "1"  # transformers' bars, before it is imported
    import torch
    from transformers import AutoModelForCausalLM

    from trnlora.backends.torch import TorchBackend, run_as_threads, thread_backends
    from trnlora.checkpoint import PRETRAINED_TAG, HFCheckpoint, load_rank, rank_file, save_rank
    from trnlora.llama import Llama

    started = time.perf_counter()
    with atomic_dir(paths.SHARDS) as partial:
        with HFCheckpoint(paths.MODEL) as source:
            for rank in track(range(convert.tp_size), description="writing shards"):
                pieces = shard_pieces(config, convert, rank)
                tensors = {name: source.assemble(parts) for name, parts in pieces.items()}
                save_rank(rank_file(partial, PRETRAINED_TAG, rank), tensors)
        convert_seconds = time.perf_counter() - started

        # A round trip back to HF proves nothing (NxD's own wrong order on trn2 survives it): run the shards.
        ids = torch.randint(config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(ids.shape[1])[None]

        @torch.no_grad()
        def rank_logits(backend: TorchBackend) -> torch.Tensor:
            shard = load_rank(rank_file(partial, PRETRAINED_TAG, backend.tp_rank))
            model = Llama.from_shard(config, backend, convert.kv_size_multiplier, shard)
            return model.logits(model(ids, positions, torch.ones_like(ids)))  # (1, T, V/tp)

        # KV groups reduce gradients only, and there are none here: each rank is its own.
        backends = thread_backends([[rank] for rank in range(convert.tp_size)])
        sharded = torch.cat(run_as_threads(backends, rank_logits), dim=-1)
        hf = AutoModelForCausalLM.from_pretrained(paths.MODEL, dtype=sharded.dtype, attn_implementation="eager")
        with torch.no_grad():
            difference = (sharded - hf(ids).logits).abs().max().item()
        if not difference <= convert.max_logits_diff:  # also when it is NaN
            raise UserError(
                f"the shards' logits differ from HF's by {difference:.3g}, above convert.max_logits_diff "
                f"{convert.max_logits_diff:g}: the shards were not kept; report this model's config"
            )
        size = sum(file.stat().st_size for file in partial.rglob("*.pt"))

    metrics = {"logits_max_abs_diff": difference, "shards": convert.tp_size, "size_gib": size / 2**30}
    write_json(paths.METRICS / "convert_nxd.json", metrics)
    seconds = {"convert_seconds": convert_seconds, "seconds": time.perf_counter() - started}
    write_json(paths.METRICS / "timing" / "convert_nxd.json", seconds)
    print(f"{convert.tp_size} shards in {paths.SHARDS}, largest logit difference to HF {difference:.2g}")


if __name__ == "__main__":
    run(main)
