"""The experts' TPU kernels, as far as a CPU can tell: what they read, how they share it, how they
lower. `test_moe.py` has what they compute, `tests/tpu/` what the TPU's compiler makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # says whether there was a race
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import moe
from pallas_kernels.moe import mosaic_tpu
from pallas_kernels.moe.dispatch import make_dispatch

make_dispatch = jax.jit(make_dispatch, static_argnums=(2, 3))
MIB = 1 << 20
# Kinds by JAX's names; MiB of VMEM.
CHIPS = {
    "v4": ("TPU v4", 2, 16),
    "v5e": ("TPU v5 lite", 1, 128),
    "v5p": ("TPU v5", 2, 64),
    "v6e": ("TPU v6 lite", 1, 128),
    "tpu7x": ("TPU7x", 1, 64),
}


def on(chip):
    kind, num_cores, _ = CHIPS[chip]
    device = AbstractDevice(kind, num_cores, "tpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def choose(num_tokens, choices, num_experts):
    """Different experts for each token, the last one for none."""
    rng = np.random.default_rng(num_tokens)
    ids = [rng.permutation(num_experts - 1)[:choices] for _ in range(num_tokens)]
    return jnp.array(ids, jnp.int32)


def changes(blocks):
    """What a pipeline reads, or writes, that keeps the block that it had last."""
    return [b for i, b in enumerate(blocks) if i == 0 or b != blocks[i - 1]]


@pytest.mark.parametrize("num_tokens,tile_size", [(1, 16), (12, 4), (40, 4), (200, 16)])
def test_weights_are_read_once_and_of_chosen_experts_alone(num_tokens, tile_size):
    num_blocks, num_experts = 3, 9
    ids, is_live = choose(num_tokens + 5, 2, num_experts), jnp.arange(num_tokens + 5) < num_tokens
    dispatch = make_dispatch(ids, is_live, num_experts, tile_size)
    expert, num_tiles = np.asarray(dispatch.expert), np.asarray(dispatch.num_tiles).reshape(1)
    assert num_tiles[0] < len(expert), "some tiles are not used"

    def walk(index_map):
        grid = [(block, tile) for block in range(num_blocks) for tile in range(len(expert))]
        return changes([tuple(map(int, index_map(*at, expert, num_tiles))) for at in grid])

    chosen = np.flatnonzero(dispatch.group_sizes)
    reads = walk(mosaic_tpu.weights_block)
    assert sorted(reads) == [(e, 0, b, 0) for e in chosen for b in range(num_blocks)]
    used = [(block, tile) for block in range(num_blocks) for tile in range(num_tiles[0])]
    assert walk(mosaic_tpu.out_block) == [(tile, block) for block, tile in used]
    assert len(walk(mosaic_tpu.rows_block)) <= len(used)
    print(f"{len(reads)} blocks of weights for {len(used)} of {num_blocks * len(expert)} steps")


def test_no_token_reads_no_more_than_a_block_of_one_expert():
    dispatch = make_dispatch(choose(5, 2, 4), jnp.zeros(5, bool), 4, 4)
    blocks = [
        tuple(map(int, mosaic_tpu.weights_block(0, tile, dispatch.expert, jnp.zeros(1, jnp.int32))))
        for tile in range(len(dispatch.expert))
    ]
    assert len(changes(blocks)) == 1


def test_two_cores_that_share_the_features_do_not_race(monkeypatch):
    """As the two of a v4 or a v5p do; memory that nobody has written holds NaN."""
    num_experts, num_features, depth = 3, 256, 160
    dispatch = make_dispatch(choose(4, 2, num_experts), None, num_experts, 8)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((dispatch.pair.size, depth)).astype(np.float32)
    weights = rng.standard_normal((num_experts, 1, num_features, depth)).astype(np.float32)
    operands = jnp.asarray(rows), jnp.asarray(weights)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)

    def run():
        product = mosaic_tpu.grouped(
            lambda x: x, *operands, dispatch, name="product", interpret=params
        )
        product = np.asarray(product).reshape(*dispatch.pair.shape, num_features)
        return product, interpret_pallas_call.races.races_found

    used = int(dispatch.num_tiles)
    found, is_race = run()
    expert = np.asarray(dispatch.expert)[:used]
    tiles = rows.reshape(*dispatch.pair.shape, depth)[:used]
    want = np.einsum("tnd,tfd->tnf", tiles, weights[expert, 0])
    np.testing.assert_allclose(found[:used], want, atol=1e-4)
    assert not is_race
    assert used < len(dispatch.expert) and np.isnan(found[used:]).all(), "nothing is written there"

    # Were both cores to write one block, it would be seen: JAX 0.12 raises, 0.11 says so.
    out_block = mosaic_tpu.out_block
    monkeypatch.setattr(mosaic_tpu, "out_block", lambda block, *at: out_block(0, *at))
    try:
        is_race = run()[1]
    except jax.errors.JaxRuntimeError as error:
        is_race = "RACE DETECTED" in str(error)
    assert is_race


SHAPES = [(60, 2048, 1408, 4), (128, 2048, 768, 8), (8, 4096, 14336, 2)]  # E, D, F, k


@functools.partial(jax.jit, static_argnames="implementation")
def run(x, gate_up, down, weights, expert_ids, is_live, implementation):
    plan = moe.plan(x, gate_up, expert_ids, is_live, implementation=implementation)
    return moe.experts(x, gate_up, down, weights, plan)


def operands(num_tokens, num_experts, hidden, inner, choices, dtype=jnp.bfloat16):
    shapes = [
        ((num_tokens, hidden), dtype),
        ((num_experts, 2, inner, hidden), dtype),
        ((num_experts, hidden, inner), dtype),
        ((num_tokens, choices), jnp.float32),
        ((num_tokens, choices), jnp.int32),
        ((num_tokens,), jnp.bool_),
    ]
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lowers_for_every_tpu_without_another_product(shape, chip):
    with on(chip):
        traced = run.trace(*operands(64, *shape), implementation="mosaic-tpu")
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2
    for name in ("grouped_swiglu", "grouped_matmul"):
        assert name in text
    for word in ("stablehlo.while", "stablehlo.sort", "stablehlo.dot", "stablehlo.case"):
        assert word not in text


def features_and_vmem(*args):
    parts, _, depth, tile_size, dtype = args
    features = mosaic_tpu.block_features(*args)
    itemsize = jnp.dtype(dtype).itemsize
    blocks = (tile_size * depth + parts * features * depth + tile_size * features) * itemsize
    return features, 2 * blocks + (parts + 1) * tile_size * features * 4


@pytest.mark.parametrize(
    "chip,tile_size",
    [(c, size) for c in CHIPS for size in (16, 64, 256) if (c, size) != ("v4", 256)],
)
def test_blocks_take_half_of_vmem_at_most(chip, tile_size):
    for _, hidden, inner, _ in SHAPES[:2]:
        for product in ((2, inner, hidden), (1, hidden, inner)):
            for dtype in (jnp.bfloat16, jnp.float32):
                with on(chip):
                    features, size = features_and_vmem(*product, tile_size, dtype)
                assert features % 128 == 0 and size <= CHIPS[chip][2] * MIB // 2
                if CHIPS[chip][2] >= 64:  # each block is worth a grid step
                    weights = features * product[0] * product[2] * jnp.dtype(dtype).itemsize
                    assert weights >= 1.5 * MIB


def planned(*shape, dtype=jnp.bfloat16, implementation=None):
    """The plan of 512 tokens, without any array."""
    x, gate_up, _, _, ids, _ = operands(512, *shape, dtype=dtype)
    return jax.eval_shape(
        functools.partial(moe.plan, implementation=implementation), x, gate_up, ids
    )


def test_what_it_cannot_do_is_declined_in_words():
    plan = functools.partial(planned, implementation="mosaic-tpu")
    with on("v4"), pytest.raises(NotImplementedError, match="bytes of VMEM, of 8388608"):
        plan(8, 4096, 14336, 2)
    with on("v5p"):
        plan(8, 4096, 14336, 2)
        with pytest.raises(NotImplementedError, match="float16, not in float32 or bfloat16"):
            plan(8, 4096, 14336, 2, dtype=jnp.float16)
        with pytest.raises(NotImplementedError, match="sums of one product"):
            plan(4, 1, 32, 2)


def test_a_tpu_prefers_it(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with on("v6e"):
        assert planned(8, 32, 48, 2).implementation == "mosaic-tpu"
        assert planned(8, 32, 48, 2, dtype=jnp.float16).implementation == "reference"
