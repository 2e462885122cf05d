"""Comparison of every port with transformers on torch."""

import jax.numpy as jnp
import numpy as np
import ports
import pytest

from kronjax import kronecker, lm, nn

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

BATCH, LENGTH = 2, 11


def make(variant):
    """Return a model of transformers with random weights, biases and norms."""
    values = dict(ports.VARIANTS[variant])
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=sorted(ports.VARIANTS))
def pair(request, tmp_path):
    theirs = make(request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, lm.load(tmp_path)


def tokens_and_mask():
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 60, (BATCH, LENGTH))
    mask = np.ones((BATCH, LENGTH), bool)
    mask[0, :4] = False
    return tokens, mask


def torch_logits(model, tokens, mask=None, positions=None):
    given = {"input_ids": torch.tensor(tokens)}
    if mask is not None:
        given["attention_mask"] = torch.tensor(mask.astype(int))
    if positions is not None:
        given["position_ids"] = torch.tensor(positions)
    with torch.no_grad():
        # On some machines the first call in a process has a relative error of 3e-5, and
        # the same call again one of 4e-7, as expected.
        model(**given, use_cache=False)
        return model(**given, use_cache=False).logits.numpy()


def assert_close(ours, theirs):
    scale = np.abs(theirs).max()
    assert np.abs(np.asarray(ours) - theirs).max() <= 2e-5 * scale


def test_logits(pair):
    theirs, ours = pair
    tokens, _ = tokens_and_mask()
    assert_close(ours(jnp.asarray(tokens)), torch_logits(theirs, tokens))


def test_logits_with_padding(pair):
    theirs, ours = pair
    tokens, mask = tokens_and_mask()
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    expected = torch_logits(theirs, tokens, mask, positions)
    got = np.asarray(ours(jnp.asarray(tokens), mask=jnp.asarray(mask)))
    assert_close(got[mask], expected[mask])


def test_logits_with_given_positions(pair):
    theirs, ours = pair
    tokens, _ = tokens_and_mask()
    positions = np.broadcast_to(np.arange(5, 5 + LENGTH), tokens.shape)
    expected = torch_logits(theirs, tokens, positions=positions)
    got = ours(jnp.asarray(tokens), positions=jnp.asarray(positions))
    assert_close(got, expected)


def test_cached_steps_equal_one_call(pair):
    _, ours = pair
    tokens, mask = tokens_and_mask()
    expected = np.asarray(ours(jnp.asarray(tokens), mask=jnp.asarray(mask)))
    cache = ours.empty_cache(BATCH, LENGTH + 3)
    logits, cache = ours.step(
        jnp.asarray(tokens[:, :6]), cache, mask=jnp.asarray(mask[:, :6])
    )
    assert_close(logits, expected[:, 5])
    for i in range(6, LENGTH):
        logits, cache = ours.step(jnp.asarray(tokens[:, i : i + 1]), cache)
        assert_close(logits, expected[:, i])


def test_an_export_opens_in_transformers(pair, tmp_path):
    """A factored and a masked layer are multiplied out."""
    _, ours = pair
    names = list(nn.linear_layers(ours))
    rng = np.random.default_rng(2)
    layer = nn.linear_layers(ours)[names[0]]
    m, n = layer.in_features, layer.out_features
    terms = kronecker.KroneckerTerms(
        jnp.asarray(rng.normal(size=(2, m // 2, n // 2)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 2, 2)), jnp.float32),
    )
    bias = None if layer.bias is None else layer.bias[...]
    nn.replace(ours, names[0], nn.KroneckerLinear([terms], bias))
    layer = nn.linear_layers(ours)[names[1]]
    kernel = layer.kernel[...]
    bias = None if layer.bias is None else layer.bias[...]
    nn.replace(ours, names[1], nn.MaskedLinear(kernel, kernel > 0, bias))
    lm.export(ours, tmp_path / "dense")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    tokens, _ = tokens_and_mask()
    assert_close(ours(jnp.asarray(tokens)), torch_logits(theirs.eval(), tokens))


def test_transformers_refuses_a_saved_factored_model(tmp_path):
    make("gpt2").save_pretrained(tmp_path / "in")
    model = lm.load(tmp_path / "in")
    layer = nn.linear_layers(model)["h.0.mlp.c_fc"]
    kernel = layer.kernel[...]
    nn.replace(model, "h.0.mlp.c_fc", nn.MaskedLinear(kernel, kernel > 0))
    lm.save(model, tmp_path / "out")
    with pytest.raises(ValueError, match="kronjax"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
