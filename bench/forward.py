"""Forward passes of GPT-2 small with random weights by kronjax and torch, in one run.

Both compute the logits of 4 × 1024 tokens in float32: kronjax under jit, torch eagerly
with the unchanged model of transformers. Runs alternate, so that both meet the same
load of the machine. Needs torch and transformers: pip install -e '.[parity]'.
"""

import statistics
import time
from dataclasses import dataclass

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from bench import script
from kronjax.lm.models import gpt2

MAX_RATIO = 1.3
"""Largest allowed time of kronjax over that of torch."""


@dataclass(frozen=True)
class Experiment:
    """Sizes of the model and its input.

    Attributes:
        batch: Number of sequences.
        length: Number of tokens in a sequence.
        config: Settings that differ from those of GPT-2 small.
        repeats: Number of timed runs of each library.
    """

    batch: int
    length: int
    config: dict
    repeats: int


FULL = Experiment(4, 1024, {}, 5)
QUICK = Experiment(
    2, 64, {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 500}, 3
)


def measure(experiment):
    """Return the seconds of every run by library, and those of the first run."""
    tokens = np.random.default_rng(0).integers(
        0, 500, (experiment.batch, experiment.length)
    )
    model = gpt2.Model(gpt2.Config(**experiment.config), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    ours = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**experiment.config))
    peer.eval()

    def run_kronjax():
        jax.block_until_ready(ours(state, tokens.astype(np.int32)))

    def run_torch():
        with torch.no_grad():
            peer(torch.tensor(tokens), use_cache=False)

    begun = time.perf_counter()
    run_kronjax()
    compile_seconds = time.perf_counter() - begun
    run_torch()
    seconds = {"kronjax": [], "torch": []}
    for repeat in range(experiment.repeats):
        script.say(f"run {repeat + 1} of {experiment.repeats}")
        for name, run in (("kronjax", run_kronjax), ("torch", run_torch)):
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return seconds, compile_seconds


def draw(seconds):
    """Draw every run as a point, in units of torch's median."""
    chart, axes = script.figure(5, 3.4)
    unit = statistics.median(seconds["torch"])
    for place, (name, runs) in enumerate(seconds.items()):
        color = script.COLORS.get(name, "tab:gray")
        axes[0, 0].plot([place] * len(runs), np.array(runs) / unit, "o", color=color)
    axes[0, 0].axhline(MAX_RATIO, color="black", linestyle=":")
    axes[0, 0].set_xticks(range(len(seconds)), list(seconds))
    axes[0, 0].set_xlim(-0.5, len(seconds) - 0.5)
    axes[0, 0].set_ylim(0)
    axes[0, 0].set_ylabel("seconds over the median of torch")
    return chart


def main():
    """Run the benchmark, and write `forward.json` and `forward.png`."""
    given = script.parser(__doc__).parse_args()
    experiment = QUICK if given.quick else FULL
    seconds, compile_seconds = measure(experiment)
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    ratio = medians["kronjax"] / medians["torch"]
    target = script.Target("time of kronjax over torch", ratio, MAX_RATIO)
    script.print_targets([target])
    results = {
        "quick": given.quick,
        "targets": [target.plain()],
        "batch": experiment.batch,
        "length": experiment.length,
        "seconds": seconds,
        "first_run_seconds": compile_seconds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch_threads": torch.get_num_threads(),
    }
    script.publish("forward", results, draw(seconds), given.out)


if __name__ == "__main__":
    main()
