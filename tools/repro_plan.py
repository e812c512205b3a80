"""Print which stages `dvc repro` would run, and about how long they take by the times of the last run.

    python tools/repro_plan.py        (in make repro)

A stage does not run after all if what it depends on comes out the same, or if DVC's run cache has its results.

Reads   what `dvc status` reads, metrics/timing/*.json
"""

from trnlora.cli import script_parser
from trnlora.errors import UserError, run
from trnlora.metrics import timing_file
from trnlora.readers import read_json


def main() -> None:
    script_parser(__doc__).parse_args()
    names = stages_to_run()
    if not names:
        print("every stage is up to date")
        return
    seconds = {name: last_seconds(name) for name in names}
    shown = [f"{name} ({duration(of)})" if of is not None else name for name, of in seconds.items()]
    known = [of for of in seconds.values() if of is not None]
    total = f", in at most about {duration(sum(known))} by the last run's times" if known else ""
    print(f"to run{total}: {', '.join(shown)}")


def stages_to_run() -> list[str]:
    """The stages that have changed, and those that depend on them, in the order in which they run."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.reproduce import plan_repro

    try:
        with Repo() as repo:
            changed = repo.status()
            graph = repo.index.graph  # an edge from each stage to those that it depends on
            found: list[str] = []
            for stage in plan_repro(graph):
                if stage.addressing in changed or any(needed.addressing in found for needed in graph.successors(stage)):
                    found.append(stage.addressing)
            return found
    except DvcException as error:
        raise UserError(" ".join(str(error).split())) from None


def last_seconds(stage: str) -> float | None:
    """How long the last run of a stage took; None if it is not known."""
    if not timing_file(stage).is_file():
        return None
    try:
        seconds = read_json(timing_file(stage)).get("seconds")
    except (UserError, AttributeError):  # the run writes it again
        return None
    return float(seconds) if isinstance(seconds, int | float) else None


def duration(seconds: float) -> str:
    """As in `26 s` and `4 min`."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    run(main)
