"""What takes long, tests/thorough and tests marked `thorough`, is run when pytest is given
--thorough. A test with cases that is marked `slow(but=n)` is slow but for its first n."""

import time
from collections import Counter
from pathlib import Path

import jax
import pytest
import quick  # of scripts

quick.settle()

THOROUGH = Path(__file__).parent / "thorough"


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run what takes long, too")


def pytest_ignore_collect(collection_path, config):
    "Whether a path is left out: None leaves it to others."
    inside = collection_path == THOROUGH or THOROUGH in collection_path.parents
    return True if inside and not config.getoption("--thorough") else None


@pytest.hookimpl(tryfirst=True) # before -m looks at the marks
def pytest_collection_modifyitems(config, items):
    seen = Counter()
    for item in items:
        mark = item.get_closest_marker("slow")
        if not mark: continue
        test = item.nodeid.partition("[")[0]
        seen[test] += 1
        if seen[test] <= mark.kwargs.get("but", 0): item.own_markers.remove(mark)
    # what takes a minute begins first, or the last worker to finish would be alone with it
    items.sort(key=lambda item: not any(m.kwargs.get("minute") for m in item.iter_markers("slow")))
    if config.getoption("--thorough"): return
    long = [item for item in items if item.get_closest_marker("thorough")]
    items[:] = [item for item in items if item not in long]
    config.hook.pytest_deselected(items=long)


looked = time.monotonic()


@pytest.fixture(autouse=True)
def forget_programs():
    """A process may hold some 65,000 pieces of memory (Linux, vm.max_map_count), a compiled program
    takes ten and more of them, and a compiler that gets none ends the process. Counting them takes
    longer than most tests, and a second is too short to fill what is left."""
    global looked
    yield
    if time.monotonic() - looked < 1: return
    maps, looked = Path("/proc/self/maps"), time.monotonic()
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000: jax.clear_caches()
