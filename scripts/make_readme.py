#!/usr/bin/env python3
"""Make README.md from nbs/index.ipynb, without Quarto; with `--check`, fail if it has drifted."""

import base64
import posixpath
import re
import sys
import tomllib
from pathlib import Path

import nbformat
from generated import Files, main
from nbdev.config import nbpath2html

SOURCE = "nbs/index.ipynb"
HEADER = (
    f"<!-- Generated from {SOURCE} by scripts/make_readme.py: edit the notebook, then run the"
    " script. -->\n"
)
FENCED = re.compile(r"(^```.*?^```[ ]*$)", re.M | re.S)
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def target(url: str, docs: str) -> str:
    """Where a link of the notebook leads from the root of the repository: pages to the site, files
    to the tree"""
    if re.match(r"[a-z][a-z+.-]*:|#|/", url): return url
    path, _, anchor = url.partition("#")
    if path.endswith((".ipynb", ".qmd")):
        # nbdev drops the number of a notebook's name, and leaves a .qmd alone
        page = nbpath2html(path) if path.endswith(".ipynb") else Path(path).with_suffix(".html")
        path = posixpath.join(docs, page.as_posix())
    else:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(SOURCE), path))
    return f"{path}#{anchor}" if anchor else path


def plain(text: str, docs: str) -> str:
    "Drop what only Quarto understands (attributes, citations, shortcodes), and turn links round"
    text = re.sub(r"(?<=\S)[ ]*\{[#.][^}]*\}|(?<=\))\{[^}]*\}", "", text)
    text = re.sub(r"[ ]*\[[^\[\]]*(?<![\w.])@\w[^\]]*\](?!\()", "", text)
    text = re.sub(r"\{\{<.*?>\}\}", "", text)
    return re.sub(r"(?<=\]\()[^)\s]+", lambda found: target(found[0], docs), text)


def markdown(source: str, docs: str) -> str:
    "A markdown cell as GitHub reads it; fenced blocks and code spans stay as they are"
    parts = FENCED.split(source)
    for i in range(0, len(parts), 2):
        text = re.sub(r"^:{3,}.*\n?", "", parts[i], flags=re.M)
        parts[i] = "".join(
            s if s.startswith("`") else plain(s, docs) for s in re.split(r"(`+[^`]*`+)", text)
        )
    return "".join(parts).strip()


def directives(source: str) -> tuple[dict[str, str], str]:
    "A code cell's `#|` lines, and the rest of it"
    found = re.findall(r"^#\|[ ]*([\w-]+)[ ]*:?[ ]*(.*?)[ ]*$", source, re.M)
    return {k: v.strip("\"'") for k, v in found}, re.sub(
        r"^#\|.*\n?", "", source, flags=re.M
    ).strip()


def code(cell: nbformat.NotebookNode, docs: str, files: Files) -> list[str]:
    "A code cell and its saved outputs as markdown blocks; its images join `files`"
    options, source = directives(cell.source)
    no = lambda key: options.get(key, "").lower() == "false"
    if "hide" in options or no("include"): return []
    blocks = [f"```python\n{source}\n```"] if source and not no("echo") else []
    for i, output in enumerate([] if no("output") else cell.outputs):
        data = output.get("data", {})
        if output.output_type == "stream" and output.name == "stdout": text = output.text
        elif "image/png" in data:
            name = f"figures/index-{cell.id}-{i}.png"
            files[f"nbs/{name}"] = base64.b64decode(data["image/png"])
            blocks.append(f"![{options.get('fig-alt', '')}](nbs/{name})")
            continue
        elif "text/markdown" in data:
            blocks.append(markdown(data["text/markdown"], docs))
            continue
        else:
            text = data.get("text/plain", "")
        if text.strip(): blocks.append(f"```text\n{ANSI.sub('', text).rstrip()}\n```")
    return blocks


def build(root: Path) -> Files:
    source = root / SOURCE
    if not source.exists():
        raise SystemExit(f"{SOURCE} does not exist, and README.md is made from it")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    docs, files, blocks = project["urls"]["Documentation"], {}, []
    for cell in nbformat.read(source, as_version=4).cells:
        if cell.cell_type == "code":blocks += code(cell, docs, files)
        elif cell.cell_type == "markdown": blocks.append(markdown(cell.source, docs))
    return {
        "README.md": (
            "\n\n".join([HEADER.strip(), *filter(None, blocks), ""]).rstrip("\n").encode() + b"\n"
        )
    } | files


if __name__ == "__main__": sys.exit(main(build, __doc__))
