"""The engine's process on a device that fails, once the file named in FAILING_DEVICE exists.

`python failing_engine.py -m jaxserve.engine_process ADDRESS`: stands in for the interpreter.
"""

import os
import pathlib
import sys

from jaxserve import engine_process
from jaxserve.runner import Runner

read, switch = Runner.read, pathlib.Path(os.environ["FAILING_DEVICE"])


def read_or_fail(self, fresh):
    if switch.exists():
        raise RuntimeError("injected")
    return read(self, fresh)


if __name__ == "__main__":
    Runner.read = read_or_fail
    sys.argv[1:] = sys.argv[3:]
    engine_process.main()
