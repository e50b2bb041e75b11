"""Try claims of the papers on low-rank adaptation on real models; see `claims/`.

Each claim prints a table and writes it, as JSON with a picture, into `--out`. Every training run is
kept in `--runs`: one that is there is not made again, so that a claim that was interrupted goes on.
"""

import argparse
import importlib
import time
from pathlib import Path

from claims import side_by_side
from claims.lab import Lab

CLAIMS = {
    "rates": "learning rates of LoRA and of full fine-tuning, and alpha as the rank grows",
    "ranks_and_weights": "rank 1 to 64, and which weights for an equal number of parameters",
    "subspaces": "directions that adapters of other ranks and seeds have in common",
    "amplification": "how strong the weight is in the directions of an adapter",
    "full_update": "the rank of what full fine-tuning changes",
    "dimension": "random directions that a task needs",
    "latency": "seconds of merged and unmerged adapters, and of changing the task",
    "fine_tuning": "LoRA, full fine-tuning, BitFit, a head alone and a probe, on four tasks",
}
LONGEST_FIRST = ("definitions", "fashion", "glosses", "sentiment")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "claims"


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    width = max(map(len, CLAIMS))
    lines = (f"  {name:{width}}  {about}" for name, about in CLAIMS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["claims:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("claims", nargs="+", choices=[*CLAIMS, "all"], metavar="claim")
    parser.add_argument("--quick", action="store_true", help="few steps of small models, one seed")
    parser.add_argument("--seeds", type=int, default=3, help="training runs of each kind")
    parser.add_argument("--processes", type=int, default=1, help="train so many runs at once")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="to go on from")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results")
    options = parser.parse_args()
    for name in ("seeds", "processes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more: got {getattr(options, name)}")
    return options


def main() -> None:
    """Try the claims that are named."""
    options, begun = parse(), time.monotonic()
    lab = Lab(options.runs, range(1 if options.quick else options.seeds), quick=options.quick)
    names = CLAIMS if "all" in options.claims else options.claims
    claims = {name: importlib.import_module(f"claims.{name}") for name in names}
    if options.processes > 1:
        wanted = [each for claim in claims.values() for each in claim.needs(lab).values()]
        wanted.sort(  # what other runs take their rate from comes before them
            key=lambda each: (LONGEST_FIRST.index(each.task), each.chosen_by != each.arm)
        )
        side_by_side.make(lab, wanted, options.processes)
    for name, claim in claims.items():
        print(f"== {name}: {CLAIMS[name]}", flush=True)
        report = claim.run(lab)
        print(report.markdown())
        report.save(options.out / f"{name}.json")
    print(f"== {(time.monotonic() - begun) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
