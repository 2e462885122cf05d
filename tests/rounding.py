"""Matrix products with another order of summation.

Libraries sum in an order that depends on the processor and its caches. Tests that
depend on the last digits of a product fail in another order.
"""

import functools

import jax.numpy as jnp


def reverse_sums():
    """Let `jnp.matmul` sum in reverse, for the rest of the process."""
    multiply = jnp.matmul

    @functools.wraps(multiply)
    def reverse(x, y, **options):
        rows = max(jnp.ndim(y) - 2, 0)
        return multiply(jnp.flip(x, -1), jnp.flip(y, rows), **options)

    jnp.matmul = reverse
