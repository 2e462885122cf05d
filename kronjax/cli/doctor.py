"""The command `kronjax doctor`: versions, devices, and a self-check."""

import json
import os
import platform
from typing import Any

import kronjax
from kronjax.cli.options import Json
from kronjax.io import compilation_cache


def doctor(*, as_json: Json = False) -> int:
    """Print versions, devices and precision, and solve a small problem as a self-check.

    The exit code is 1 if the self-check fails.

    Args:
        as_json: Print one JSON object instead of the table.
    """
    facts = {**_facts(), **_self_check()}
    if as_json:
        print(json.dumps(facts, allow_nan=False))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("property", "value")
        for key, value in facts.items():
            text = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(key if key.isupper() else key.replace("_", " "), text)
        Console(highlight=False, markup=False).print(table)
    return 0 if facts["self_check"] == "ok" else 1


def _facts() -> dict[str, Any]:
    from importlib import metadata

    import jax

    packages = ("jax", "jaxlib", "flax", "numpy", "safetensors")
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    variables = ("JAX_PLATFORMS", "XLA_FLAGS", "OMP_NUM_THREADS")
    return {
        "kronjax": kronjax.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [f"{device.device_kind} {device.id}" for device in jax.devices()],
        "x64": bool(getattr(jax.config, "jax_enable_x64", False)),
        "matmul_precision": precision or "default",
        "matmul_precision_of_kronjax": "highest",
        "compilation_cache": compilation_cache.cache_if_possible(),
        **{name: os.environ.get(name, "not set") for name in variables},
    }


def _self_check() -> dict[str, Any]:
    """Return whether a Kronecker product is recovered, and with which error."""
    import numpy as np

    a, b = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    configuration = kronjax.Configuration(a.shape, rank=1)
    result = kronjax.approximate(np.kron(a, b), configuration, progress=False)
    error = float(result.relative.spectral)
    return {
        "self_check": "ok" if error < 1e-5 else "failed",
        "self_check_error": float(f"{error:.2e}"),
    }
