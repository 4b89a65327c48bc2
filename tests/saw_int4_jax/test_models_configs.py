"""Published shapes against published parameter counts."""

import dataclasses
import math

import pytest

from saw_int4_jax.models.configs import CONFIGS
from saw_int4_jax.models.hugging_face import parameter_shapes
from tests.checkpoints import SIZES

# Tied output projections count once.
PARAMETERS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


def test_every_config_is_counted():
    assert CONFIGS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_as_many_as_published(name):
    config = CONFIGS[name]

    def count(layers):
        shapes = parameter_shapes(dataclasses.replace(config, num_layers=layers))
        return sum(map(math.prod, shapes.values()))

    one, two = count(1), count(2)
    assert one + (config.num_layers - 1) * (two - one) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(num_layers=0), "num_layers=0 to be positive"),
        (dict(num_kv_heads=3), "num_heads=4 to be a multiple of self.num_kv_heads=3"),
        (dict(head_dim=15), "head_dim=15 to be positive and even"),
        (dict(window=0), "window=0 to be positive"),
    ],
)
def test_impossible_shapes_are_refused(change, match):
    config = next(iter(CONFIGS.values()))
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(config, **{**SIZES, **change})
