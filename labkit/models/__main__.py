"""Fetch a named model from the command line; quick when it is there already.

python -m labkit.models fetch smollm2-135m
"""

import sys

from labkit.models.fetching import SOURCES, ModelUnavailable, fetch

INTERRUPTED = 130  # the exit status after Ctrl-C: 128 and the number of the signal


def main() -> None:
    if sys.argv[1:2] != ["fetch"] or len(sys.argv) != 3 or sys.argv[2] not in SOURCES:
        sys.exit(f"usage: python -m labkit.models fetch NAME, with NAME one of: {', '.join(SOURCES)}")
    try:
        print(f"{sys.argv[2]} is in {fetch(sys.argv[2])}")
    except (ModelUnavailable, ValueError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        print(
            "stopped: nothing was installed, and nothing is left over; run it again to fetch it",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
