"""Products of float32 matrices in the modes of tensor cores, on a GPU or emulated.

The factors are rounded to TF32 (10 bits of mantissa) or bfloat16 (7 bits), or split
into parts of so many bits; sums are accumulated in float32.  The emulation rounds and
splits in the same way, and multiplies the parts in float32, which is exact for each
product of entries; it does not reproduce the additions of tensor cores.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Mode:
    """A way to multiply float32 matrices.

    Attributes:
        bits: Number of bits in the mantissa of a part.
        parts: Number of parts of each factor; products of the smallest are left out.
        preset: The algorithm of the GPU.
        color: Colour in the figure.
    """

    bits: int
    parts: int
    preset: jax.lax.DotAlgorithmPreset
    color: str


PRESETS = jax.lax.DotAlgorithmPreset
MODES = {
    "float32": Mode(23, 1, PRESETS.F32_F32_F32, "black"),
    "bf16 x6": Mode(7, 3, PRESETS.BF16_BF16_F32_X6, "tab:blue"),
    "tf32 x3": Mode(10, 2, PRESETS.TF32_TF32_F32_X3, "tab:cyan"),
    "bf16 x3": Mode(7, 2, PRESETS.BF16_BF16_F32_X3, "tab:green"),
    "tf32": Mode(10, 1, PRESETS.TF32_TF32_F32, "tab:orange"),
    "bf16": Mode(7, 1, PRESETS.BF16_BF16_F32, "tab:red"),
}


def is_gpu():
    """Return whether jax computes on a GPU; otherwise the modes are emulated."""
    return jax.default_backend() == "gpu"


def multiplier(mode):
    """Return the function that multiplies in a mode, the device's where it has it."""
    if (mode.bits, mode.parts) == (23, 1):
        return lambda x, y: jnp.matmul(x, y, precision="highest")
    if is_gpu():
        return lambda x, y: jnp.matmul(x, y, precision=mode.preset)
    return lambda x, y: emulated(x, y, mode)


def emulated(x, y, mode):
    """Return the sum in float32 of products of parts, the smallest first."""
    left, right = split(x, mode), split(y, mode)
    total = jnp.zeros((), x.dtype)
    for order in reversed(range(mode.parts)):
        for i in range(order + 1):
            part = jnp.matmul(left[i], right[order - i], precision="highest")
            total = total + part
    return total


def split(x, mode):
    """Return parts of `bits` bits each, the largest first."""
    parts = []
    for _ in range(mode.parts):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=mode.bits)
        parts.append(part)
        x = x - part
    return parts
