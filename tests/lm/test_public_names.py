"""The public names of `kronjax.lm`, and how results print."""

import re
import subprocess
import sys

import pytest

from kronjax import lm


@pytest.mark.parametrize("name", lm.__all__)
def test_a_public_name_resolves_and_is_documented(name):
    value = getattr(lm, name)
    assert value.__name__ == name and value.__doc__
    assert name in dir(lm)
    assert len(re.findall(rf"^    {name}: ", lm.__doc__, re.MULTILINE)) == 1


def test_an_unknown_name_raises_an_error():
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        lm.compres  # noqa: B018


def test_importing_the_package_loads_no_jax():
    code = "import sys, kronjax.lm; assert not {'flax', 'jax'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
