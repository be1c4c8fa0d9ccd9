#!/usr/bin/env python3
"""Make the index of all public names, nbs/api/names.qmd, from the package; with `--check`, fail if it
has drifted."""

import functools
import sys
from importlib import import_module
from pathlib import Path, PurePosixPath

from fastcore.docments import docstring
from generated import Files, main

import hamux
from hamux._reference import INDEX, MODULES, anchor, escaped, plain

PAGE = "nbs/api/names.qmd"
HEADER = """---
title: All names
subtitle: Every public function and class, with a line of what it is and a link to where it is explained.
---

<!-- Generated from the package by scripts/make_names.py: edit the docstring, then run the script. -->
"""
FACE = """
## `import hamux as hmx`

These stand in the face of the package: `hmx.descend`, say.
"""
WINGS = """
## In the wings

The parts that these are made of. Each is imported from its wing: `from hamux.dynamics import read_start`.
"""


def line_of(name: str) -> str:
    "The first line of what a name says of itself"
    thing = functools.reduce(getattr, name.split("."), import_module(MODULES[name]))
    return escaped(" ".join((docstring(plain(thing)) or "").split("\n\n")[0].split()))


def row(name: str, root: Path) -> str:
    page = INDEX["syms"][MODULES[name]][f"{MODULES[name]}.{name}"][0].partition("#")[0]
    source = PurePosixPath(page)
    suffix = next(s for s in (".ipynb", ".qmd") if (root / "nbs" / source.with_suffix(s)).exists())
    link = source.with_suffix(suffix).relative_to("api")
    where = link.parent.as_posix() if link.parent.name else link.stem
    return f"| [`{name}`]({link}#{anchor(name)}) | {line_of(name)} | {where} |"


def table(names: list[str], root: Path) -> str:
    head = f"| name | what it is | wing |\n|{'-' * 30}|{'-' * 58}|{'-' * 12}|\n"
    rows = "\n".join(row(name, root) for name in names)
    return f"\n::: {{.api-table .names}}\n\n{head}{rows}\n\n:::\n"


def build(root: Path) -> Files:
    public = [n for n, module in MODULES.items() if n in import_module(module).__all__]
    public.sort(key=lambda name: (name.lower(), name))
    face = [n for n in public if n in hamux.__all__]
    wings = [n for n in public if n not in hamux.__all__]
    text = HEADER + FACE + table(face, root) + WINGS + table(wings, root)
    return {PAGE: text.encode()}


if __name__ == "__main__": sys.exit(main(build, __doc__))
