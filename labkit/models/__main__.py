"""Fetch a named model from the command line; quick when it is there already.

python -m labkit.models fetch smollm2-135m
"""

import sys

from labkit.models.fetching import SOURCES, ModelUnavailable, fetch


def main() -> None:
    if sys.argv[1:2] != ["fetch"] or len(sys.argv) != 3 or sys.argv[2] not in SOURCES:
        sys.exit(f"usage: python -m labkit.models fetch NAME, with NAME one of: {', '.join(SOURCES)}")
    try:
        print(f"{sys.argv[2]} is in {fetch(sys.argv[2])}")
    except ModelUnavailable as problem:
        sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
