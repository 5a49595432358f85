"""The command line, made from the fields of `ServerConfig`."""

import argparse
import os
import sys

import jaxserve
from jaxserve.config import ServerConfig
from jaxserve.flags import add_flags, take
from jaxserve.server.ignored_flags import IGNORED

USAGE = """usage: jaxserve COMMAND [OPTIONS]

commands:
  serve      serve a model over HTTP (jaxserve serve --help)
  replay     execute a recorded run again and compare its tokens (jaxserve replay --help)
  convert    write a checkpoint as orbax or as safetensors (jaxserve convert --help)
  experts    show a recorded expert distribution (jaxserve experts --help)
  bench      measure an engine or a server (jaxserve bench --help)

options:
  --version  print the version
"""


def main(arguments: list[str] | None = None) -> int:
    """The `jaxserve` command; returns its exit status."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "serve":
        return serve(rest)
    if command == "replay":
        from jaxserve.replay import main as replay  # it loads jax

        return replay(rest)
    if command == "convert":
        from jaxserve.convert import main as convert  # it loads jax

        return convert(rest)
    if command == "experts":
        from jaxserve.experts import main as experts  # it loads numpy

        return experts(rest)
    if command == "bench":
        from jaxserve.bench.cli import main as bench  # it may load the engine, which loads jax

        return bench(rest)
    if command in ("--version", "-V"):
        print(f"jaxserve {jaxserve.__version__}")
        return 0
    is_help = command in ("--help", "-h", "help")
    print(USAGE if is_help else f"jaxserve: unknown command {command!r}\n\n{USAGE}", end="")
    return 0 if is_help else 2


def serve(arguments: list[str]) -> int:
    config, ignored = parse(arguments)
    from jaxserve.server.lifecycle import run  # not for --help: sanic and zmq take their time

    return run(config, ignored)


def parse(arguments: list[str]) -> tuple[ServerConfig, list[str]]:
    """The configuration, and the flags given that mean nothing here. Exits 2 on a bad flag."""
    parser = make_parser()
    values = vars(parser.parse_args(arguments))
    ignored = [flag for flag in IGNORED if values.pop(_dest(flag), None) is not None]
    try:
        return take(ServerConfig, values), ignored
    except ValueError as error:
        parser.error(str(error))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxserve serve",
        description="Serve a model over HTTP: SGLang's native API, from JAX.",
        epilog="Flags have SGLang's names and meaning.",
    )
    add_flags(parser, ServerConfig)
    if folder := os.environ.get("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"):
        parser.set_defaults(expert_distribution_recorder_dir=folder)
    for flag in IGNORED:
        parser.add_argument(flag, dest=_dest(flag), nargs="*", default=None, help=argparse.SUPPRESS)
    return parser


def _dest(flag: str) -> str:
    return "ignored" + flag.replace("-", "_")
