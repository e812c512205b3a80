"""Write the trained adapter and a model card to a folder that can be uploaded to the Hugging Face hub.

    python tools/card.py [--base ORG/NAME]        (make card BASE=ORG/NAME)
    make push REPO=ORG/ADAPTER                    (the next step; or `hf upload ORG/ADAPTER reports/adapter`)

--base names the base model on the hub if model.source is not hf://. PEFT and vLLM load the adapter onto it, so it must
be the same model.

Refused where the results are not those of the present params, data and code, or not what a run wrote.

Reads   dvc.lock and the files that it names, metrics/, artifacts/adapter, artifacts/answers.jsonl
Writes  reports/adapter: the adapter's files and README.md
"""

from trnlora.cli import script_parser
from trnlora.errors import run
from trnlora.params import load_params
from trnlora.reporting.card import FOLDER, write_card_folder
from trnlora.reporting.results import load_results


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--base", metavar="ORG/NAME", help="the base model on the hub (default: that of model.source)")
    args = parser.parse_args()
    base = write_card_folder(load_params(), load_results(), args.base)
    print(f"adapter and card in {FOLDER}; next: make push REPO=ORG/NAME, which shows what would be uploaded")
    if not base:
        print("the card names no base model because model.source is not on the hub: name it with BASE=ORG/NAME")


if __name__ == "__main__":
    run(main)
