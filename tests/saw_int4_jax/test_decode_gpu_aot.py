"""What a decode step launches on an H200, on a machine without a GPU."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"),
    reason="the CUDA plugin is not installed: the extra gpu-aot",
)
def test_a_step_is_one_cuda_graph_of_few_launches():
    root = pathlib.Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "tests.saw_int4_jax.decode_step_for_h200"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
