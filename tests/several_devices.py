"""Programs on several devices: how tests start them, and what they may say of themselves."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

HERE = Path(__file__).parent


def start(program, devices, *args):
    "A program of this folder in a process of its own, with as many devices."
    flags = os.environ.get("XLA_FLAGS", "")
    path = str(HERE.parent), os.environ.get("PYTHONPATH", "")
    more = {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": os.pathsep.join(path),
    }
    command = [sys.executable, str(HERE / program), *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=os.environ | more, **pipes)


def said(process):
    "What it printed last."
    out, err = process.communicate(timeout=550)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def said_by_two(program, *args):
    "What each of two processes with four devices printed last; their number and address come last."
    with socket.create_server(("127.0.0.1", 0)) as probe: port = probe.getsockname()[1]
    both = [start(program, 4, *args, i, f"127.0.0.1:{port}") for i in range(2)]
    try:
        return [said(process) for process in both]
    finally:
        for process in both: process.kill()


def exchanged(compiled):
    "What devices exchange in a program: the name of each exchange, and how many numbers it has."
    text = compiled.as_text()
    found = re.findall(r"= ([^=\n]*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    count = lambda s: int(np.prod([int(n) for n in s.split(",") if n], initial=1))
    sizes = lambda shape: [count(s) for s in re.findall(r"\w\d+\[([\d,]*)\]", shape)]
    return sorted((name, *sizes(shape)) for shape, name in found)


def once(path, make, alone):
    "What `make` gives, as arrays of NumPy: made and left in a file if alone, or read there."
    path = Path(path).with_suffix(".pickle")
    if alone: path.write_bytes(pickle.dumps(jax.tree.map(np.asarray, make())))
    return pickle.loads(path.read_bytes())
