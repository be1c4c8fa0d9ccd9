#!/usr/bin/env python3
"""Quarto runs this in nbdev's copy of the pages, `_proc`, before it renders them (`pre-render` in
nbs/_quarto.yml). It mends what nbdev's own filters leave, and links words to the glossary."""

import json
import os
import re
import sys
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults
from text_pages import read_page, text_pages, write_page

UNSEEN = {"export", "exporti", "hide", "default_exp"}
MENDED = "<!-- mended -->"
TO_NAME = re.compile(r"\[(`[^`]+`)\]\((https?:[^)\s]+)\.html#([^)\s]+)\)")
DOCUMENTED = re.compile(r"(?:\{#|^(?:def|class) )([\w.-]+)(?: \.api-name\}|\b(?=[(:]))", re.M)
LINKED_TWICE = re.compile(r"\[([^\[\]]*)\[(`[^`]+`)\]\([^)\s]+\)((?:[^\[\]]|\[`[^`]+`\]\([^)\s]+\))*)\]\(")
SOURCE = '#| code-summary: "Exported source"'
CODE = re.compile(r"(^```.*?^```[ ]*$|\$\$.*?\$\$(?:[ ]*\{[^}]*\})?|^#.*?$|^>.*?$)", re.M | re.S)
SPANS = re.compile(r"(`+[^`]*`+|\$[^$\n]+\$|!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)|<[^>]+>|\{[^}]*\})")


def documented(project: Path) -> set[str]:
    "`page#anchor` of every name that a page documents, without the page's suffix"
    return {
        f"{path.relative_to(project).with_suffix('').as_posix()}#{anchor.lower()}"
        for path in (*project.rglob("*.ipynb"), *text_pages(project))
        for anchor in DOCUMENTED.findall(path.read_text(encoding="utf-8"))
    }


def unlink(text: str, known: set[str]) -> str:
    """A written link is the one that counts: nbdev links code spans inside of links, too. And it
    links names that no page documents"""
    shown = lambda m: m[0] if any(f"{m[2]}#{m[3]}".endswith(f"/{k}") for k in known) else m[1]
    text = TO_NAME.sub(shown, text)
    while True:
        mended = LINKED_TWICE.sub(r"[\1\2\3](", text)
        if mended == text: return text
        text = mended


def shown_name(cell: dict) -> str | None:
    "The name that a cell documents"
    found = re.search(r"^show_doc\(([\w.]+)\)", "".join(cell["source"]), re.M)
    return found[1] if found and cell["cell_type"] == "code" else None


def in_order(cells: list[dict]) -> list[dict]:
    """Documentation before the source that it is of, and several names in the order of that source;
    nbdev puts the source second, and the names the other way round"""
    out, i = [], 0
    while i < len(cells):
        j = i
        while j < len(cells) and (shown_name(cells[j]) or SOURCE in "".join(cells[j]["source"])):
            j += 1
            if SOURCE in "".join(cells[j - 1]["source"]) and not is_followed(cells, j): break
        run = cells[i:j] or cells[i : i + 1]
        source = [c for c in run if shown_name(c) is None]
        if len(source) == 1 and len(run) > 1:
            text = "".join(source[0]["source"])
            place = lambda cell, text=text: position(text, shown_name(cell))
            run = sorted((c for c in run if c is not source[0]), key=place) + source
        out += run
        i += len(run)
    return out


def is_followed(cells: list[dict], j: int) -> bool:
    "Whether the next cell documents a name of the source before it"
    name = shown_name(cells[j]) if j < len(cells) else None
    return name is not None and position("".join(cells[j - 1]["source"]), name) >= 0


def position(source: str, name: str) -> int:
    "Where a definition begins; −1 if it is not there"
    short = name.split(".")[-1]
    found = re.search(rf"^(?:def|class)\s+{short}\b|^    def\s+{short}\b", source, re.M)
    return found.start() if found else -1


# --- words ----------------------------------------------------------------------------------------


def glossary(page: Path) -> dict[str, tuple[str, str]]:
    "word → (anchor, definition in one line); a word's other forms stand in its `forms`"
    text, terms = page.read_text(encoding="utf-8"), {}
    entry = r"^## ([^{\n]+?) \{#([\w-]+)(?: forms=\"([^\"]*)\")?\}\n+(.+?)(?=\n\n|\Z)"
    for word, anchor, forms, meaning in re.findall(entry, text, re.M | re.S):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(meaning.split()))
        plain = re.sub(r"[$`\\\"{}]", "", plain.split(". ")[0].rstrip(".") + ".")
        for form in (word, *filter(None, (f.strip() for f in forms.split(",")))):
            terms[form.lower()] = anchor, plain
    return terms


def link_words(text: str, terms: dict, seen: set[str], to: str) -> str:
    "The first time that a page uses a word of the glossary, outside of code, formulas and links"
    if not terms: return text
    words = "|".join(sorted(map(re.escape, terms), key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w#@/*-])({words})(?![\w*-])", re.I)

    def link(found):
        anchor, meaning = terms[found[1].lower()]
        if anchor in seen: return found[0]
        seen.add(anchor)
        return f'[{found[1]}]({to}#{anchor}){{.term title="{meaning}"}}'

    blocks = CODE.split(text)
    for i in range(0, len(blocks), 2):
        spans = SPANS.split(blocks[i])
        spans[::2] = [pattern.sub(link, span) for span in spans[::2]]
        blocks[i] = "".join(spans)
    return "".join(blocks)


def badges(name: str) -> str:
    "Links that open a tutorial as a notebook"
    site = yaml.safe_load((Path.cwd().parent / "_quarto.yml").read_text(encoding="utf-8"))
    url, branch = site["website"]["repo-url"], site["website"]["repo-branch"]
    path = f"{url.split('://')[1].partition('/')[2]}/blob/{branch}/nbs/{name}"
    colab = f"https://colab.research.google.com/github/{path}"
    viewer = f"https://nbviewer.org/github/{path}"
    raw = f"{url}/raw/{branch}/nbs/{name}"
    links = f"[Colab]({colab}) [nbviewer]({viewer}) [the notebook, for Jupyter]({raw})"
    return f"::: {{.open-in}}\nOpen in {links}\n:::\n"


def mend(cells: list[dict], terms: dict, to: str, known: set[str]) -> list[dict]:
    "The cells of one processed page as they should be rendered"
    seen: set[str] = set()
    for i, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = unlink(source, known)
            if i: source = link_words(source, terms, seen, to) # the first cell is the title
            cell["source"] = source.splitlines(True)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                text = unlink("".join(data["text/markdown"]), known)
                data["text/markdown"] = text.splitlines(True)
    return in_order(cells)


def markdown_cell(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(True)}


# --- pages in plain text --------------------------------------------------------------------------


def runnable(cell) -> bool:
    """Whether a cell is shown; one that is not, Quarto runs without a word, since later ones need
    it"""
    if cell.cell_type != "code" or not UNSEEN & cell.directives.keys(): return True
    kept = [line for line in cell.source.splitlines() if not line.startswith("#|")]
    cell.source = "#| include: false\n" + "\n".join(kept or ["pass"])
    return False


def as_rendered(path: Path, root: Path) -> list[dict]:
    """The cells of a text page after nbdev's filters. A notebook has its outputs, and nbdev runs what
    documents a name; of a text Quarto runs all"""
    notebook = read_page(path)
    module = next(
        (c.directives["default_exp"] for c in notebook.cells if "default_exp" in c.directives), None
    )
    for cell in notebook.cells: runnable(cell)
    here = FilterDefaults()
    names = "FrontmatterProc insert_warning exec_show_docs rm_export".split()
    filters = [f for f in here.base_procs() if f.__name__ not in names]
    NBProcessor(nb=notebook, procs=filters, rm_directives="quarto").process()
    start = ["#| include: false", "import sys", f"sys.path.insert(0, {str(root)!r})"]
    start.append("from nbdev.showdoc import show_doc")
    if module: start.append(f"from {get_config(root).lib_name}.{module.strip()} import *")
    cells = [dict(cell_type=c.cell_type, source=c.source.splitlines(True)) for c in notebook.cells]
    cells.insert(1, {"cell_type": "code", "source": "\n".join(start).splitlines(True)})
    return cells


def main(project: Path) -> int:
    if project.name != "_proc": return 0 # never in the sources
    page = project / "explanations" / "glossary.qmd"
    terms = glossary(page) if page.exists() else {}
    known = documented(project)
    for path in (*project.rglob("*.ipynb"), *text_pages(project)):
        if path.name.startswith("."): continue
        text = path.read_text(encoding="utf-8")
        if MENDED in text: continue
        to = Path(os.path.relpath(page, path.parent)).as_posix()
        name, time = path.relative_to(project).as_posix(), path.stat().st_mtime_ns
        if path.suffix == ".ipynb": notebook = json.loads(text)
        else: notebook = {"cells": as_rendered(path, project.parent)}
        cells = mend(notebook["cells"], terms, to, known)
        cells.insert(1, markdown_cell(MENDED))
        if name.startswith("tutorials/"): cells.insert(2, markdown_cell(badges(name)))
        if path.suffix == ".qmd": write_page(cells, path)
        else: path.write_text(json.dumps(notebook | {"cells": cells}, ensure_ascii=False), "utf-8")
        os.utime(path, ns=(time, time)) # as old as nbdev made it, so that it is made anew when due
    return 0


if __name__ == "__main__": sys.exit(main(Path.cwd()))
