"""Measure on a GPU everything that only a GPU can show, in one command, without a network; or rehearse it on a CPU.

    make gpu                                   # all that is not measured yet, for at most 8 minutes
    python scripts/gpu_day.py --only ledger    # one section
    python scripts/gpu_day.py --again ledger   # measure it anew

Sections run one after the other, each in a process of its own: what breaks one leaves the next a clean GPU. A record is
written after every measurement, to `data/results/gpu/NAME-OF-THE-CARD/SECTION.json`; a run that was stopped goes on where it
was. Without a GPU the same measurements are taken in small shapes on the CPU: a rehearsal, whose records are in `build/gpu`,
and which no lesson reads.

Nothing is installed and nothing is fetched. It needs Python 3.11, torch 2.11, transformers 5.17, numpy and safetensors, each or
newer; what else is missing is named, with what goes without it.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

SECTIONS = ("kernels", "ledger", "steps", "paging", "finetune", "serving")
NEEDED = {"torch": (2, 11), "transformers": (5, 17), "numpy": (1, 0), "safetensors": (0, 4)}


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; the exit status is 0 if nothing failed."""
    options = parse(arguments)
    if problem := what_is_missing():
        print(f"error: {problem}", file=sys.stderr)
        return 2
    try:
        from gpu import day

        return day.run_section(options) if options.section else day.run(options, __file__)
    except KeyboardInterrupt:
        if not options.section:
            print("\nstopped; the same command goes on with what is left", file=sys.stderr)
        return 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    first = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(
        description=first, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--only",
        choices=SECTIONS,
        nargs="+",
        default=list(SECTIONS),
        metavar="SECTION",
        help=", ".join(SECTIONS),
    )
    parser.add_argument(
        "--again", choices=SECTIONS, nargs="+", default=[], metavar="SECTION", help="measure these anew"
    )
    parser.add_argument(
        "--minutes", type=positive, default=8.0, help="of the whole day; what is left waits for the next run"
    )
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU, also where there is a GPU")
    parser.add_argument(
        "--results", type=Path, help="folder for the records, instead of data/results/gpu or build/gpu"
    )
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--after-death", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def positive(text: str) -> float:
    """A number of minutes above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")
    return value


def what_is_missing() -> str:
    """Which needed package is missing or too old, in one sentence; empty if none is."""
    import importlib.metadata

    if sys.version_info < (3, 11):
        return f"this is Python {sys.version.split()[0]}; Python 3.11 or newer is needed"
    for package, least in NEEDED.items():
        wanted = ".".join(map(str, least))
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed; {package} {wanted} or newer is needed"
        if tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit()) < least:
            return f"{package} {found} is too old; {wanted} or newer is needed"
    return ""


if __name__ == "__main__":
    sys.exit(main())
