"""The GPU kernels compile for an H200 on a machine without a GPU, and spill nothing."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_for_h200.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"),
    reason="the CUDA plugin is not installed: the extra gpu-aot",
)
@pytest.mark.parametrize("language", ["triton", "mosaic"])
def test_kernels_compile_for_an_h200_without_spills(language):
    root = SCRIPT.parents[2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, SCRIPT, language],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "unknown" not in result.stdout, "Expected ptxas to tell the spills"
