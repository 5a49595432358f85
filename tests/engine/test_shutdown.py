"""What an engine leaves behind in the process that embeds it: nothing.

Linux ends a process that maps more than 65,530 pieces of memory, and on a CPU every compiled
program maps about two hundred.
"""

import gc
import json
import pathlib

import jax

from jaxserve import Engine
from tests.golden.cases import CASES
from tests.server.serving import programs_folder

CONFIG = CASES[0].config


def num_maps() -> int:
    return len(pathlib.Path("/proc/self/maps").read_text().splitlines())


def array_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_ended_engines_leave_neither_programs_nor_arrays(tmp_path, pytestconfig):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    gc.collect()
    bytes_before, ended, up, down = array_bytes(), [], [], []
    for _ in range(3):
        engine = Engine(
            model_path=str(tmp_path),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_running_requests=1,
            chunked_prefill_size=15,
            compilation_cache_dir=programs_folder(pytestconfig),
        )
        engine.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 3})
        up.append(num_maps())
        assert array_bytes() > bytes_before
        engine.shutdown()
        ended.append(engine)  # whoever still has it keeps nothing of this
        gc.collect()
        down.append(num_maps())
        assert array_bytes() <= bytes_before
    print(f"memory maps with an engine {up}, after its end {down}")
    assert min(up) - max(down) > 500
    assert down[-1] - down[0] < 100, "the first one leaves a few operations that JAX has compiled"
