"Campaigns that take long stand in tests/thorough; they are run when pytest is given --thorough."

from pathlib import Path

THOROUGH = Path(__file__).parent / "thorough"


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run tests/thorough, too: long")


def pytest_ignore_collect(collection_path, config):
    "Whether a path is left out: None leaves it to others."
    inside = collection_path == THOROUGH or THOROUGH in collection_path.parents
    return True if inside and not config.getoption("--thorough") else None
