"""`python -m jaxserve.server --model-path ...`: as `jaxserve serve ...`."""

import sys

from jaxserve.server.cli import serve

if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
