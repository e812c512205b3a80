"""Turn the rows of a data set into packed, tokenized training rows with labels only on the responses.

    python stages/prepare_data.py [--params FILE]
    python stages/prepare_data.py --show 3      # print examples, the masked part dimmed; writes nothing

Reads   params.yaml (data), what data.source and data.prompt_template name, artifacts/model (the tokenizer)
Writes  artifacts/prepared/{train,validation}.parquet   packed rows of data.seq_len tokens
        artifacts/prepared/{validation,test}.jsonl      one example per line, with its prompt and token ids
        artifacts/prepared/sources.json                 the files of the data, their sha256 and what was found in them
        artifacts/prepared/prepared.json                the template as it was used, and the params
        metrics/prepare_data.json, metrics/timing/prepare_data.json
"""

import tempfile
import time
from pathlib import Path

from trnlora import paths
from trnlora.cli import add_params, script_parser, whole_number
from trnlora.data import prepare
from trnlora.data.encode import RowEncoder
from trnlora.data.examples import PREPARED_WITH, SOURCES, PreparedWith
from trnlora.data.rows import file_table
from trnlora.data.source_files import data_sources, open_sources
from trnlora.data.template_checks import check_template
from trnlora.data.templates import load_template
from trnlora.data.tokenizer import load_fetched_tokenizer
from trnlora.data.tracking import check_tracked
from trnlora.errors import run
from trnlora.files import locked, partial_path, write_json, write_sums
from trnlora.metrics import stage_outputs, write_metrics
from trnlora.model.config import ModelConfig
from trnlora.params import load_params


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    parser.add_argument(
        "--show", type=whole_number(1, 10**6), metavar="N", help="print N training examples and write nothing"
    )
    args = parser.parse_args()
    started = time.perf_counter()

    params = load_params(args.params).data
    outputs = stage_outputs("prepare_data", [paths.PREPARED], reads=[paths.MODEL])
    temporary = tempfile.TemporaryDirectory(prefix="prepare-data-")
    with outputs if args.show is None else locked(paths.MODEL, shared=True), temporary as folder:
        check_tracked(params)
        tokenizer = load_fetched_tokenizer(paths.MODEL)
        ModelConfig.from_folder(paths.MODEL).check_seq_len(params.seq_len)
        template = load_template(params.prompt_template, params.template_kwargs, tokenizer)
        check_template(template, params.template_kwargs, tokenizer)
        encoder = RowEncoder(
            tokenizer, template, params.seq_len, params.overlong, params.mask_history, params.special_tokens
        )
        chosen = prepare.choose_rows(open_sources(data_sources(params), Path(folder)), params)
        if args.show is not None:
            prepare.print_examples(chosen, encoder, args.show)
            return

        out = partial_path(paths.PREPARED)
        splits = prepare.encode_all(chosen, encoder, out)
        counts = prepare.write_splits(splits, chosen, encoder, params, out)
        write_json(out / SOURCES, file_table(chosen.files))
        made_with = PreparedWith(template=template, params=params.model_dump(mode="json"))
        write_json(out / PREPARED_WITH, made_with.model_dump())
        write_sums(out)
        metrics = prepare.dataset_metrics(chosen, splits, counts)
        write_metrics("prepare_data", metrics, {"seconds": time.perf_counter() - started})
    prepare.print_counts(metrics)
    prepare.print_warnings(chosen, splits, params)


if __name__ == "__main__":
    run(main)
