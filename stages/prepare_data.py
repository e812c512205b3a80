"""Turn the rows of a data set into packed, tokenized training rows with labels on the responses alone.

    python stages/prepare_data.py [--params FILE]
    python stages/prepare_data.py --show 3      # print examples, the masked part dimmed; writes nothing

Reads   params.yaml (data), the data set, artifacts/model (the tokenizer)
Writes  artifacts/prepared/{train,validation}.parquet   packed rows of data.seq_len tokens
        artifacts/prepared/{validation,test}.jsonl      one example a line, with its prompt and token ids
        metrics/prepare_data.json, metrics/timing/prepare_data.json
"""

import argparse
import contextlib
import functools
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trnlora import paths
from trnlora.errors import UserError, run
from trnlora.files import check_sums

if TYPE_CHECKING:
    from trnlora.params import Data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=paths.PARAMS, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--show", type=int, metavar="N", help="print N training examples and write nothing")
    args = parser.parse_args()
    if args.show is not None and args.show < 1:
        parser.error("--show wants a number of at least 1")
    started = time.perf_counter()

    from trnlora.data import rows as data
    from trnlora.files import atomic_dir, write_json, write_sums
    from trnlora.params import load_params

    params = load_params(args.params).data
    source = data.fetch(params.source, params.sha256)
    with data.process_pool(source) as pool:
        rows = data.read_keys(source, params.seed, pool)
    chosen = data.keep_categories(rows, params.categories)
    splits = data.split_rows(chosen, params.test_fraction, params.validation_fraction)
    read, wanted = len(rows), {name: len(members) for name, members in splits.items()}
    codes = data.split_codes(splits, rows[-1].id)
    del rows, chosen, splits  # of a million rows, hundreds of MiB

    tokenizer = load_tokenizer(paths.MODEL)
    chunks = data.chunks(source)
    ends = [chunk.line for chunk in chunks[1:]] + [len(codes)]
    options = (params.prompt_template, params.seq_len, params.overlong)
    tasks = [(source, chunk, codes[chunk.line : end], *options) for chunk, end in zip(chunks, ends, strict=True)]
    encode_here = functools.partial(data.encode_chunk, tokenizer=tokenizer)
    if args.show is not None:
        show(source, codes, tokenizer, params, args.show)
        return

    # Padding is neither attended to nor learnt, so any token will do where the tokenizer has none of its own.
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    metrics: dict[str, Any] = {"rows_read": read, "rows_dropped": 0, "rows_truncated": 0}
    categories: Counter[str] = Counter()
    responses: dict[str, list[str]] = {split: [] for split in wanted}
    with atomic_dir(paths.PREPARED) as out:
        documents = {split: data.Documents(out) for split in wanted}
        with contextlib.ExitStack() as stack:
            files = {
                split: stack.enter_context((out / f"{split}.jsonl").open("w", encoding="utf-8"))
                for split in ("validation", "test")
            }
            pool = stack.enter_context(data.process_pool(source, tokenizer))
            for parts in data.in_order(pool, data.encode_chunk if pool else encode_here, tasks):
                for split, part in zip(wanted, parts, strict=True):
                    documents[split].add(part)
                    if split in files:
                        files[split].write(part.records)
                    categories += part.categories
                    responses[split] += part.responses[: data.STATISTICS_ROWS - len(responses[split])]
                    metrics["rows_dropped"] += part.overlong.dropped
                    metrics["rows_truncated"] += part.overlong.truncated
        for split, members in documents.items():
            members.close()
            if not members:
                raise UserError(
                    f"all {wanted[split]} {split} rows exceed data.seq_len {params.seq_len} tokens: raise it"
                )
            lengths = members.lengths
            counts: dict[str, float] = {
                "rows": len(members),
                "tokens": int(lengths.sum()),
                "labelled_tokens": members.labelled,
            }
            if split != "test":
                packed = data.pack(members, lengths, params.seq_len, pad, params.packing, params.seed)
                packed_rows = data.write_parquet(out / f"{split}.parquet", packed)
                counts["packed_rows"] = packed_rows
                counts["padding_fraction"] = round(1 - counts["tokens"] / (packed_rows * params.seq_len), 4)
            metrics[split] = counts
        write_sums(out)
    metrics["rows_by_category"] = dict(sorted(categories.items()))
    first = [response for members in responses.values() for response in members]
    metrics["responses"] = data.response_statistics(first[: data.STATISTICS_ROWS])
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


def show(source: Path, codes: bytes, tokenizer: Any, params: "Data", number: int) -> None:
    """Print training examples from their token ids, so that what is seen is what is trained on.

    The masked part is dim and the learnt part bold green; where there is no colour, the learnt part stands in ⟦ ⟧.
    """
    from rich.console import Console
    from rich.text import Text

    from trnlora.data import rows as data

    console = Console(highlight=False)
    left, right = ("", "") if console.color_system else ("⟦", "⟧")
    for chunk in data.chunks(source):
        rows = [row for row in data.read_rows(source, chunk) if codes[row.id] == 1][:number]
        examples, _ = data.encode(rows, tokenizer, params.prompt_template, params.seq_len, params.overlong)
        for example in examples:
            masked, learnt = len(example.prompt_ids), len(example.response_ids)
            console.rule(f"line {example.row.id} · {example.row.category} · {masked} masked, {learnt} learnt")
            text = Text(tokenizer.decode(example.prompt_ids), style="dim")
            text.append(left + tokenizer.decode(example.response_ids) + right, style="not dim bold green")
            console.print(text, soft_wrap=True)
        number -= len(examples)
        if not number:
            return


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
