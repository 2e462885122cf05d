import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kronjax.linalg import compiling


@pytest.fixture(autouse=True)
def without_flags(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")


def gram(x):
    return x.T @ x


def test_small_programs_are_not_optimised():
    small, large = (compiling.options(compiling.SMALL + i, "cpu") for i in (0, 1))
    assert (small[compiling.LEVEL], large[compiling.LEVEL]) == (0, 1)


def test_other_platforms_keep_their_options():
    assert compiling.options(1, "gpu") == {}


def test_emitters_are_kept_where_digits_must_not_depend_on_devices():
    chosen = compiling.options(1, "cpu", keeps_emitters=True)
    assert set(chosen) == {compiling.LEVEL}


def test_options_of_the_environment_are_left_to_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{compiling.LEVEL}=3")
    assert compiling.LEVEL not in compiling.options(1, "cpu")


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(compiling, "EMITTERS", "xla_no_such_option")
    assert set(compiling.options(1, "cpu")) == {compiling.LEVEL}


@pytest.mark.parametrize("entries", [1, compiling.SMALL + 1])
def test_programs_compute_the_same_as_with_the_defaults_of_xla(entries):
    x = np.random.default_rng(0).standard_normal((12, 7))
    functions = {"gram": gram, "inverse": lambda x: jnp.linalg.inv(gram(x))}
    lowered = {name: jax.jit(f).lower(x) for name, f in functions.items()}
    coming = compiling.start(lowered, entries)
    compiled = {name: program.result() for name, program in coming.items()}
    assert set(compiled) == set(functions)
    for name, function in functions.items():
        expected = jax.jit(function)(x)
        np.testing.assert_allclose(compiled[name](x), expected, rtol=1e-9)


def test_the_error_of_a_program_that_cannot_be_compiled_is_raised():
    class Broken:
        def compile(self, options):
            raise RuntimeError("cannot be compiled")

    with pytest.raises(RuntimeError, match="cannot be compiled"):
        compiling.start({"broken": Broken()}, 1)["broken"].result()
