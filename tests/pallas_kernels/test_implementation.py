"""Which implementation runs, on a device that is made up."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import PageFormat, init_pages
from pallas_kernels.implementation import choose


def operands(layout, page_size=128):
    pages = init_pages(
        PageFormat(layout), layers=1, num_pages=1, kv_heads=1, page_size=page_size, head_dim=128
    )
    return pages, jnp.zeros((1, 1, 128)), jnp.zeros((1, 1, 128))


@pytest.mark.parametrize(
    ("device", "layout", "page_size", "expected"),
    [
        ("cpu", "paired", 128, "xla"),
        ("gpu", "split", 64, "triton"),
        ("gpu", "bf16", 64, "triton"),
        ("gpu", "paired", 64, "xla"),
        ("tpu", "paired", 128, "mosaic_tpu"),
        ("tpu", "paired", 64, "mosaic_tpu"),
        ("tpu", "paired", 96, "xla"),
        ("tpu", "split", 128, "xla"),
    ],
)
def test_the_devices_kernel_where_it_can_else_xla(device, layout, page_size, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    chosen = choose("write_kv", None, *operands(layout, page_size))
    assert chosen.__module__ == f"pallas_kernels.{expected}.write"


@pytest.mark.parametrize(
    ("device", "implementation", "message"),
    [
        ("cpu", "triton", "to run on its device, not a cpu"),
        ("gpu", "mosaic_tpu", "to run on its device"),
        ("gpu", "triton", "layout"),
        ("tpu", "cuda", "to be one of"),
    ],
)
def test_a_named_one_that_cannot_run_says_why(device, implementation, message, monkeypatch):
    pages = operands("paired")
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    with pytest.raises(NotImplementedError, match=f"Expected.*{message}"):
        choose("write_kv", implementation, *pages)


def test_a_named_one_of_another_device_can_be_traced():
    def traced(pages, k, v):
        chosen = choose("write_kv", "mosaic_tpu", pages, k, v)
        assert chosen.__module__ == "pallas_kernels.mosaic_tpu.write"

    jax.eval_shape(traced, *operands("paired"))
