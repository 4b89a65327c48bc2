"""Caches on disk. Those of several devices and processes: `test_sharding`."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saw_int4_jax as saw
from pallas_kernels import page_format
from saw_int4_jax.checkpoint import describe_cache, load_cache, save_cache

SPEC = saw.CacheSpec(layers=2, kv_heads=2, head_dim=16, num_pages=12, page_size=4, layout="paired")
LENGTHS = [9, 0, 4]


def random_cache(spec=SPEC):
    """Sequences of `LENGTHS`, and a fourth that shares a full page of the first and copies one."""
    rng = np.random.default_rng(0)
    cache = saw.init_cache(spec, batch=4, max_length=24)
    for counts in ([5, 3, 2, 0], [4, 0, 2, 0]):
        cache, _ = saw.extend(cache, jnp.asarray(counts))
    cache = saw.free(cache, jnp.asarray([False, True, False, False]))

    def random_bits(x):
        top = np.iinfo(x.dtype).max
        return jnp.asarray(rng.integers(0, top, x.shape, x.dtype, endpoint=True))

    cache = dataclasses.replace(cache, pages=jax.tree.map(random_bits, cache.pages))
    cache, ok = saw.share(cache, 0, 3, 7)
    assert ok
    return cache


def pages_of_rows(cache):
    for row, length in zip(np.asarray(cache.page_table), cache.lengths):
        ids = row[: -(-int(length) // SPEC.page_size)]
        yield jax.tree.map(lambda x, ids=ids: x[:, ids], cache.pages)


def assert_same_sequences(loaded, cache):
    count = cache.batch
    np.testing.assert_array_equal(loaded.lengths[:count], cache.lengths)
    assert not loaded.lengths[count:].any()
    for one, other in zip(pages_of_rows(cache), pages_of_rows(loaded)):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("layout", ["paired", "split", "bf16"])
def test_round_trip(tmp_path, layout):
    dtype = "bf16" if layout == "bf16" else "int4"
    spec = dataclasses.replace(SPEC, layout=layout, dtype=dtype)
    cache = random_cache(spec)
    save_cache(tmp_path / "cache", cache, note="a test")
    saved = describe_cache(tmp_path / "cache")
    assert saved.note == "a test"
    assert saved.lengths == (9, 0, 4, 7)
    assert saved.spec == dataclasses.replace(spec, num_pages=5, order=spec.format.order)
    assert_same_sequences(load_cache(tmp_path / "cache", spec, 4, 24), cache)


def test_loaded_cache_is_a_cache(tmp_path):
    """It is of another size, its pages are counted, and new tokens find their place."""
    cache = random_cache()
    save_cache(tmp_path / "cache", cache)
    spec = dataclasses.replace(SPEC, num_pages=9)
    loaded = load_cache(tmp_path / "cache", spec, batch=6, max_length=32)
    assert_same_sequences(loaded, cache)
    assert loaded.num_free == 9 - 5
    assert sorted(loaded.references.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    free = loaded.free_pages[: int(loaded.num_free)]
    assert not loaded.references[free].any()
    loaded, ok = saw.extend(loaded, jnp.asarray([3, 0, 0, 0, 16, 4]))
    assert ok.tolist() == [True, True, True, True, True, False]
    assert loaded.num_free == 0
    assert_same_sequences(
        dataclasses.replace(loaded, lengths=jnp.asarray([9, 0, 4, 7, 0, 0])), cache
    )


@pytest.mark.parametrize(("layout", "other"), [("paired", "split"), ("split", "paired")])
def test_layout_of_another_device(tmp_path, layout, other):
    cache = random_cache(dataclasses.replace(SPEC, layout=layout))
    save_cache(tmp_path / "cache", cache)
    loaded = load_cache(tmp_path / "cache", dataclasses.replace(SPEC, layout=other), 4, 24)
    assert loaded.pages.format.layout == other
    converted = page_format.convert(cache.pages, other)
    assert_same_sequences(loaded, dataclasses.replace(cache, pages=converted))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "layers=2, not 3"),
        ({"kv_heads": 4}, "kv_heads=2, not 4"),
        ({"head_dim": 32, "order": 16}, "head_dim=16, not 32"),
        ({"page_size": 8}, "page_size=4, not 8"),
        ({"order": 8}, "order=16, not 8"),
        ({"rotate_v": True, "order": 4}, "order=16, not 4; rotate_v=False, not True"),
        ({"dtype": "bf16", "layout": None}, "dtype=int4, not bf16"),
    ],
)
def test_cache_of_another_kind(tmp_path, changes, message):
    save_cache(tmp_path / "cache", random_cache())
    shutil.rmtree(tmp_path / "cache" / "pages")  # nothing of it is to be read
    with pytest.raises(ValueError, match=message):
        load_cache(tmp_path / "cache", dataclasses.replace(SPEC, **changes), 4)


def test_cache_that_does_not_fit(tmp_path):
    save_cache(tmp_path / "cache", random_cache())
    shutil.rmtree(tmp_path / "cache" / "pages")
    with pytest.raises(ValueError, match="Expected batch=3 to be at least the 4 saved"):
        load_cache(tmp_path / "cache", SPEC, batch=3)
    with pytest.raises(ValueError, match="Expected the 9 tokens of sequence 0 to fit"):
        load_cache(tmp_path / "cache", SPEC, 4, max_length=8)
    with pytest.raises(ValueError, match="Expected 5 saved pages to fit a pool of 4"):
        load_cache(tmp_path / "cache", dataclasses.replace(SPEC, num_pages=4), 4)


def test_another_version_of_the_page_format(tmp_path, monkeypatch):
    monkeypatch.setattr(page_format, "VERSION", 0)
    save_cache(tmp_path / "cache", random_cache())
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"Expected version 1 of the page format .* got 0"):
        load_cache(tmp_path / "cache", SPEC, batch=4)


def test_directory_that_exists_or_not(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "cache", SPEC, batch=4)
    save_cache(tmp_path / "cache", random_cache())
    with pytest.raises(ValueError, match="exists"):
        save_cache(tmp_path / "cache", random_cache())
