"""Convert the HF folder to NxD's tensor-parallel shards, and verify them: sharded logits equal HF's.

    python stages/convert_nxd.py [--params FILE]
    python stages/convert_nxd.py --to-hf DIR [--shards DIR] [--params FILE]    the reverse, to a new HF folder

Reads   artifacts/model (HF folder)
Writes  artifacts/shards/pretrained_weight/model/dp_rank_00_tp_rank_RR_pp_rank_00.pt, one file per rank,
        metrics/convert_nxd.json, metrics/timing/convert_nxd.json

`nxd.load_checkpoint("artifacts/shards", tag="pretrained_weight")` reads the result on Trainium. Weights are moved in
blocks of convert.buffer_mib and verified layer by layer, so memory does not grow with the model.
"""

import contextlib
import time
from pathlib import Path

from trnlora import paths
from trnlora.cli import add_params, script_parser
from trnlora.errors import UserError, run
from trnlora.files import SUMS, check_sums, check_unlocked, locked, partial_path, write_sums
from trnlora.metrics import stage_outputs, write_metrics
from trnlora.model.config import ModelConfig
from trnlora.params import Convert, load_params
from trnlora.weights.nxd_layout import check_divisible

CHECKED_TOKENS = 16


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    parser.add_argument("--to-hf", type=Path, metavar="DIR", help="write the shards back as an HF folder to DIR")
    parser.add_argument("--shards", type=Path, default=paths.SHARDS, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()
    convert = load_params(args.params).convert
    if args.to_hf:
        with locked(paths.MODEL, shared=True), locked(args.shards, shared=True):
            to_hf(convert, args.shards, args.to_hf)
    else:
        to_nxd(convert)


def to_nxd(convert: Convert) -> None:
    started = time.perf_counter()
    with stage_outputs("convert_nxd", [paths.SHARDS], reads=[paths.MODEL]):
        config = read_config(convert)
        # The check of the logits reads the same weights as the conversion, so it would not notice damage in them.
        check_sums(paths.MODEL, "fetch_model")

        from trnlora.weights.convert import GIB, write_shards

        converting = time.perf_counter()
        partial = partial_path(paths.SHARDS)
        size = write_shards(paths.MODEL, partial, config, convert)
        convert_seconds = time.perf_counter() - converting
        print("comparing the shards' logits with HF's", flush=True)
        difference = logits_difference(partial, config, convert)
        if not difference <= convert.max_logits_diff:  # also when it is NaN
            raise UserError(
                f"the shards' logits differ from HF's by {difference:.3g}, above convert.max_logits_diff "
                f"{convert.max_logits_diff:g}: the shards were not kept; report this model's config"
            )
        write_sums(partial)
        metrics = {
            "logits_max_abs_diff": difference,
            "checked_tokens": CHECKED_TOKENS,
            "checked_layers": config.num_hidden_layers,
            "checked_vocabulary": config.vocab_size,
            "shards": convert.tp_size,
            "size_gib": size / GIB,
        }
        timing = {"convert_seconds": convert_seconds, "seconds": time.perf_counter() - started}
        write_metrics("convert_nxd", metrics, timing)
    print(f"{convert.tp_size} shards in {paths.SHARDS}, largest logit difference to HF {difference:.2g}")


def read_config(convert: Convert) -> ModelConfig:
    """The model's config. Raises UserError, before anything heavy is imported, if the model cannot be cut that way."""
    config = ModelConfig.from_folder(paths.MODEL)
    check_divisible(config, convert)
    return config


def logits_difference(shards: Path, config: ModelConfig, convert: Convert) -> float:
    """Run the shards' model, a thread per rank, and HF's on random tokens; the largest difference of their logits."""
    import torch

    from trnlora.backends.torch import run_as_threads, thread_backends
    from trnlora.weights.storage import PRETRAINED_TAG, open_rank_file, rank_file
    from trnlora.weights.verify_logits import max_logits_difference

    ids = torch.randint(config.vocab_size, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
    # KV groups reduce gradients only, and there are none here: each rank is a group of its own.
    backends = thread_backends([[rank] for rank in range(convert.tp_size)])
    with contextlib.ExitStack() as files:
        ranks = [
            files.enter_context(open_rank_file(rank_file(shards, PRETRAINED_TAG, rank)))
            for rank in range(convert.tp_size)
        ]
        return max_logits_difference(
            paths.MODEL, config, ranks, convert.kv_size_multiplier, ids, lambda work: run_as_threads(backends, work)
        )


def to_hf(convert: Convert, shards: Path, folder: Path) -> None:
    config = read_config(convert)
    check_unlocked(folder)

    from trnlora.weights.convert import write_hf_folder

    check_sums(paths.MODEL, "fetch_model", without=(".safetensors",))
    if (shards / SUMS).exists():  # shards of NxD's own converter have none
        check_sums(shards, "convert_nxd")
    write_hf_folder(shards, paths.MODEL, folder, config, convert)
    print(f"HF folder in {folder}")


if __name__ == "__main__":
    run(main)
