"""Pages in plain text: a `.qmd` with `{python}` cells is read as the notebook that it is, and written
again."""

import ast
import re
from pathlib import Path

import jupytext
import yaml
from fastcore.nbio import dict2nb

FENCE = re.compile(r"^```+ *\{python\b", re.M)
FORMAT = "Rmd" # the format of jupytext whose fences are Quarto's


def text_pages(folder: Path) -> list[Path]:
    "The `.qmd` pages below a folder that have cells"
    hidden = lambda path: any(part[0] in "._" for part in path.relative_to(folder).parts)
    found = (p for p in folder.rglob("*.qmd") if not hidden(p))
    return sorted(p for p in found if FENCE.search(p.read_text(encoding="utf-8")))


def name_of(source: str, index: int) -> str:
    "What a cell is called in the module: the first name that it defines, or its number"
    try: nodes = ast.parse(source).body
    except SyntaxError: nodes = [] # it has a magic command
    names = [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    imports = nodes and all(isinstance(n, ast.Import | ast.ImportFrom) for n in nodes)
    return names[0] if names else "imports" if imports else f"cell-{index}"


def read_page(path: Path):
    "The notebook in a text; its cells have lasting names, since others stand in the package"
    notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt=FORMAT)
    seen: dict[str, int] = {}
    for i, cell in enumerate(notebook.cells):
        name = name_of(cell.source, i) if cell.cell_type == "code" else f"text-{i}"
        seen[name] = seen.get(name, 0) + 1
        cell["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"
        if cell.cell_type == "code": cell["outputs"] = []
    return dict2nb({**notebook, "nbformat": 4, "nbformat_minor": 5})


def title_cell(front: str) -> str:
    "The title of a page as a notebook has it, from its front matter"
    matter = yaml.safe_load(front.strip().strip("-"))
    return f"# {matter['title']}\n\n> {matter.get('subtitle', '')}".rstrip(" >\n")


def write_page(cells: list[dict], path: Path):
    "The text of some cells"
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(f"```{{python}}\n{source}\n```" if cell["cell_type"] == "code" else source)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
