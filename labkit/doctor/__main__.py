"""The door to the doctor from the command line; see `labkit.doctor.command`."""

import sys

from labkit.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
