#!/usr/bin/env python3
"""Export all pages to hamux/: notebooks as `nbdev-export` does, and pages in plain text (`.qmd` with
`{python}` cells), which nbdev does not read."""

import os
import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import nbdev_export
from nbdev.export import ExportModuleProc
from nbdev.maker import ModuleMaker
from nbdev.process import NBProcessor
from text_pages import read_page, text_pages, title_cell

ROOT = Path(__file__).resolve().parent.parent


def export_page(path: Path, package: Path):
    "Write the module of one page in plain text"
    found, notebook = ExportModuleProc(), read_page(path)
    first = notebook.cells[0]
    if first.cell_type == "raw": # of the title nbdev makes the module's docstring
        first.cell_type, first.source = "markdown", title_cell(first.source)
    NBProcessor(nb=notebook, procs=[found]).process()
    cells, listed = found.modules["#"], found.in_all["#"]
    if not cells: return # a page that only tells
    if not hasattr(found, "default_exp"): raise ValueError(f"{path}: `#| default_exp` is missing.")
    maker = ModuleMaker(dest=package, name=found.default_exp, nb_path=path, is_new=True)
    maker.make(cells, listed, lib_path=package)


def export(root: Path = ROOT):
    "Every module, and after them the index of names, which nbdev makes of the modules"
    here = Path.cwd()
    os.chdir(root)
    try:
        config = get_config(root)
        for path in text_pages(config.nbs_path): export_page(path, config.lib_path)
        nbdev_export.__wrapped__()
    finally:
        os.chdir(here)


if __name__ == "__main__": sys.exit(export())
