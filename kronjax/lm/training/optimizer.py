"""AdamW with warm-up and a cosine schedule.

Weight decay applies to matrices and factors only: not to biases, norms, or the scales
of terms, all of which are vectors.

References: Loshchilov and Hutter (2017, 2019).

>>> rate = schedule(Optimizer(rate=1.0, warmup=2, final=0.1), steps=10)
>>> [round(float(rate(step)), 3) for step in (0, 1, 2, 10)]
[0.5, 1.0, 1.0, 0.1]
"""

import jax
import optax

from kronjax.lm.training.parameters import Arrays
from kronjax.lm.training.settings import Optimizer


def schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of steps done.

    Raises:
        ValueError: If the warm-up does not fit into the run.
    """
    if settings.warmup is None:
        warmup = min(steps // 10, 200)
    elif settings.warmup >= steps:
        raise ValueError(
            f"the warm-up of {settings.warmup} steps does not fit into a run of "
            f"{steps}: give more steps, or a shorter warm-up"
        )
    else:
        warmup = settings.warmup
    top, bottom = settings.rate, settings.rate * settings.final
    cosine = optax.cosine_decay_schedule(top, max(steps - warmup, 1), settings.final)
    if not warmup:
        return cosine if bottom < top else optax.constant_schedule(top)
    # The rate of the first step is not 0.
    rise = optax.linear_schedule(top / warmup, top, max(warmup - 1, 1))
    return optax.join_schedules([rise, cosine], [warmup])


def transformation(settings: Optimizer, steps: int) -> optax.GradientTransformation:
    """Return the transformation from gradients to updates of parameters."""
    adamw = optax.adamw(
        schedule(settings, steps),
        b1=settings.b1,
        b2=settings.b2,
        weight_decay=settings.decay,
        mask=decays,
    )
    if not settings.clip:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.clip), adamw)


def decays(parameters: Arrays) -> dict[str, bool]:
    """Return for each parameter whether weight decay applies to it."""
    return jax.tree.map(lambda x: x.ndim > 1, parameters)
