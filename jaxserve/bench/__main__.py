"""`python -m jaxserve.bench offline ...`: as `jaxserve bench offline ...`."""

import sys

from jaxserve.bench.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
