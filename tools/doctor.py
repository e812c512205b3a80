"""Check that the pipeline and the server can run on this machine: a line per check, exit code 1 if one fails.

    python tools/doctor.py [--params FILE | --profile NAME]        (make doctor)
    python tools/doctor.py --repro                (in make repro: not the server's port; prints failures only)

Takes about a second, or longer to reach the hub for a model that is not fetched yet.
"""

from trnlora.cli import add_params_or_profile, chosen_params, script_parser
from trnlora.errors import UserError, run
from trnlora.preflight.doctor import run_checks


def main() -> None:
    parser = script_parser(__doc__)
    add_params_or_profile(parser)
    parser.add_argument("--repro", action="store_true", help="only what `make repro` needs; print failures only")
    args = parser.parse_args()
    if not run_checks(chosen_params(args), repro=args.repro, quiet=args.repro):
        raise UserError(
            f"{args.profile or args.params} cannot run on this machine: fix the lines with ✗, then run `make doctor`"
        )


if __name__ == "__main__":
    run(main)
