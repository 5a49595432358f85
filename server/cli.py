"""The command line, made from the fields of `ServerConfig`."""

import argparse
import dataclasses
import subprocess
import sys
import types
import typing
from typing import Any

import jaxserve
from jaxserve.config import ServerConfig
from jaxserve.server.ignored_flags import IGNORED

USAGE = """usage: jaxserve COMMAND [OPTIONS]

commands:
  serve      serve a model over HTTP (jaxserve serve --help)
  replay     execute a recorded run again and compare its tokens (jaxserve replay --help)

options:
  --version  print the version
"""


def main(arguments: list[str] | None = None) -> int:
    """The `jaxserve` command; returns its exit status."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "serve":
        return serve(rest)
    if command == "replay":
        return replay(rest)
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


def replay(arguments: list[str]) -> int:
    """In a process of its own, because it loads jax."""
    try:
        return subprocess.run([sys.executable, "-m", "jaxserve.replay", *arguments]).returncode
    except KeyboardInterrupt:
        return 130  # both have got it


def parse(arguments: list[str]) -> tuple[ServerConfig, list[str]]:
    """The configuration, and the flags given that mean nothing here. Exits 2 on a bad flag."""
    parser = make_parser()
    values = vars(parser.parse_args(arguments))
    ignored = [flag for flag in IGNORED if values.pop(_dest(flag), None) is not None]
    try:
        return ServerConfig(**values), ignored
    except ValueError as error:
        parser.error(str(error))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxserve serve",
        description="Serve a model over HTTP: SGLang's native API, from JAX.",
        epilog="Flags have SGLang's names and meaning.",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(ServerConfig):
        title = field.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        _add(group, field)
    for flag in IGNORED:
        parser.add_argument(flag, dest=_dest(flag), nargs="*", default=None, help=argparse.SUPPRESS)
    return parser


def _add(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    flags = ["--" + field.name.replace("_", "-"), *field.metadata["aliases"]]
    kind, text = _value_type(field.type), field.metadata["help"].replace("%", "%%")
    options: dict[str, Any] = {"dest": field.name}
    if kind is bool:
        options["action"] = "store_true"
    else:
        options["type"] = kind
        options["metavar"] = field.name.rsplit("_", 1)[-1].upper()
        if field.metadata["choices"]:
            options["choices"] = field.metadata["choices"]
            options["metavar"] = None
        if field.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
            if field.default is not None:
                text += f" (default: {field.default})"
    group.add_argument(*flags, help=text, **options)


def _value_type(annotation: Any) -> type:
    """`int` of `int | None`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return annotation


def _dest(flag: str) -> str:
    return "ignored" + flag.replace("-", "_")
