"""The command line of the benchmarks."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

from jaxserve import logs
from jaxserve.bench import report
from jaxserve.bench.options import (
    BatchOptions,
    DatasetOptions,
    LoadOptions,
    OfflineOptions,
    ReportOptions,
    ServerOptions,
)
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineDied
from jaxserve.flags import add_flags, take

DESCRIPTIONS = {
    "offline": "an engine in this process, without HTTP",
    "one-batch": "one batch in such an engine: its prefill and its decode steps",
    "serve": "a load on a running server, jaxserve's or another with SGLang's /generate",
    "plot": "results of the above as a figure",
}
USAGE = """usage: jaxserve bench COMMAND [OPTIONS]

commands:
{}

`jaxserve bench COMMAND --help` lists the options.
""".format("\n".join(f"  {command:11}{text}" for command, text in DESCRIPTIONS.items()))


def main(arguments: list[str]) -> int:
    """`jaxserve bench ...`; returns its exit status."""
    command, *rest = arguments or ["--help"]
    if command in COMMANDS:
        try:
            return COMMANDS[command](rest)
        except (ValueError, OSError, EngineDied) as error:
            print(f"jaxserve bench {command}: {error}", file=sys.stderr)
            return 1
    is_help = command in ("--help", "-h", "help")
    print(USAGE if is_help else f"jaxserve bench: unknown command {command!r}\n\n{USAGE}", end="")
    return 0 if is_help else 2


def offline(arguments: list[str]) -> int:
    kinds = (DatasetOptions, LoadOptions, OfflineOptions)
    config, options, output = parse_engine("offline", arguments, *kinds)
    from jaxserve.bench.offline import run

    return run_engine("offline", arguments, config, options, output, run)


def one_batch(arguments: list[str]) -> int:
    config, options, output = parse_engine("one-batch", arguments, BatchOptions)
    from jaxserve.bench.one_batch import run

    return run_engine("one-batch", arguments, config, options, output, run)


def serve(arguments: list[str]) -> int:
    """Never loads jax."""
    kinds = (DatasetOptions, LoadOptions, ServerOptions, ReportOptions)
    dataset, load, server, output = parse("serve", arguments, *kinds)
    import uvloop

    from jaxserve.bench.serve import Serve, describe

    async def measure() -> tuple[Serve, list[dict[str, Any]]]:
        bench = Serve(server, load, dataset.seed)
        await bench.connect()
        try:
            return bench, [run async for run in bench.run(dataset, load)]
        finally:
            bench.close()

    bench, runs = uvloop.run(measure())
    info = bench.info
    record = report.make_record(
        "serve",
        arguments,
        *(dataset, load, server, output),
        label=output.label or f"serve {_short_name(info.get('model_path', server.url))}",
        device={"device": info.get("device"), "num_devices": info.get("num_devices")},
        versions={"server": info.get("version"), "jax": info.get("jax_version")},
        runs=runs,
    )
    record["server"] = describe(bench)
    return finish(record, output)


def plot(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jaxserve bench plot",
        description="Results as a figure: throughput against latency, a line per label; and bars "
        "of each metric, a bar per run. Needs matplotlib: pip install 'jaxserve[bench]'.",
    )
    parser.add_argument("results", nargs="+", help="what --output has written", metavar="RESULT")
    parser.add_argument("--output", required=True, help="the figure; its suffix says the format")
    parser.add_argument(
        "--metric",
        nargs="+",
        default=[],
        help="the bars, as in the results, such as itl_ms.p99 (default: the usual ones)",
    )
    options = parser.parse_args(arguments)
    from jaxserve.bench.plot import draw

    records = [report.read(path) for path in options.results]
    try:
        draw(records, options.output, tuple(options.metric))
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install 'jaxserve[bench]'") from error
    print(f"wrote {options.output}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "offline": offline,
    "one-batch": one_batch,
    "serve": serve,
    "plot": plot,
}


def parse(command: str, arguments: list[str], *kinds: type) -> list[Any]:
    """The configurations of the kinds that a command takes. Exits 2 on a bad flag."""
    description = f"Measures {DESCRIPTIONS[command]}."
    parser = argparse.ArgumentParser(prog=f"jaxserve bench {command}", description=description)
    add_flags(parser, *kinds)
    values = vars(parser.parse_args(arguments))
    try:
        return [take(kind, values) for kind in kinds]
    except ValueError as error:
        parser.error(str(error))


def parse_engine(
    command: str, arguments: list[str], *kinds: type
) -> tuple[EngineConfig, list[Any], ReportOptions]:
    """And makes this process fit for the engine, before jax is loaded."""
    *options, config, output = parse(command, arguments, *kinds, EngineConfig, ReportOptions)
    from jaxserve.engine_process import configure_jax

    logs.set_up(config.log_level)
    configure_jax(config)
    return config, options, output


def run_engine(
    command: str,
    arguments: list[str],
    config: EngineConfig,
    options: list[Any],
    output: ReportOptions,
    run: Callable[..., Iterable[dict[str, Any]]],
) -> int:
    """Raises what `Engine` and `run` raise."""
    from jaxserve.bench.offline import device_of, versions
    from jaxserve.engine import Engine

    with Engine(config) as engine:
        if config.log_level == "info":
            logs.set_up("warning")  # a line per step would cost what is measured
        record = report.make_record(
            command,
            arguments,
            *(config, *options, output),
            label=output.label or f"{command} {_short_name(config.model_name)}",
            device=device_of(engine),
            versions=versions(),
            runs=list(run(engine, *options)),
        )
    return finish(record, output)


def finish(record: dict[str, Any], output: ReportOptions) -> int:
    """Shows and keeps the result; 1 where a run had no answer at all."""
    print(report.table(record))
    if output.output:
        report.write(record, output.output)
        print(f"\nwrote {output.output}")
    return int(any(run["metrics"].get("num_succeeded") == 0 for run in record["runs"]))


def _short_name(model: str) -> str:
    return pathlib.PurePath(model).name or model
