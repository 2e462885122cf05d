"""Overhead of the training loop over a minimal loop written by hand, on one model.

The loop by hand has `nnx.split`, a jitted and donating step, optax and random windows.
It runs inside of the other loop, a few steps of each in turn, so that both meet the
same load of the machine. The further work of the training loop (shuffled blocks, guards
against NaN, a line of metrics for every step) should cost almost nothing.
"""

import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from bench import script
from kronjax import demo
from kronjax.demo import corpus
from kronjax.lm.models import gpt2
from kronjax.lm.models.base import tokenizer_of
from kronjax.lm.training import trainer
from kronjax.lm.training.optimizer import schedule
from kronjax.lm.training.settings import Optimizer, Settings

MAX_OVERHEAD = 0.05
"""Largest allowed overhead over the time of a step by hand."""

SMALL = gpt2.Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
"""A model whose steps take almost no time, so that the loop dominates."""


@dataclass(frozen=True)
class Experiment:
    """A model, its text, and the number of steps.

    Attributes:
        name: Name of the model.
        model: The model to train.
        tokens: Tokens of the text, `[n]`.
        batch: Number of windows in a step.
        steps: Number of steps in a turn.
        turns: Number of turns of both loops.
    """

    name: str
    model: object
    tokens: np.ndarray
    batch: int
    steps: int
    turns: int


class ByHand:
    """A hook that runs the minimal loop between two turns of the training loop."""

    def __init__(self, experiment):
        self.experiment = experiment
        self.seconds = []
        settings, total = Optimizer(), experiment.steps * experiment.turns
        model, context = experiment.model, experiment.model.config.context
        graph, state = nnx.split(model)
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                schedule(settings, total),
                b2=settings.b2,
                weight_decay=settings.decay,
                mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
            ),
        )

        def step(carry, windows):
            def loss(state):
                logits = nnx.merge(graph, state)(windows[:, :-1])
                return jnp.mean(
                    optax.softmax_cross_entropy_with_integer_labels(
                        logits, windows[:, 1:]
                    )
                )

            state, moments = carry
            value, gradient = jax.value_and_grad(loss)(state)
            updates, moments = optimizer.update(gradient, moments, state)
            return (optax.apply_updates(state, updates), moments), value

        self._step = jax.jit(step, donate_argnums=0)
        state = jax.tree.map(jnp.copy, state)
        self._carry = state, optimizer.init(state)
        self._draw = np.random.default_rng(0)
        self._context = context
        self._run()  # compiles

    def __repr__(self):
        return "ByHand()"

    def due(self, step):
        return step > 0 and step % self.experiment.steps == 0

    def __call__(self, step, model):
        self.seconds.append(self._run())

    def state(self):
        return {}

    def restore(self, state):
        pass

    def _run(self):
        tokens, size = self.experiment.tokens, self._context
        begun = time.perf_counter()
        for _ in range(self.experiment.steps):
            begins = self._draw.integers(0, len(tokens) - size, self.experiment.batch)
            windows = np.stack([tokens[i : i + size + 1] for i in begins])
            self._carry, value = self._step(self._carry, windows)
        jax.block_until_ready(value)
        return time.perf_counter() - begun


def measure(experiment):
    """Return the seconds of a step by hand and by the loop, for every turn."""
    hook = ByHand(experiment)
    steps = experiment.steps
    settings = Settings(
        steps=steps * experiment.turns, batch=experiment.batch, held_out=0.0
    )
    trained = trainer.train(
        experiment.model, experiment.tokens, settings, hook=hook, progress=False
    )
    unit = experiment.batch * experiment.model.config.context
    each = [unit / line["tokens_per_second"] for line in trained.history.steps]
    ours = np.array(each).reshape(experiment.turns, steps).sum(axis=1)
    return np.array(hook.seconds) / steps, ours / steps


def draw(cases):
    """Draw the overhead of every turn by model."""
    chart, axes = script.figure(5, 3.4)
    for place, case in enumerate(cases.values()):
        ratios = np.array(case["loop"]) / np.array(case["by_hand"]) - 1
        axes[0, 0].plot([place] * len(ratios), 100 * ratios, "o", color="tab:blue")
        axes[0, 0].plot([place], 100 * case["overhead"], "_", color="k", markersize=24)
    axes[0, 0].axhline(100 * MAX_OVERHEAD, color="black", linestyle=":")
    axes[0, 0].set_xticks(range(len(cases)), list(cases))
    axes[0, 0].set_xlim(-0.5, len(cases) - 0.5)
    axes[0, 0].set_ylabel("overhead of the loop, % of a step")
    return chart


def main():
    """Run the benchmark, and write `training.json` and `training.png`."""
    given = script.parser(__doc__).parse_args()
    small = gpt2.Model(SMALL, rngs=nnx.Rngs(0))
    counted = np.arange(4096, dtype=np.int32) % 64
    experiments = [Experiment("tiny", small, counted, 4, 20, 3 if given.quick else 40)]
    if not given.quick:
        model = demo.model()
        tokens = tokenizer_of(model).encode(corpus.training()[:400_000])
        experiments.append(Experiment("bundled", model, tokens, 2, 5, 24))
    cases = {}
    for experiment in experiments:
        turns, steps = experiment.turns, experiment.steps
        script.say(f"{experiment.name}: {turns} turns of {steps} steps")
        by_hand, ours = measure(experiment)
        cases[experiment.name] = {
            "by_hand": by_hand,
            "loop": ours,
            "overhead": statistics.median(ours / by_hand) - 1,
            "milliseconds_more": 1e3 * statistics.median(ours - by_hand),
        }
    rows = [
        (name, f"{100 * x['overhead']:.1f} %", f"{x['milliseconds_more']:.3f}")
        for name, x in cases.items()
    ]
    script.table("The loop", ("model", "overhead", "ms a step"), rows)
    targets = [
        script.Target(f"overhead, {name} model", case["overhead"], MAX_OVERHEAD)
        for name, case in cases.items()
        if name == "bundled" or given.quick
    ]
    script.print_targets(targets)
    results = {
        "quick": given.quick,
        "targets": [target.plain() for target in targets],
        "cases": cases,
    }
    script.publish("training", results, draw(cases), given.out)


if __name__ == "__main__":
    main()
