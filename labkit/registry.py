"""The door to a registry of adapters (`labkit.serving.registry`) from the command line.

    export LABKIT_REGISTRY=~/adapters
    python -m labkit.registry init --base tiny-llama
    python -m labkit.registry publish support runs/support --owner ann --result tickets.exact_match=0.81
    python -m labkit.registry alias support@production 1
    python -m labkit.registry rollback support@production --note "wrong refunds"

`python -m labkit.registry --help` lists the rest.
"""

import sys

from labkit.serving.commands import main

if __name__ == "__main__":
    sys.exit(main())
