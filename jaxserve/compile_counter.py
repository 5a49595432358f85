"""How often JAX traces, lowers and compiles: after the start it should not at all."""

import collections
import contextlib
import threading
from typing import Any

from jax import monitoring

TRACED = "/jax/core/compile/jaxpr_trace_duration"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"  # also where the cache has the program
CACHE_HIT = "/jax/compilation_cache/cache_hits"


class CompileCounter:
    """Counts from its making on, in the whole process, whoever's the functions are: JAX calls
    its listeners on the thread that compiles."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._at_ready: collections.Counter[str] = collections.Counter()
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)

    def mark_ready(self) -> None:
        """What comes from now on counts as after the start."""
        with self._lock:
            self._at_ready = self._counts.copy()

    def report(self) -> dict[str, int]:
        """`compiled_...`: programs that XLA compiled, or that the cache of compiled programs had.
        Before `mark_ready`, all is after."""
        with self._lock:
            start, after = self._at_ready, self._counts - self._at_ready
        return {
            "compiled_at_start": start[COMPILED],
            "compilation_cache_hits": start[CACHE_HIT],
            "compiled_after_ready": after[COMPILED],
            "lowered_after_ready": after[LOWERED],
            "traced_after_ready": after[TRACED],
        }

    def close(self) -> None:
        """Counts no more."""
        with contextlib.suppress(AssertionError):  # somebody has cleared all listeners
            monitoring.unregister_event_duration_listener(self._on_duration)
            monitoring.unregister_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        self._count(event)

    def _on_event(self, event: str, **_: Any) -> None:
        self._count(event)

    def _count(self, event: str) -> None:
        with self._lock:
            self._counts[event] += 1
