"""Comparison of perplexities with the loops of other projects, on torch."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kronjax.lm.evaluation import perplexity
from kronjax.lm.models import gpt2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def pair():
    """A tiny GPT-2 of transformers with enlarged weights, and its port."""
    sizes = dict(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
    ours = gpt2.Model(gpt2.Config(**sizes), rngs=nnx.Rngs(0))
    tensors = theirs.transformer.state_dict()
    state = nnx.state(ours, nnx.Param)
    leaf_names = {"embedding": "weight", "kernel": "weight", "scale": "weight"}
    for path, variable in nnx.to_flat_state(state):
        *parents, leaf = map(str, path)
        name = ".".join([*parents, leaf_names.get(leaf, leaf)])
        variable.set_value(jnp.asarray(tensors[name].numpy()))
    nnx.update(ours, state)
    return theirs, ours


def test_strided_perplexity_equals_the_documentation_of_transformers(pair):
    theirs, ours = pair
    tokens = np.random.default_rng(0).integers(0, 300, 203)
    ids = torch.tensor(tokens)[None]
    total, count, before = 0.0, 0, 0
    for begin in range(0, 203, 32):
        end = min(begin + 64, 203)
        targets = ids[:, begin:end].clone()
        targets[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = theirs(ids[:, begin:end], labels=targets).loss
        # Labels are shifted inside, so the first of a window never counts.
        new = int((targets[:, 1:] != -100).sum())
        total, count, before = total + new * float(loss), count + new, end
        if end == 203:
            break
    result = perplexity.perplexity(ours, tokens, "hf-strided")
    assert result.tokens_scored == count == 202
    assert result.perplexity == pytest.approx(np.exp(total / count), rel=1e-5)


def test_gptq_perplexity_equals_the_code_of_gptq(pair):
    theirs, ours = pair
    tokens = np.random.default_rng(1).integers(0, 300, 203)
    ids = torch.tensor(tokens)[None]
    seqlen, nlls = 64, []
    nsamples = ids.numel() // seqlen
    for i in range(nsamples):
        batch = ids[:, i * seqlen : (i + 1) * seqlen]
        with torch.no_grad():
            logits = theirs(batch).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], batch[0, 1:])
        nlls.append(loss * seqlen)
    expected = float(torch.exp(torch.stack(nlls).sum() / (nsamples * seqlen)))
    result = perplexity.perplexity(ours, tokens, "gptq-2048")
    assert result.windows == nsamples == 3
    assert result.perplexity == pytest.approx(expected, rel=1e-5)


def test_krony_pt_perplexity_is_the_mean_of_the_losses_of_windows(pair):
    theirs, ours = pair
    tokens = np.random.default_rng(2).integers(0, 300, 203)
    losses = []
    for part in torch.tensor(tokens)[None].split(64, dim=1):
        with torch.no_grad():
            losses.append(theirs(part, labels=part).loss)
    result = perplexity.perplexity(ours, tokens, "krony-pt")
    expected = float(torch.exp(torch.stack(losses).mean()))
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
