"""Products whose sums run backwards: what else a processor may make of them.

Libraries sum in an order that depends on the processor and its caches. Of the tests
that compare numbers, those fail in another order that hang on the last digits.
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
