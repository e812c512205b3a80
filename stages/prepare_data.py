"""Turn the rows of a data set into packed, tokenized training rows with labels on the responses alone.

    python stages/prepare_data.py [--params FILE]
    python stages/prepare_data.py --show 3      # print examples, the masked part dimmed; writes nothing

Reads   params.yaml (data), the data set, artifacts/model (the tokenizer)
Writes  artifacts/prepared/{train,validation}.parquet   packed rows of data.seq_len tokens
        artifacts/prepared/{validation,test}.jsonl      one example a line, with its prompt and token ids
        metrics/prepare_data.json, metrics/timing/prepare_data.json
"""

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trnlora import paths
from trnlora.errors import UserError, run
from trnlora.files import check_sums

if TYPE_CHECKING:
    from trnlora.data import Example


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=paths.PARAMS, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--show", type=int, metavar="N", help="print N training examples and write nothing")
    args = parser.parse_args()
    if args.show is not None and args.show < 1:
        parser.error("--show wants a number of at least 1")
    started = time.perf_counter()

    from trnlora import data
    from trnlora.files import atomic_dir, write_json, write_jsonl, write_sums
    from trnlora.params import load_params

    params = load_params(args.params).data
    rows = data.read_rows(data.fetch(params.source, params.sha256))
    chosen = data.keep_categories(rows, params.categories)
    splits = data.split_rows(chosen, params.test_fraction, params.validation_fraction, params.seed)

    tokenizer = load_tokenizer(paths.MODEL)
    examples: dict[str, list[Example]] = {}
    dropped = truncated = 0
    for split, its_rows in splits.items():
        examples[split], overlong = data.encode(
            its_rows, tokenizer, params.prompt_template, params.seq_len, params.overlong
        )
        if not examples[split]:
            raise UserError(f"all {len(its_rows)} {split} rows exceed data.seq_len {params.seq_len} tokens: raise it")
        dropped += overlong.dropped
        truncated += overlong.truncated

    if args.show is not None:
        show(examples["train"][: args.show], tokenizer)
        return

    # Padding is neither attended to nor learnt, so any token will do where the tokenizer has none of its own.
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    metrics: dict[str, Any] = {"rows_read": len(rows), "rows_dropped": dropped, "rows_truncated": truncated}
    with atomic_dir(paths.PREPARED) as out:
        for split, members in examples.items():
            counts: dict[str, float] = {
                "rows": len(members),
                "tokens": sum(len(example) for example in members),
                "labelled_tokens": sum(len(example.response_ids) for example in members),
            }
            if split != "test":
                packed = data.pack(members, params.seq_len, pad, params.packing, params.seed)
                data.write_parquet(out / f"{split}.parquet", packed)
                counts["packed_rows"] = len(packed)
                counts["padding_fraction"] = round(1 - counts["tokens"] / (len(packed) * params.seq_len), 4)
            if split != "train":
                write_jsonl(out / f"{split}.jsonl", [data.example_record(example) for example in members])
            metrics[split] = counts
        write_sums(out)
    everything = [example.row for members in examples.values() for example in members]
    metrics["rows_by_category"] = dict(sorted(Counter(row.category for row in everything).items()))
    metrics["responses"] = data.response_statistics([row.response for row in everything])
    write_json(paths.METRICS / "prepare_data.json", metrics)
    write_json(paths.METRICS / "timing" / "prepare_data.json", {"seconds": time.perf_counter() - started})
    report(metrics)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a HF folder. Raises UserError where there is none or it cannot be read."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} has no tokenizer: run stages/fetch_model.py first (`dvc repro prepare_data` does)")
    check_sums(folder, "fetch_model", without=(".safetensors",))
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({reason}); delete the folder and fetch again"
        ) from None


def show(examples: "list[Example]", tokenizer: Any) -> None:
    """Print examples from their token ids, so that what is seen is what is trained on.

    The masked part is dim and the learnt part bold green; where there is no colour, the learnt part stands in ⟦ ⟧.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    left, right = ("", "") if console.color_system else ("⟦", "⟧")
    for example in examples:
        masked, learnt = len(example.prompt_ids), len(example.response_ids)
        console.rule(f"line {example.row.id} · {example.row.category} · {masked} masked, {learnt} learnt")
        text = Text(tokenizer.decode(example.prompt_ids), style="dim")
        text.append(left + tokenizer.decode(example.response_ids) + right, style="not dim bold green")
        console.print(text, soft_wrap=True)


def report(metrics: dict[str, Any]) -> None:
    """A few lines on what was made."""
    for split in ("train", "validation", "test"):
        counts = metrics[split]
        line = f"{split}: {counts['rows']} rows, {counts['tokens']} tokens, {counts['labelled_tokens']} labelled"
        if "packed_rows" in counts:
            line += f", packed into {counts['packed_rows']} rows with {counts['padding_fraction']:.1%} padding"
        print(line)
    print(f"longer than data.seq_len: {metrics['rows_dropped']} dropped, {metrics['rows_truncated']} truncated")


if __name__ == "__main__":
    run(main)
