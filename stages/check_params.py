"""Check the params as a whole before any other stage runs, and so before DVC deletes what another stage has written.

    python stages/check_params.py [--params FILE]

Params that `dvc exp run --set-param` has written into the working tree, and that are refused, do not stay there:
params.yaml is again as it was before.

Reads   params.yaml, dvc.yaml; the model's config.json where it is on this machine
Writes  artifacts/params_checked, always the same bytes: when it runs again, the stages after it do not
"""

from trnlora import paths
from trnlora.cli import add_params, script_parser
from trnlora.errors import UserError, run
from trnlora.files import atomic_file
from trnlora.params import load_params
from trnlora.preflight.experiment import restore_params
from trnlora.preflight.whole_params import check_whole


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    args = parser.parse_args()
    try:
        check_whole(load_params(args.params))
    except UserError as error:
        if args.params == paths.PARAMS and restore_params():
            raise UserError(f"{error} ({paths.PARAMS} is again as it was before `dvc exp run`)") from None
        raise
    with atomic_file(paths.PARAMS_CHECKED) as partial:
        partial.write_text("The params were checked.\n", "utf-8")


if __name__ == "__main__":
    run(main)
