"""Write the trained adapter, its card, metrics and params to one archive, for another machine or another person.

    python tools/bundle.py [--base ORG/NAME] [--out FILE]        (make bundle BASE=ORG/NAME)
    make serve BUNDLE=FILE                                       (there: it is checked, and served as `tuned`)

eval.adapter and lora.init_adapter take it too, as path://FILE. The base model is not in it: trnlora.json in it has the
digests of the model that it belongs to, and another one is refused. Refused as `make card` is.

Reads   what tools/card.py reads
Writes  reports/adapter (as `make card`), reports/bundle.tar.gz: adapter, README.md (the card), trnlora.json (the
        template and all that the adapter was trained with), params.yaml (of the run), metrics/, SHA256SUMS
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from trnlora.cli import script_parser
from trnlora.errors import run
from trnlora.evaluation.harness import RESULTS as HARNESS
from trnlora.files import sha256, write_json
from trnlora.metrics import metrics_file, stages
from trnlora.params import load_params
from trnlora.readers import read_json
from trnlora.reporting.card import FOLDER, write_card_folder
from trnlora.reporting.results import load_results, nested
from trnlora.sources import without_machine_path
from trnlora.weights.adapter_source import PARAMS, SUFFIX, write_bundle


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--base", metavar="ORG/NAME", help="the base model on the hub (default: that of model.source)")
    parser.add_argument(
        "--out", type=Path, default=Path(f"reports/bundle{SUFFIX}"), metavar="FILE", help="default: %(default)s"
    )
    args = parser.parse_args()
    now = load_results()
    write_card_folder(load_params(), now, args.base)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
        of_adapter = [HARNESS] if now.harness and now.harness.adapter == now.adapter else []
        for file in [*map(metrics_file, stages()), *of_adapter]:
            if file.exists():
                write_json(folder / file, for_others(read_json(file)))
        (folder / PARAMS).write_text(yaml.safe_dump(for_others(nested(now.params)), sort_keys=False), "utf-8")
        write_bundle(folder, args.out)
    size = args.out.stat().st_size / 2**20
    print(f"{args.out}: {size:.1f} MiB, sha256 {sha256(args.out)}; there: make serve BUNDLE={args.out.name}")


def for_others(value: Any) -> Any:
    """Params or metrics, without the folders of this machine."""
    if isinstance(value, dict):
        return {key: for_others(each) for key, each in value.items()}
    if isinstance(value, list):
        return [for_others(each) for each in value]
    return without_machine_path(value) if isinstance(value, str) else value


if __name__ == "__main__":
    run(main)
