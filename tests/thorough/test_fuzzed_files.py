"""A hundred thousand files that atheris makes, guided by the code that they reach: each is read or
is a `FileProblem`, and takes no more memory than ten times its size."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = int(os.environ.get("FILES", 100_000))
SHARES = { # of a hundred thousand; to read the description of a network takes long
    "network": 4_000, "network like": 4_000, "training": 12_000, "rows.npy": 25_000,
    "rows.npz": 30_000, "rows.csv": 25_000,
}
HERE = Path(__file__).parent
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None or sys.platform != "linux",
    reason="the fuzzer needs Linux and atheris: pip install atheris",
)
@pytest.mark.parametrize("target", SHARES)
def test_fuzzed_files(target, tmp_path):
    wanted = SHARES[target] * FILES // 100_000
    command = [sys.executable, HERE / "fuzz.py", target, str(wanted), tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-6000:]
    said = json.loads(ran.stdout)
    assert said["read"] + said["refused"] == wanted
    places, kept = re.findall(r"cov: (\d+)", ran.stderr)[-1], len([*(tmp_path / "new").iterdir()])
    most = f"at most {said.pop('most') / 2**20:.2f} MiB"
    print(f"{target}: {said}, {most}, {places} places in the code, {kept} files reached more")
