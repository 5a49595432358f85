"""Executes a recorded run again, and compares the tokens: `jaxserve replay`.

Loads jax when it is called, not before: `--dump` needs none, and the device is chosen first.
"""

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jaxserve
from jaxserve import logs
from jaxserve.config import EngineConfig
from jaxserve.plan_dump import dump
from jaxserve.plan_log import Drawn, Header, PlanLog, PlannedStep, Record, Reset, WeightsChanged


@dataclasses.dataclass
class Comparison:
    """Of what a replay drew with what the log says."""

    steps: int = 0
    equal_steps: int = 0
    tokens: int = 0
    equal_tokens: int = 0
    resets: int = 0
    first_difference: str | None = None

    def add(self, recorded: Drawn, replayed: Drawn) -> None:
        """One step."""
        columns = {row: column for column, row in enumerate(replayed.rows)}
        differences = []
        for number, row, wanted in recorded.tokens():
            got = replayed.draws[number][columns[row]]
            self.tokens += 1
            self.equal_tokens += got == wanted
            if got != wanted:
                differences.append(f"row {row} drew {_say(got)}, the log says {_say(wanted)}")
        self.steps += 1
        self.equal_steps += not differences
        if differences and self.first_difference is None:
            self.first_difference = f"step {recorded.step}, {differences[0]}"

    @property
    def is_equal(self) -> bool:
        return self.first_difference is None

    def __str__(self) -> str:
        resets = f"; failed steps: {self.resets}" if self.resets else ""
        counts = (
            f"{self.equal_steps} of {self.steps} steps and {self.equal_tokens} of {self.tokens} "
            f"tokens are equal{resets}"
        )
        return counts if self.is_equal else f"{counts}\nfirst difference: {self.first_difference}"


def compare(
    runner, records: Iterable[Record], load_weights: Callable[[str], list[Any]] | None = None
) -> Comparison:
    """Gives the runner what the recorded one was given, in the same order.

    Args:
      load_weights: from a folder, the leaves of the parameters.

    Raises:
      ValueError: a step is not one that this runner has programs for, or was never dispatched; or
        the run got weights that cannot be had again.
    """
    comparison, unread = Comparison(), {}
    for record in records:
        if isinstance(record, PlannedStep):
            step = record.plan.step
            try:
                unread[step] = runner.dispatch(record.plan)
            except Exception as error:
                raise ValueError(f"step {step} cannot be executed here: {error!r}") from error
        elif isinstance(record, Drawn):
            if record.step not in unread:
                raise ValueError(f"the log tells of step {record.step}, but never had it executed")
            result = runner.read(unread.pop(record.step))
            comparison.add(record, Drawn.of(record.step, record.rows, result.drawn))
        elif isinstance(record, WeightsChanged):
            if record.folder is None or load_weights is None:
                raise ValueError(f"{comparison}\nthen the run got weights that no folder has")
            runner.swap(dict(enumerate(load_weights(record.folder))))
        elif isinstance(record, Reset):
            unread.clear()
            runner.reset()
            comparison.resets += 1
    return comparison


def load_runner(log: PlanLog, config: EngineConfig):
    """The runner as the log's header describes it, with the model and device of `config`.

    Raises:
      OSError, ValueError: the model is not there, or not the recorded one.
    """
    import jax.numpy as jnp

    from jaxserve import compilation_cache
    from jaxserve.engine_builder import find_device
    from jaxserve.model_loader import ModelFiles
    from jaxserve.models.registry import create_model
    from jaxserve.runner_builder import build_runner
    from jaxserve.state import StateShape
    from jaxserve.stopwatch import Stopwatch

    header = log.header
    find_device(config)
    compilation_cache.enable(config.compilation_cache_dir)
    files = ModelFiles.find(config)
    if files.digest(config.load_format) != header.model_digest:
        raise ValueError(
            f"{config.model_path} is not the model of the log, which was {header.model_folder}: "
            "config.json or weights differ; the flag is --model-path"
        )
    try:
        shape = StateShape(**header.shape | {"dtype": jnp.dtype(header.shape["dtype"])})
    except TypeError as error:
        raise ValueError(
            f"{log.name} was written by another jaxserve ({header.jaxserve}): {error}"
        ) from error
    model = create_model(files.config)
    load = functools.partial(files.load, model[1], config.load_format, config.random_seed or 0)
    return build_runner(
        model,
        load,
        shape,
        header.buckets,
        Stopwatch(time.perf_counter),
        deterministic=config.deterministic,
        pooling=files.config.pooling,
    )


def load_weights(config: EngineConfig, folder: str) -> list[Any]:
    """The leaves of the parameters in another folder of the model of `config`.

    Raises OSError, ValueError: they are not there, or do not fit.
    """
    import jax

    from jaxserve.model_loader import ModelFiles
    from jaxserve.models.registry import create_model

    files = dataclasses.replace(ModelFiles.find(config), folder=folder)
    abstract = create_model(files.config)[1]
    return jax.tree.leaves(files.load(abstract, "auto", seed=0))


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 where all tokens are equal, 1 where not, 2 where that cannot be said."""
    options = make_parser().parse_args(arguments)
    try:
        with open(options.file, "rb") as file:
            log = PlanLog(file)
            if options.dump:
                return _dump(log)
            return _replay(log, _config(log, options))
    except (OSError, ValueError, RuntimeError) as error:
        is_system = isinstance(error, OSError) and error.filename is not None
        words = f"{error.filename}: {error.strerror}" if is_system else error
        print(f"jaxserve replay: {words}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxserve replay",
        description="Execute what `jaxserve serve --record-plans FILE` has recorded, with the same "
        "model, and compare the tokens drawn.",
        epilog="Exit status: 0 all tokens are equal, 1 some are not, 2 it could not be replayed.",
    )
    parser.add_argument("file", metavar="FILE", help="the log; it holds prompts and answers")
    parser.add_argument(
        "--model-path", metavar="PATH", help="where the model is now (default: where it was)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "tpu"), help="(default: as recorded)"
    )
    parser.add_argument(
        "--dump", action="store_true", help="print the records, a JSON object a line, and end"
    )
    return parser


def _config(log: PlanLog, options: argparse.Namespace) -> EngineConfig:
    """As recorded, but for what the flags say."""
    header = log.header
    return dataclasses.replace(
        header.config,
        model_path=options.model_path or header.model_folder,
        device=options.device or header.config.device,
    )


def _replay(log: PlanLog, config: EngineConfig) -> int:
    from jaxserve.engine_process import configure_jax

    logs.set_up(config.log_level)
    configure_jax(config)
    runner = load_runner(log, config)
    comparison = compare(runner, log, functools.partial(load_weights, config))
    _warn_of_end(log)
    print(comparison)
    if not comparison.steps:
        raise ValueError(f"{log.name} has no step to compare")
    if not comparison.is_equal:
        print(f"recorded with {_environment(log.header)}")
    return 0 if comparison.is_equal else 1


def _environment(header: Header) -> str:
    import jax

    here = f"jaxserve {jaxserve.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}"
    there = f"jaxserve {header.jaxserve}, jax {header.jax}, {header.device}"
    return there if here == there else f"{there}; this is {here}"


def _dump(log: PlanLog) -> int:
    try:
        for line in dump(log):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    _warn_of_end(log)
    return 0


def _warn_of_end(log: PlanLog) -> None:
    if log.truncated_at is not None:
        print(
            f"{log.name} ends within a record, at byte {log.truncated_at}: the engine was killed, "
            "or its disk was full; everything before it is here",
            file=sys.stderr,
        )


def _say(draw: list[int]) -> str:
    token, finish = draw
    ends = ("", " and stopped", " and was out of length", " from scores that are not finite")
    return f"{token}{ends[finish]}" if 0 <= finish < len(ends) else f"{token} ({finish})"
