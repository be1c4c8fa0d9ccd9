#!/usr/bin/env python3
"""Make hamux/__init__.pyi, in which editors and type checkers find the names of the face, from the
wings that `hamux/__init__.py` lists; with `--check`, fail if it has drifted."""

import sys
from pathlib import Path

from generated import Files, main

import hamux

STUB = "hamux/__init__.pyi"
HEADER = "# Generated from the names in __init__.py by scripts/make_stub.py: run it, do not edit.\n"


def build(root: Path) -> Files:
    lines = [f"from . import {wing} as {wing}" for wing in sorted([*hamux._WINGS, "numerics"])]
    for wing, names in hamux._WINGS.items():
        lines += [f"from .{wing} import ("]
        lines += [f"    {name} as {name}," for name in names.split()]
        lines += [")"]
    return {STUB: "\n".join([HEADER, *lines, "", "__version__: str", ""]).encode()}


if __name__ == "__main__": sys.exit(main(build, __doc__))
