#!/usr/bin/env python3
"""Quarto runs this in nbdev's copy of the pages, `_proc`, after it has rendered them (`post-render`
in nbs/_quarto.yml): spaces in formulas, a search that finds names, `llms.txt` with every page."""

import json
import os
import re
import sys
from html import unescape
from pathlib import Path

import yaml

FORMULA = re.compile(r"<math\b.*?</math>", re.S)
TEX = re.compile(r"<annotation encoding=\"application/x-tex\">(.*?)</annotation>", re.S)
SPACE = '<mspace width="0.1667em"></mspace>'
FUNCTION = r"<mrow><mi mathvariant=\"normal\">[A-Za-z]+</mi><mo>\u2061</mo></mrow>"
LIMIT = re.compile(
    r"<(munder|msub)>(?:<mrow>)?<mi mathvariant=\"normal\">[a-z]{3,}</mi>"
    r"(?:(?!<munder|<msub).)*?</\1>(?!\s*<mo[^>]*>[(|]|<mspace)",
    re.S,
)
ACCENT = r"<mo accent=\"true\">(?=[\u0300-\u036f])"
OPERAND = r"(?<=</mi>)|(?<=</mn>)|(?<=</msub>)|(?<=</msup>)|(?<=</mfrac>)|(?<=</msubsup>)"
DOCUMENTED = re.compile(
    r"<h[2-6] class=\"[^\"]*\bapi-name\b[^\"]*\" data-anchor-id=\"([^\"]+)\">(.*?)</h[2-6]>"
    r"(?:(?!<h[2-6]\b).)*?<span class=\"api-line\">(.*?)</span>",
    re.S,
)


def words(html: str) -> str: return " ".join(unescape(re.sub(r"<[^>]+>", "", html)).split())


# --- formulas -------------------------------------------------------------------------------------


def spaced(formula: str) -> str:
    "A formula with TeX's thin space on both sides of a named function, and without its TeX"
    formula = TEX.sub("", formula)
    formula = LIMIT.sub(lambda found: found[0].replace("<mo>\u2061</mo>", "") + SPACE, formula)
    bare = rf"({FUNCTION})(?!\s*<mo[^>]*>[(\[|⟨‖,=)\]⟩∑])(?!\s*</|\s*<munder(?:over)?><mo>)"
    formula = re.sub(bare, rf"\1{SPACE}", formula)
    # bars of a norm are no operators, and a hat is as wide as its letter
    formula = formula.replace(">∥</mo>", ' lspace="0" rspace="0">∥</mo>')
    formula = re.sub(ACCENT, '<mo accent="true" stretchy="false">', formula)
    return re.sub(rf"(?:{OPERAND})(?={FUNCTION})", SPACE, formula)


def without_tex(text: str, formula: str) -> str:
    "A text of the search index, in which a formula's TeX follows what a reader sees of it"
    seen = unescape(re.sub(r"<[^>]+>", "", TEX.sub("", formula)))
    for raw in TEX.findall(formula):
        for tex in dict.fromkeys((unescape(raw), raw)):
            text = text.replace(seen + tex, seen)
            if "\\" in tex: text = text.replace(tex, "")
    return text


# --- search ---------------------------------------------------------------------------------------


def names_of(html: str, page: str, title: str, crumbs: list[str]) -> list[dict]:
    "An entry of the search index for each name that a page documents"
    entries = []
    for anchor, name, line in DOCUMENTED.findall(html):
        href, name = f"{page}#{anchor}", words(name)
        here = {"objectID": f"{href}-name", "href": href, "title": name, "section": ""}
        entries.append(here | {"text": f"{name}: {words(line)}", "crumbs": [*crumbs, title]})
    return entries


def search_index(entries: list[dict], pages: dict[str, str]) -> list[dict]:
    "Without TeX, and with every name"
    entries = [e for e in entries if not e["objectID"].endswith("-name")]
    # the longest first, or a part of one would be taken out of it
    formulas = {p: sorted(FORMULA.findall(html), key=len)[::-1] for p, html in pages.items()}
    firsts = {}
    for entry in entries:
        page = entry["href"].partition("#")[0]
        firsts.setdefault(page, entry)
        for formula in formulas.get(page, ()):
            for key in ("text", "section", "title"):
                entry[key] = without_tex(entry.get(key, ""), formula)
    for page, html in pages.items():
        if page not in firsts: continue
        first = firsts[page]
        entries += names_of(html, page, first["title"], first.get("crumbs", []))
    return entries


# --- llms.txt -------------------------------------------------------------------------------------


def in_reading_order(node, section: str = "Start") -> list[tuple[str, str]]:
    "(section, page) of the sidebar; a section within another is named after both"
    if isinstance(node, str): return [(section, node)]
    if isinstance(node, list): return [p for item in node for p in in_reading_order(item, section)]
    inner = node.get("section")
    name = section if inner is None else inner if section == "Start" else f"{section}: {inner}"
    pages = [(name, node["href"])] if "href" in node else []
    return pages + in_reading_order(node.get("contents", []), name)


def llms_txt(site: dict, output: Path) -> str:
    "Every page with a line of what it is about"
    website = site["website"]
    lines, last = [f"# {website['title']}", "", f"> {website['description']}"], None
    for section, page in in_reading_order(website["sidebar"]["contents"]):
        path = Path(page).with_suffix(".llms.md")
        if not (output / path).exists(): continue
        if section != last: lines += ["", f"## {section}", ""]
        last = section
        text = (output / path).read_text(encoding="utf-8")
        found = re.match(r"#\s+(.+?)\n+(?:([^#\n`][^\n]*))?", text)
        title, about = found.groups() if found else (path.stem, None)
        line = f"- [{title}]({website['site-url']}{path.as_posix()})"
        lines.append(line + (f": {about}" if about else ""))
    return "\n".join(lines) + "\n"


def main(project: Path, output: Path) -> int:
    if not output.is_dir(): return 0
    index = output / "search.json"
    if index.exists():
        entries = json.loads(index.read_text(encoding="utf-8"))
        named = {entry["href"].partition("#")[0] for entry in entries}
        pages = {
            page: (output / page).read_text(encoding="utf-8")
            for page in sorted(named)
            if (output / page).exists()
        }
        index.write_text(json.dumps(search_index(entries, pages), ensure_ascii=False), "utf-8")
    for page in output.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        mended = FORMULA.sub(lambda found: spaced(found[0]), html)
        if mended != html: page.write_text(mended, encoding="utf-8")
    site = yaml.safe_load((project.parent / "_quarto.yml").read_text(encoding="utf-8"))
    if site["website"].get("llms-txt"):
        (output / "llms.txt").write_text(llms_txt(site, output), encoding="utf-8")
    return 0


if __name__ == "__main__":
    here = Path.cwd()
    sys.exit(main(here, here / os.environ.get("QUARTO_PROJECT_OUTPUT_DIR", "_docs")))
