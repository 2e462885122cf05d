"""Training on one device and on eight, copied or split, gives the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kronjax.lm.training.sharding import Placement


@pytest.fixture(scope="module")
def results():
    flags = os.environ.get("XLA_FLAGS", "")
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            Path(__file__).with_name("sharded_training.py"),
        ],
        env={
            **os.environ,
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("shard", ["data", "full"])
def test_losses_equal_those_of_one_device(results, shard):
    curves = results["curves"]
    assert len(curves["none"]) == 12
    assert curves["none"][-1] < curves["none"][0] - 0.5
    np.testing.assert_allclose(curves[shard], curves["none"], rtol=1e-5)


def test_a_run_is_resumed_with_another_number_of_devices(results):
    curves = results["curves"]
    assert curves["resumed"][:6] == curves["full"][:6]
    np.testing.assert_allclose(curves["resumed"], curves["none"], rtol=1e-5)


def test_fully_sharded_parameters_are_split(results):
    parts = results["parts"]
    assert parts["wte.embedding"] == parts["h.0.mlp.c_proj.kernel"] == 1 / 8
    assert parts["h.0.mlp.c_fc.a.0"] == 1 / 8
    assert parts["h.0.mlp.c_fc.b.0"] == 1 / 8


def test_an_unknown_placement_is_refused():
    with pytest.raises(ValueError, match="write none, data or full"):
        Placement.of("zero")
