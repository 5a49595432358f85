"""The result of a benchmark: a record for machines, a table for people."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
from typing import Any

import jaxserve

SCHEMA_VERSION = 1
SECRETS = ("api_key", "admin_api_key")  # flags whose values are not written down


def make_record(
    benchmark: str,
    arguments: list[str],
    *options: Any,
    label: str,
    device: dict[str, Any],
    versions: dict[str, str | None],
    runs: list[dict[str, Any]],
) -> dict[str, Any]:
    """What was measured, on what, by which command.

    Args:
      options: the configurations, dataclasses; they are merged.
      device: what the model ran on.
      versions: those of the engine, where it is not this installation's.
      runs: {"parameters": ..., "metrics": ...} each.
    """
    configuration: dict[str, Any] = {}
    for config in options:
        configuration |= dataclasses.asdict(config)
    here = {"jaxserve": jaxserve.__version__, "python": platform.python_version()}
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "label": label,
        "command": shell_line(["jaxserve", "bench", benchmark, *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": here | versions,
        "hardware": device | {"cpu": cpu_model(), "num_cpus": num_cpus()},
        "configuration": {k: v for k, v in configuration.items() if k not in SECRETS},
        "runs": runs,
    }


def write(record: dict[str, Any], path: str) -> None:
    """As JSON, which knows no infinity: null."""
    text = json.dumps(_without_infinity(record), indent=1, allow_nan=False)
    pathlib.Path(path).write_text(text + "\n")


def read(path: str) -> dict[str, Any]:
    """Raises ValueError where it is no result of this version, OSError where it cannot be read."""
    try:
        record = json.loads(pathlib.Path(path).read_text())
        version = record["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a result of jaxserve bench") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version {version}, this is {SCHEMA_VERSION}")
    return record


def title(parameters: dict[str, Any]) -> str:
    """ "16 at once, 8 req/s" of the parameters of a run that are set."""
    words = {
        "batch_size": "batch {}",
        "input_len": "{} in",
        "output_len": "{} out",
        "max_concurrency": "{} at once",
        "request_rate": "{:g} requests/s",
    }
    said = [text.format(parameters[k]) for k, text in words.items() if _is_set(parameters.get(k))]
    return ", ".join(said) or "all at once"


def table(record: dict[str, Any]) -> str:
    hardware = record["hardware"]
    lines = [
        f"{record['label']}: {hardware['device']}, {hardware['num_cpus']} x {hardware['cpu']}",
    ]
    for run in record["runs"]:
        lines += ["", title(run["parameters"]), *_rows(run["metrics"])]
    return "\n".join(lines)


def _rows(metrics: dict[str, Any]) -> list[str]:
    """Numbers first, then the distributions with their heading, then what went wrong."""
    numbers = [(k, v) for k, v in metrics.items() if isinstance(v, int | float)]
    spread = [(k, v) for k, v in metrics.items() if isinstance(v, dict) and "p50" in v]
    times = [(k, v) for k, v in metrics.items() if isinstance(v, dict) and "user" in v]
    rows = [f"  {_words(name):26}{_number(value):>12}" for name, value in numbers]
    for name, value in times:
        both = f"{value['user']:.2f} user, {value['system']:.2f} system"
        rows.append(f"  {_words(name):26}{value['user'] + value['system']:>12.2f}   ({both})")
    if spread:
        rows.append(" " * 28 + "".join(f"{column:>10}" for column in spread[0][1]))
    for name, value in spread:
        rows.append(f"  {_words(name):26}" + "".join(f"{v:>10.2f}" for v in value.values()))
    for error in metrics.get("errors", []):
        rows.append(f"  failed {error['count']} times: {error['message']}")
    return rows


def _words(name: str) -> str:
    return name.replace("_per_", "/").removeprefix("num_").replace("_", " ")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _is_set(value: Any) -> bool:
    return value is not None and value != math.inf


def shell_line(words: list[str]) -> str:
    """A command as it was given, but for what is secret."""
    shown, is_secret = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        shown.append("..." if is_secret else word)
        is_secret = flag.removeprefix("--").replace("-", "_") in SECRETS
        if is_secret and equals:
            shown[-1], is_secret = f"{flag}=...", False
    return shlex.join(shown)


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_infinity(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cpu_model() -> str:
    """Of this machine, which a server need not run on."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def num_cpus() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version_of(package: str) -> str | None:
    """Without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
