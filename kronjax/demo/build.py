"""Training of the bundled model: `python -m kronjax.demo.build --out FOLDER`.

A GPT-2 of 2.2 million parameters learns the documentation of the standard library
(`kronjax.demo.corpus`) with AdamW, warm-up and a cosine schedule, in float32, on random
windows of the text. All random numbers come from one seed. The state is saved in
`FOLDER.training` every hundred steps, and the next run resumes from it; the file is
removed at the end. With `--start` a run begins with the weights of an earlier one, and
with a new warm-up; the bundled model took two runs.

References: Loshchilov and Hutter (2019) for AdamW, and (2017) for warm restarts;
Radford et al. (2019) for the model.

>>> CONFIG.n_embd // CONFIG.n_head
32
"""

import argparse
import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import nnx

from kronjax import lm
from kronjax.demo import corpus
from kronjax.io import atomic
from kronjax.lm.checkpoints import hugging_face
from kronjax.lm.evaluation import perplexity
from kronjax.lm.models import gpt2, initialize, likelihood
from kronjax.lm.models.base import LanguageModel, tokenizer_of
from kronjax.lm.text import tokenizer as tokenizers

# Widths with many divisors: 192 = 2⁶ 3, 576, 768 and 2048.
CONFIG = gpt2.Config(
    vocab_size=2048,
    n_positions=256,
    n_embd=192,
    n_layer=4,
    n_head=6,
)
"""Configuration of the bundled model."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of a training run.

    Attributes:
        steps: Number of updates.
        batch: Number of windows in an update, each as long as the context of the model.
        rate: The largest learning rate.
        warmup: Number of updates until that rate, at most half of all; a cosine then
            reduces it to a hundredth.
        decay: Weight decay of the matrices.
        seed: Seed of the weights and the windows.
    """

    steps: int = 5000
    batch: int = 2
    rate: float = 2e-3
    warmup: int = 200
    decay: float = 0.1
    seed: int = 0

    def optimizer(self) -> optax.GradientTransformation:
        """Return AdamW with these settings, after clipping of the gradient norm."""
        rate = optax.warmup_cosine_decay_schedule(
            0.0,
            self.rate,
            min(self.warmup, self.steps // 2),
            self.steps,
            self.rate / 100,
        )
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                rate,
                b2=0.98,
                weight_decay=self.decay,
                mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
            ),
        )


def build(
    folder: Path, plan: Plan, *, start: Path | None = None, every: int = 100
) -> perplexity.Perplexity:
    """Train, write and evaluate the model.

    Args:
        folder: Output folder of the model, in float16.
        plan: Settings of the training.
        start: Folder of an earlier model to start from, with its tokenizer, or None.
        every: Number of steps between two lines of progress.

    Returns:
        The perplexity of the written model on the held-out text.
    """
    folder = folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)  # fail before the training
    texts = list(corpus.documents())
    if start is None:
        tokenizer = tokenizers.train(
            texts, CONFIG.vocab_size, context=CONFIG.n_positions
        )
        model = initialize.begin(CONFIG, tokenizer, plan.seed)
    else:
        model = lm.load(start, dtype="float32")
        tokenizer = tokenizer_of(model)
    end = tokenizer.encode(tokenizers.END)
    tokens = np.concatenate(
        [x for text in texts for x in (tokenizer.encode(text), end)]
    )
    print(f"{len(texts)} modules, {len(tokens)} tokens", flush=True)
    kept = folder.with_name(folder.name + ".training")
    model = train(model, tokens, plan, kept=kept, every=every)
    model.tokenizer = tokenizer
    lm.save(hugging_face.cast(model, "float16"), folder)
    kept.unlink(missing_ok=True)
    result = perplexity.perplexity(
        lm.load(folder, dtype="float32"), corpus.held_out(), "krony-pt", progress=False
    )
    print(f"held-out perplexity {result.perplexity:.3f}", flush=True)
    return result


def train(
    model: LanguageModel,
    tokens: np.ndarray,
    plan: Plan,
    *,
    kept: Path | None = None,
    every: int = 100,
) -> LanguageModel:
    """Train a model, and return the trained model.

    Args:
        model: Initial model; not modified.
        tokens: Training tokens, `[n]`, more than the context of the model.
        plan: Settings of the training.
        kept: File in which the state is saved, and from which it is resumed; None to
            save nothing.
        every: Number of steps between two lines of progress, and between two saves.
    """
    context = model.config.context
    graph, parameters = nnx.split(model)
    optimizer = plan.optimizer()
    state = parameters, optimizer.init(parameters)

    @jax.jit
    def update(state, windows):
        def loss(parameters):
            return jnp.mean(
                likelihood.token_losses(nnx.merge(graph, parameters), windows)
            )

        parameters, moments = state
        value, gradient = jax.value_and_grad(loss)(parameters)
        changes, moments = optimizer.update(gradient, moments, parameters)
        return (optax.apply_updates(parameters, changes), moments), value

    mark = _fingerprint(parameters, tokens, plan)
    begun, state = _resume(kept, mark, state)
    clock, values = time.perf_counter(), []
    for step in range(begun, plan.steps):
        state, value = update(state, _windows(tokens, context, plan, step))
        values.append(value)
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            mean = float(np.mean(jax.device_get(values)))
            seconds = time.perf_counter() - clock
            speed = plan.batch * context * len(values) / seconds
            print(
                f"step {step + 1} of {plan.steps}: loss {mean:.4f}, "
                f"{speed:.0f} tokens/s",
                flush=True,
            )
            if kept is not None:
                _keep(kept, mark, step + 1, state)
            clock, values = time.perf_counter(), []
    return nnx.merge(graph, state[0])


def _windows(tokens, context, plan, step):
    """Return the random windows of a step, `[batch, context + 1]`."""
    generator = np.random.default_rng((plan.seed, step))
    begins = generator.integers(0, len(tokens) - context, plan.batch)
    return np.stack([tokens[i : i + context + 1] for i in begins])


def _fingerprint(parameters, tokens, plan) -> np.ndarray:
    """Return a digest of the weights, the tokens and the settings."""
    hashed = hashlib.sha256(repr(plan).encode() + tokens.tobytes())
    for leaf in jax.device_get(jax.tree.leaves(parameters)):
        hashed.update(np.asarray(leaf).tobytes())
    return np.frombuffer(hashed.digest(), np.uint8)


def _keep(kept: Path, mark: np.ndarray, step: int, state: Any) -> None:
    leaves = jax.device_get(jax.tree.leaves(state))
    arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}
    arrays |= {"mark": mark, "step": np.array(step)}
    atomic.write(kept, safetensors.numpy.save(arrays))


def _resume(kept: Path | None, mark: np.ndarray, state: Any) -> tuple[int, Any]:
    """Return the number of completed steps, and the state after them."""
    if kept is None or not kept.is_file():
        return 0, state
    arrays = safetensors.numpy.load(kept.read_bytes())
    if not np.array_equal(arrays["mark"], mark):
        print(f"{kept} belongs to another training run and is not used", flush=True)
        return 0, state
    step = int(arrays["step"])
    print(f"resuming from step {step}", flush=True)
    leaves, tree = jax.tree.flatten(state)
    return step, tree.unflatten(
        [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]
    )


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m kronjax.demo.build", description="Train the bundled model."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--start", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--rate", type=float, default=Plan.rate)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1; got {arguments.steps}")
    plan = Plan(steps=arguments.steps, rate=arguments.rate, seed=arguments.seed)
    build(arguments.out, plan, start=arguments.start)


if __name__ == "__main__":
    main()
