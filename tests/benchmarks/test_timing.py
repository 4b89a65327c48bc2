"""What the benchmarks time on a TPU, without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode_attention, timing, write_kv
from tests import tpu_aot

SIZES = dict(kv_heads=2, head_dim=128, page_size=128)


@pytest.fixture
def on_a_tpu(monkeypatch):
    """Small arrays, and what a script does where the default device is a TPU."""
    for module in (timing, decode_attention, write_kv):
        monkeypatch.setattr(module, "copies", lambda size: 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


@pytest.mark.usefixtures("on_a_tpu")
def test_ceilings_of_a_tpu_touch_all_bytes():
    step, carry, data = timing.touch_by_mosaic(1 << 16, False, 1 << 14, interpret=True)
    assert data[1].nbytes == 1 << 16
    rows = np.asarray(data[1]).reshape(-1, 8, 128)
    np.testing.assert_array_equal(step(3, carry, data), np.maximum(rows.max(0), 0))

    step, carry, data = timing.touch_by_mosaic(1 << 16, True, 1 << 14, interpret=True)
    assert data[1].nbytes == 1 << 15
    np.testing.assert_array_equal(step(3, carry, data), data[1])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not tpu_aot.available(), reason="libtpu is not installed")
@pytest.mark.usefixtures("on_a_tpu")
@pytest.mark.parametrize("method", ["bf16", "bdr"])
def test_what_is_timed_compiles_for_a_tpu(method):
    format = decode_attention.formats(128)[method]
    assert format.layout in ("bf16", "paired")
    pages, table = decode_attention.random_pages(format, batch=2, context=256, **SIZES)
    lengths = jnp.full(2, 256, jnp.int32)
    chains = [
        timing.touch_by_mosaic(1 << 20, False, 1 << 19),
        timing.touch_by_mosaic(1 << 20, True, 1 << 19),
        decode_attention.paged_chain(pages, table, lengths, q_heads=8),
        decode_attention.paged_chain(pages, table, lengths, q_heads=8, queries=16),
        write_kv.write_chain(format, tokens=24, **SIZES),
    ]
    for step, *operands in chains:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
        compiled = tpu_aot.compile_for("v6e", lambda *x, step=step: step(3, *x), *shapes)
        assert "tpu_custom_call" in compiled.as_text()
