"""The campaign of `claims.py`: 10,080 networks, forty structures, every solver and dtype."""

import os

import jax
import pytest
from claims import campaign


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("seed", range(int(os.environ.get("NETWORKS", 40))))
def test_what_is_claimed_holds(seed):
    said = []
    totals, codes, rose = campaign([seed], show=said.append)
    print(codes)
    assert rose == 0 and not any(totals.values()), "\n".join(said)
