"""The engine's modules with a bug in them, made from their sources."""

import inspect
import sys
import types
from collections.abc import Callable
from itertools import batched
from unittest import mock

import pytest

from jaxserve import (
    compiler,
    engine_core,
    live_request,
    page_allocator,
    plan_builder,
    programs,
    radix_cache,
    runner,
    scheduler,
)

# Each after those that it imports.
MODULES = (
    page_allocator,
    radix_cache,
    live_request,
    scheduler,
    plan_builder,
    programs,
    compiler,
    runner,
    engine_core,
)
NO_BUG = SyntaxError, NameError, AttributeError, ImportError, TypeError  # a slip of the mutant


class System(types.SimpleNamespace):
    """The modules under test by their names."""


REAL = System(**{module.__name__.rpartition(".")[2]: module for module in MODULES})


def mutate(*edits: str) -> System:
    """All modules anew, with pieces of their sources replaced: old, new, old, new, ... Each old
    piece is in one place of one module; names that a module imports lead to the new ones."""
    sources = {module.__name__: inspect.getsource(module) for module in MODULES}
    for old, new in batched(edits, 2):
        places = [name for name, source in sources.items() for _ in range(source.count(old))]
        assert len(places) == 1, f"{old!r} is in {places}: the source has changed"
        sources[places[0]] = sources[places[0]].replace(old, new)
    mutants: dict[str, types.ModuleType] = {}
    with mock.patch.dict(sys.modules):
        for name, source in sources.items():
            mutant = sys.modules[name] = types.ModuleType(name)
            exec(compile(source, f"mutant of {name}", "exec"), mutant.__dict__)
            mutants[name.rpartition(".")[2]] = mutant
            for other in mutant.__dict__.keys() & mutants.keys():  # imported as a module
                setattr(mutant, other, mutants[other])
    return System(**mutants)


def check_caught(name: str, edits: tuple[str, ...], killer: Callable[[System], None]) -> None:
    """The killer fails, and not because the mutant is no program. Says how it failed."""
    mutant = mutate(*edits)
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        killer(mutant)
    error = caught.value
    assert not isinstance(error, NO_BUG), f"no bug, but no program: {error!r}"
    print(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
