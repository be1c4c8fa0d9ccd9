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
    # the page "What is promised" tells of these three
    allowed = {"stuck": 3} if seed == 24 else {}
    false = {k: n for k, n in totals.items() if n > allowed.get(k, 0)}
    assert rose == 0 and not false, "\n".join(said)
