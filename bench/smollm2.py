"""SmolLM2 read from a GGUF file, compared with the same model in torch.

The script continues a prompt greedily, and computes the perplexity of a text by kronjax
and by transformers on torch with the same dequantised weights, window by window, and
the largest difference of their logits relative to the largest logit. The windows do not
overlap, the first token of each is not scored, and the perplexity is that of the mean
over tokens. Control-C ends the run early with the windows so far.
"""

import math
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from bench import script
from kronjax import lm
from kronjax.lm.checkpoints import gguf

PROMPT, ANSWER = "The capital of France is", "Paris"
MAX_DIFFERENCE = 2e-5
MAX_PERPLEXITY_DIFFERENCE = 1e-5


def in_jax(model):
    """Return a compiled function from a window `[t]` to its logits `[t, vocab]`."""
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state, tokens):
        with jax.default_matmul_precision("highest"):
            return nnx.merge(graph, state)(tokens[None])[0]

    return lambda tokens: np.asarray(forward(state, tokens))


def in_torch(path):
    """Return the same function by transformers, or None if it is not installed.

    Only the dequantised tensors are shared, not the model and the map of names.
    """
    try:
        import torch
        import transformers
    except ImportError:
        return None
    values, tensors, _ = gguf.read(path)
    config = transformers.LlamaConfig(**values)
    model = transformers.LlamaForCausalLM(config).eval()
    numbers = {name: torch.tensor(np.asarray(x)) for name, x in tensors.items()}
    missing, extra = model.load_state_dict(numbers, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not extra
    assert set(missing) <= tied
    model.tie_weights()

    def forward(tokens):
        with torch.inference_mode():
            return model(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()

    return forward


def loss(logits, tokens):
    """Return the mean negative log-likelihood of all tokens but the first."""
    logits = logits[:-1]
    top = logits.max(axis=1)
    total = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(logits)), tokens[1:]].astype(np.float64)
    return float(np.mean(np.log(total) + top - chosen))


def compare(windows, ours, theirs):
    """Return losses and seconds of every window, and the difference of the logits."""
    rows, begun = [], time.perf_counter()
    for i, tokens in enumerate(windows):
        try:
            rows.append(compare_window(tokens, ours, theirs))
        except KeyboardInterrupt:
            script.say(f"interrupted: {len(rows)} windows count")
            break
        if i == 0 or time.perf_counter() - begun > 30 or i + 1 == len(windows):
            begun = time.perf_counter()
            script.say(f"window {i + 1} of {len(windows)}: {summary_of(rows)}")
    return rows


def compare_window(tokens, ours, theirs):
    """Return the row of a window."""
    row, logits = {}, {}
    for name, forward in (("kronjax", ours), ("torch", theirs)):
        if forward is not None:
            start = time.perf_counter()
            logits[name] = forward(tokens)
            row[f"{name}_seconds"] = time.perf_counter() - start
            row[f"{name}_loss"] = loss(logits[name], tokens)
    if theirs is not None:
        scale = float(np.abs(logits["torch"]).max())
        apart = float(np.abs(logits["kronjax"] - logits["torch"]).max())
        row["difference"] = apart / scale
    return row


def summary_of(rows):
    """Return perplexities over the windows so far, and the largest difference."""
    result = {}
    for name in ("kronjax", "torch"):
        losses = [row[f"{name}_loss"] for row in rows if f"{name}_loss" in row]
        if losses:
            result[f"{name}_perplexity"] = math.exp(np.mean(losses))
    if "difference" in rows[0]:
        result["difference"] = max(row["difference"] for row in rows)
    return result


def targets_of(summary, continuation, real):
    """Return the targets; with random weights only those of agreement."""
    targets = []
    if "difference" in summary:
        ours, theirs = (summary[f"{name}_perplexity"] for name in ("kronjax", "torch"))
        targets = [
            script.Target(
                "logits apart from torch, relative to the largest",
                summary["difference"],
                MAX_DIFFERENCE,
            ),
            script.Target(
                "perplexities apart, relative",
                abs(ours / theirs - 1),
                MAX_PERPLEXITY_DIFFERENCE,
            ),
        ]
    if real:
        what = f"{ANSWER!r} in the continuation"
        targets.append(script.Target(what, int(ANSWER in continuation), 1, True))
    return targets


def draw(rows):
    """Draw the running perplexity, and the difference of the logits."""
    chart, axes = script.figure(9, 3.5, columns=2)
    counts = np.arange(1, len(rows) + 1)
    for name, color, style in (("kronjax", "tab:blue", "-"), ("torch", "black", ":")):
        losses = [row[f"{name}_loss"] for row in rows if f"{name}_loss" in row]
        if losses:
            running = np.exp(np.cumsum(losses) / counts)
            axes[0, 0].plot(counts, running, style, color=color, label=name)
    axes[0, 0].set_xlabel("windows")
    axes[0, 0].set_ylabel("perplexity so far")
    axes[0, 0].legend(frameon=False)
    if "difference" in rows[0]:
        axes[0, 1].semilogy(counts, [row["difference"] for row in rows], ".")
        axes[0, 1].axhline(MAX_DIFFERENCE, color="black", linestyle=":")
    axes[0, 1].set_xlabel("window")
    axes[0, 1].set_ylabel("largest difference / largest logit")
    return chart


def run(path, text, size, count, *, real):
    """Measure everything; return results and rows."""
    model = lm.load(path)
    assert model.tokenizer is not None
    continuation = lm.generate(model, PROMPT, max_new_tokens=12)
    script.say(f"{PROMPT!r} continues with {continuation!r}")
    tokens = model.tokenizer.encode(text, special=False)
    windows = tokens[: len(tokens) // size * size].reshape(-1, size)[:count]
    rows = compare(windows, in_jax(model), in_torch(path))
    summary = summary_of(rows)
    targets = targets_of(summary, continuation, real)
    script.print_targets(targets)
    results = {
        "prompt": PROMPT,
        "continuation": continuation,
        "tokens_in_text": len(tokens),
        "window": size,
        "tokens_scored": len(rows) * (size - 1),
        "summary": summary,
        "targets": [target.plain() for target in targets],
        "windows": rows,
    }
    return results, rows


def main():
    """Run the benchmark, and write `smollm2.json` and `smollm2.png`."""
    parser = script.parser(__doc__)
    parser.add_argument("--model", type=Path, help="SmolLM2-135M as .gguf")
    parser.add_argument("--text", type=Path, help="English, such as WikiText-2")
    parser.add_argument(
        "--windows", type=int, default=250, help="number of windows, from the first"
    )
    given = parser.parse_args()
    if not given.quick and (given.model is None or given.text is None):
        parser.error("--model and --text are needed unless --quick is given")
    if given.quick:
        from bench import gguf_files

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.gguf"
            gguf_files.write(path, gguf_files.random_model(), "Q8_0")
            results, rows = run(path, "the and then" * 100, 32, 4, real=False)
    else:
        text = given.text.read_text(encoding="utf-8")
        results, rows = run(given.model, text, 1024, given.windows, real=True)
    script.publish("smollm2", {"quick": given.quick, **results}, draw(rows), given.out)


if __name__ == "__main__":
    main()
