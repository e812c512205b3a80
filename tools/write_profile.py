"""Write params.yaml from a profile, whole and with comments: the profile's values in the default profile's file.

    python tools/write_profile.py NAME      (make profile NAME=llama3-8b-trn2-nxd)

Reads   profiles/
Writes  params.yaml
"""

from trnlora import paths
from trnlora.cli import script_parser
from trnlora.errors import UserError, run
from trnlora.profiles import PROFILES, profile_names, write_profile


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="a file of profiles/, without .yaml")
    args = parser.parse_args()
    known = profile_names()
    if args.name not in known:
        raise UserError(f"no profile '{args.name}': use NAME= with one of {' '.join(known)}")
    write_profile(args.name)
    print(
        f"{paths.PARAMS} is now {PROFILES / args.name}.yaml; 'git diff {paths.PARAMS}' shows the change, "
        "'make doctor' checks it"
    )


if __name__ == "__main__":
    run(main)
