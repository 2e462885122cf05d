"""Training in stages: the changes of the model between them."""

import numpy as np
import pytest
from flax import nnx

from kronjax import nn, recipe
from kronjax.lm.training import staged, trainer
from kronjax.lm.training.settings import Settings

RULES = recipe.loads("""
rules:
  - match: "h.*.mlp.c_fc"
    method: kronecker
    terms: [{a_shape: [4, 32], rank: 1}]
    norm: frobenius
    weighting: none
  - {match: "*", method: keep}
""")
SETTINGS = Settings(steps=5, batch=2, length=8)


def kinds(model):
    return {name: type(x) for name, x in nn.linear_layers(model).items()}


def test_ranks_fall_from_stage_to_stage_and_runs_are_resumed(
    dense, tokens, tmp_path, monkeypatch
):
    stages = staged.progressive(0.4, 2, match="h.*.mlp.*")
    seen = []
    run = trainer.train

    def watched(model, *given, **options):
        ranks = [nn.as_layer(x).rank for x in nn.linear_layers(model).values()]
        seen.append((given[1].steps, ranks))
        return run(model, *given, **options)

    monkeypatch.setattr(trainer, "train", watched)
    options = {"teacher": dense, "folder": tmp_path, "progress": False}
    results = staged.run(dense, stages, tokens, SETTINGS, **options)
    assert [steps for steps, _ in seen] == [3, 2]
    # Kernels of 8 by 32 or 32 by 8: 63 and 40 per cent of 256 numbers.
    assert [ranks[2::4] for _, ranks in seen] == [[4, 4], [2, 2]]
    assert kinds(dense)["h.0.mlp.c_fc"] is nnx.Linear  # not modified
    final = results[-1].model
    assert kinds(final)["h.0.attn.c_attn"] is nnx.Linear
    again = staged.run(dense, stages, tokens, SETTINGS, **options)
    x = np.arange(8, dtype=np.int32)[None]
    np.testing.assert_array_equal(again[-1].model(x), final(x))
    assert len(again[0].history.steps) == 3  # read, not computed again


def test_blocks_are_fitted_in_turn_with_their_current_weights(dense, tokens):
    stages = staged.layer_by_layer(dense, RULES, order="backward")
    assert [stage.name for stage in stages] == ["block 1", "block 0"]
    model = nnx.clone(dense)
    stages[0].change(model)
    layers = kinds(model)
    assert layers["h.1.mlp.c_fc"] is nn.KroneckerLinear
    assert layers["h.0.mlp.c_fc"] is nnx.Linear
    fitted = nn.linear_layers(model)["h.1.mlp.c_fc"]
    # Training between the stages changes the weights that are fitted next.
    model.h[0].mlp.c_fc.kernel[...] *= 2.0
    stages[1].change(model)
    ours = nn.linear_layers(model)["h.0.mlp.c_fc"].materialize()
    other = nnx.clone(dense)
    stages[1].change(other)
    theirs = nn.linear_layers(other)["h.0.mlp.c_fc"].materialize()
    np.testing.assert_allclose(ours, 2 * theirs, rtol=1e-4, atol=1e-6)
    # The block compressed before is not changed.
    assert nn.linear_layers(model)["h.1.mlp.c_fc"] is fitted


def test_more_stages_than_steps_are_refused(dense, tokens):
    stages = staged.progressive(0.5, 6)
    with pytest.raises(ValueError, match="6 stages need as many steps; there are 5"):
        staged.run(dense, stages, tokens, SETTINGS)
    assert sum(staged.share(17, 5)) == 17
    with pytest.raises(ValueError, match="between 0 and 1"):
        staged.progressive(1.0, 2)
