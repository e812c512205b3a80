"""Print the size of a run before it is paid for: ranks, bytes per core, steps, collectives, and the instance it needs.

    python tools/plan.py [--params FILE | --profile NAME] [--nodes N …] [--search]
    make plan PROFILE=llama3-8b-trn2-nxd NODES="1 2 4"
    make plan PROFILE=llama3-8b-trn2 SEARCH=1

By arithmetic alone, on any machine and offline, in about a second; docs/scale.md explains it.
"""

from trnlora.cli import add_params_or_profile, chosen_params, script_parser, whole_number
from trnlora.errors import run
from trnlora.preflight.describe import describe, print_nodes, print_search
from trnlora.preflight.known_models import model_config
from trnlora.weights.nxd_layout import check_divisible

MAX_NODES = 10_000


def main() -> None:
    parser = script_parser(__doc__)
    add_params_or_profile(parser)
    parser.add_argument(
        "--nodes",
        type=whole_number(1, MAX_NODES),
        nargs="+",
        action="extend",
        metavar="N",
        help=f"also print the same global batch on N instances, 1 to {MAX_NODES}",
    )
    parser.add_argument(
        "--search", action="store_true", help="also rank all layouts that fit the instance by a modelled step time"
    )
    args = parser.parse_args()
    params = chosen_params(args)
    config = model_config(params)
    check_divisible(config, params.convert)
    for line in describe(params, config):
        print(line)
    if args.nodes:
        print_nodes(params, config, args.nodes)
    if args.search:
        print_search(params, config)


if __name__ == "__main__":
    run(main)
