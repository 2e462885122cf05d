import numpy as np

from kronjax import nn
from kronjax.io.cache import Cache
from kronjax.lm.compression import candidates
from kronjax.runs.closed_form import LowRank
from kronjax.runs.joint import Target
from kronjax.runs.settings import SolveSettings

SHAPE = (48, 64)


def _probes(kernel):
    target = Target("h.0.x", kernel.astype(np.float32))
    settings = SolveSettings(max_products=80)
    return candidates.probe(target, LowRank.of(target), Cache(), settings)


def test_probes_of_a_kronecker_sum_try_all_sizes_and_find_it():
    draws = np.random.default_rng(0)
    products = [
        np.kron(draws.standard_normal((6, 8)), draws.standard_normal((8, 8)))
        for _ in range(2)
    ]
    kernel = sum(products) + 0.1 * draws.standard_normal(SHAPE)
    found = _probes(kernel)
    sizes = [size for _, share, size, _ in found if share == 0.5]
    assert sizes == list(candidates.PROBES)
    assert min(ratio for *_, ratio in found) < 0.1


def test_probes_of_decaying_singular_values_stop_at_the_smallest_size():
    draws = np.random.default_rng(1)
    u, v = (np.linalg.qr(draws.standard_normal((n, 48)))[0] for n in SHAPE)
    ((_, share, size, ratio),) = _probes(u * 0.7 ** np.arange(48) @ v.T)
    assert (share, size) == (0.5, candidates.PROBES[0])
    assert ratio > 1


def test_sums_are_candidates_near_the_sizes_of_promising_probes():
    layer = nn.linear(np.zeros((48, 64), np.float32), None)
    tails = np.linspace(1, 0, 49)
    ratios = [("h.0.x", 0.5, 0.3, 0.5), ("h.0.x", 0.0, 0.3, 0.95)]
    choices = candidates.of_layer("h.1.x", layer, 2.0, tails, ratios)
    mixed = [x for x in choices if x.method.name == "kronecker"]
    assert {x.method.name for x in choices} == {"keep", "interpolative", "kronecker"}
    assert all(len(x.configurations) == 2 for x in mixed)
    assert all(abs(x.fraction - 0.3) < 0.15 for x in mixed)
    assert all(x.damage < x.low_rank for x in mixed)
