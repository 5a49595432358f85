"""Command line flags, made from the fields of a configuration's dataclass."""

import argparse
import dataclasses
import types
import typing
from typing import Any


def add_flags(parser: argparse.ArgumentParser, *configs: type) -> None:
    """A flag for each field that `config.option` has described, in its group."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for config in configs:
        for field in dataclasses.fields(config):
            title = field.metadata["group"]
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            _add(groups[title], field)


def take(config: type, values: dict[str, Any]) -> Any:
    """Makes a configuration of those of a parser's values that are its own.

    Raises:
      ValueError: a value is out of range; names the flag.
    """
    own = {field.name: values[field.name] for field in dataclasses.fields(config)}
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})


def _add(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    flags = ["--" + field.name.replace("_", "-"), *field.metadata["aliases"]]
    kind, text = _value_type(field.type), field.metadata["help"].replace("%", "%%")
    options: dict[str, Any] = {"dest": field.name}
    if kind is bool:
        options["action"] = "store_true"
    else:
        options["type"] = kind
        options["metavar"] = field.name.rsplit("_", 1)[-1].upper()
        if typing.get_origin(field.type) is tuple:
            options["nargs"] = "+"
        if field.metadata["choices"]:
            options["choices"] = field.metadata["choices"]
            options["metavar"] = None
        if field.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
            text += _describe(field.default)
    group.add_argument(*flags, help=text, **options)


def _describe(default: Any) -> str:
    """Nothing where the help itself must say what happens without the flag."""
    if default is None or default == ():
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f" (default: {shown})"


def _value_type(annotation: Any) -> type:
    """`int` of `int | None` and of `tuple[int, ...]`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0]
    return annotation
