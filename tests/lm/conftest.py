"""Models are tested as users run them: 32-bit, and with promotion as flax needs it."""

import jax
import pytest


@pytest.fixture(autouse=True)
def users_settings():
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
