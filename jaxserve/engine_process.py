"""The engine as a process of its own: `python -m jaxserve.engine_process ADDRESS`.

Started by `client`. The first line of standard input is the configuration; its end is the parent's
end, even a killed one's, and then this process ends too. Messages go over one socket, one message
per step for all requests.
"""

import contextlib
import logging
import os
import signal
import sys
import threading

import msgspec
import zmq

from jaxserve import logs, messages
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineDied

logger = logging.getLogger("jaxserve.engine_process")  # whose __name__ is __main__


def main() -> None:
    address = sys.argv[1]
    for number in (signal.SIGINT, signal.SIGTERM):
        # Sent to the whole process group, they are the parent's to act on: it lets requests finish.
        signal.signal(number, signal.SIG_IGN)
    config = EngineConfig(**msgspec.json.decode(sys.stdin.readline()))
    ending = contextlib.ExitStack()  # what is still to be done at the end, whatever brings it
    threading.Thread(target=_die_with_parent, args=(ending,), daemon=True).start()
    logs.set_up(config.log_level)
    configure_jax(config)
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(address)
    try:
        core = _start(config, socket)
        if core is not None:
            ending.callback(core.close)
            _serve(core, socket)
    except Exception as error:
        logger.exception("the engine failed")
        socket.send(messages.encode(messages.EngineFailed(str(EngineDied.of(error)))))
        sys.exit(1)
    finally:
        ending.close()
        socket.close(linger=1000)


def _die_with_parent(ending: contextlib.ExitStack) -> None:
    while sys.stdin.read(4096):
        pass
    try:
        ending.close()
    finally:
        os._exit(0)  # the parent is gone: nobody is left to answer, or to be told


def configure_jax(config: EngineConfig) -> None:
    """What jax reads from the environment when it is first imported; for a process that is ours."""
    if config.device != "auto":
        os.environ["JAX_PLATFORMS"] = config.device
    # The memory plan divides what JAX may take; three quarters, its default, is for notebooks.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    # JAX would take its share of every device that it sees, and one is used: the first of those
    # that the user lets us see.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    # XLA warns dozens of times per compile, of timers and of memory that the KV cache takes on
    # purpose; its errors are still shown.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def _start(config: EngineConfig, socket: zmq.Socket):
    from jaxserve.engine_builder import build_engine

    try:
        core = build_engine(config)
    except (ValueError, OSError, RuntimeError) as error:
        logger.debug("start failed", exc_info=True)
        socket.send(messages.encode(messages.StartFailed(str(error))))
        return None
    socket.send(messages.encode(messages.Ready(core.info)))
    return core


def _serve(core, socket: zmq.Socket) -> None:
    """The loop: take in all that has arrived, run a step, tell the news."""
    while True:
        while socket.poll(core.patience * 1000):
            for answer in core.handle(messages.decode_to_engine(socket.recv())):
                socket.send(messages.encode(answer))
        for news in core.settle():
            socket.send(messages.encode(news))
        output = core.step()
        if output is not None and output.updates:
            socket.send(messages.encode(output))


if __name__ == "__main__":
    main()
