"""Upload the trained adapter and its card to the Hugging Face hub. Without --upload it only shows what would change.

    HF_TOKEN=… python tools/push.py [--base ORG/NAME] [--upload] ORG/NAME        (make push REPO=ORG/NAME UPLOAD=1)

A repository that is not there is created as a private one. One commit holds all that is sent: the files that the hub
does not have yet. Other files of the repository stay. The token comes from the environment only. Refused as `make card`
is.

Reads   what tools/card.py reads
Writes  reports/adapter (as `make card`); with --upload, the repository
"""

import os

from trnlora.cli import script_parser
from trnlora.errors import UserError, run
from trnlora.params import load_params
from trnlora.reporting.card import FOLDER, check_hub_name, write_card_folder
from trnlora.reporting.hub import NEW, SAME, states_on_hub, upload
from trnlora.reporting.results import load_results


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--base", metavar="ORG/NAME", help="the base model on the hub (default: that of model.source)")
    parser.add_argument("--upload", action="store_true", help="upload; without it nothing is sent")
    parser.add_argument("repo", metavar="ORG/NAME", help="the adapter's repository")
    args = parser.parse_args()
    if "/" not in args.repo:
        raise UserError(f"REPO={args.repo or '…'}: write the repository as org/name")
    check_hub_name(args.repo)
    base = write_card_folder(load_params(), load_results(), args.base)
    if not base:
        print("the card names no base model because model.source is not on the hub: name it with BASE=ORG/NAME")
    found = states_on_hub(FOLDER, args.repo)
    if found is None:
        print(f"{args.repo}: would be created, as a private repository")
        if not os.environ.get("HF_TOKEN"):
            print("  unless there is a private one already: HF_TOKEN is not set")
    else:
        print(f"{args.repo}: a repository of the hub")
    states = found or dict.fromkeys(sorted(path.name for path in FOLDER.iterdir()), NEW)
    for name, state in states.items():
        print(f"  {state:8} {name} ({(FOLDER / name).stat().st_size / 1024:,.0f} KiB)")
    names = [name for name, state in states.items() if state != SAME]
    if not names:
        print("the hub has all of it: nothing to upload")
    elif args.upload:
        print(f"uploaded: {upload(FOLDER, names, args.repo)}")
    else:
        print("nothing was uploaded: UPLOAD=1 uploads")


if __name__ == "__main__":
    run(main)
