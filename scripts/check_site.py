#!/usr/bin/env python3
"""Look at the rendered site for what a reader would stumble over. Exits 1 if there is anything; the
last line says how much."""

import argparse
import functools
import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html import unescape
from pathlib import Path
from posixpath import normpath
from urllib.parse import unquote

Problem = tuple[str, str, str]  # what kind, on which page, what exactly
MOST_BYTES = 1_000_000          # of a page with its own pictures
PHONE, DESKTOP = 390, 1400      # CSS pixels
WITHOUT_TEXT = re.compile(r"<(script|style|pre|code|math|head)\b.*?</\1>", re.S)


@dataclass
class Page:
    name: str # from the root of the site
    html: str
    home: str = "" # where the site will be; a link there is one to a page here

    @cached_property
    def main(self) -> str:
        "Without the bars around it"
        found = re.search(r"<main\b.*?</main>", self.html, re.S)
        return found[0] if found else self.html

    @cached_property
    def prose(self) -> str:
        "What is read as text: no code, no formula"
        return unescape(re.sub(r"<[^>]+>", " ", WITHOUT_TEXT.sub(" ", self.main)))

    @cached_property
    def ids(self) -> set[str]:
        return set(map(unescape, re.findall(r"<[^>]+?\sid=\"([^\"]+)\"", self.html)))

    @cached_property
    def targets(self) -> list[str]:
        "Where its links and pictures lead, as far as that is on the site"
        found = re.findall(r"\s(?:href|src)=\"([^\"]*)\"", self.html)
        up = "../" * self.name.count("/")
        if self.home: found = [up + t.removeprefix(self.home) if t.startswith(self.home) else t for t in found]
        return [unquote(unescape(t)) for t in found if not re.match(r"[a-z]+:|//|$", t)]

    @cached_property
    def headings(self) -> list[str]:
        found = re.findall(r"<h[1-6]\b[^>]*>(.*?)</h[1-6]>", self.main, re.S)
        return [" ".join(unescape(re.sub(r"<[^>]+>", "", h)).split()) for h in found]


def read_pages(site: Path) -> dict[str, Page]:
    found = (p for p in sorted(site.rglob("*.html")) if "site_libs" not in p.parts)
    home = re.search(r"<loc>(.*?)index\.html</loc>", (site / "sitemap.xml").read_text(encoding="utf-8"))
    home = home[1] if home else ""
    read = lambda p: Page(p.relative_to(site).as_posix(), p.read_text(encoding="utf-8"), home)
    pages = map(read, found)
    return {p.name: p for p in pages if 'http-equiv="refresh"' not in p.html}


# --- what can be seen without a browser -----------------------------------------------------------


def page_problems(page: Page, pages: dict[str, Page], site: Path) -> Iterator[Problem]:
    for found in re.findall(r".{0,30}\]\([\w.#/][^)]*\)", page.prose):
        yield "markup shown as text", page.name, found
    for leak in re.findall(r"__main__\.\w+|:NoneType=None", page.main):
        yield "leak of the notebook's process", page.name, leak
    for raw in re.findall(r"<span class=\"math[^\"]*\">(.*?)</span>", page.main, re.S):
        yield "formula left as TeX", page.name, raw[:60]
    for one, two in zip(page.headings, page.headings[1:], strict=False):
        if one == two: yield "heading twice in a row", page.name, one
    for picture in re.findall(r"<img\b[^>]*>", page.main):
        if not re.search(r"\salt=\"[^\"]+\"", picture):
            yield "picture without a text", page.name, picture[:80]
    for output in re.findall(r"<div class=\"cell-output[^>]*>\s*(?:<p>\s*</p>)?\s*</div>", page.main):
        yield "empty output", page.name, output[:60]
    own = [normpath(Path(page.name).parent / t) for t in page.targets if t.endswith((".png", ".svg"))]
    weight = len(page.html.encode()) + sum(
        (site / t).stat().st_size for t in set(own) if (site / t).is_file()
    )
    if weight >= MOST_BYTES: yield "page too heavy", page.name, f"{weight:,} bytes"
    if page.name == "404.html": return # whose addresses begin at the root of the host
    for target in dict.fromkeys(page.targets):
        path, _, anchor = target.partition("#")
        path = path.partition("?")[0]
        name = normpath(Path(page.name).parent / path) if path else page.name
        if not (site / name).exists(): yield "missing file", page.name, target
        elif anchor and name in pages and anchor not in pages[name].ids:
            yield "missing anchor", page.name, target


def index_problems(pages: dict[str, Page], site: Path) -> Iterator[Problem]:
    "The files that are for machines"
    listed = (site / "llms.txt").read_text(encoding="utf-8")
    texts = {p.relative_to(site).as_posix() for p in site.rglob("*.llms.md")} - {"404.llms.md"}
    for text in sorted(texts):
        if f"/{text})" not in listed: yield "not in llms.txt", text, ""
    if len(texts) < len(pages) - 1: yield "not in llms.txt", "", f"{len(texts)} of {len(pages)} pages"
    entries = json.loads((site / "search.json").read_text(encoding="utf-8"))
    for entry in entries:
        tex = re.search(r"\\(?:frac|sum|partial|beta|mathrm|text|langle|nabla)\b(?![^\n]*[\"'])", entry["text"])
        if tex: yield "TeX in the search index", entry["href"], entry["text"][tex.start() :][:40]
    found = {entry["href"] for entry in entries}
    for page in pages.values():
        for anchor in re.findall(r"<h[2-6] class=\"[^\"]*api-name[^>]*anchor-id=\"([^\"]+)\"", page.html):
            if f"{page.name}#{anchor}" not in found:
                yield "name not found by the search", page.name, anchor


def log_problems(log: str) -> Iterator[Problem]:
    for line in re.sub(r"\x1b\[[0-9;]*m", "", log).splitlines():
        # Jupyter's kernel has remarks of its own
        if re.search(r"\bWARN(ING)?\b", line) and "IPKernelApp" not in line:
            yield "Quarto warns", "", line.strip()[:200]


# --- and with one ---------------------------------------------------------------------------------

MEASURE = """(() => {
    const seen = (e) => e.offsetParent !== null;
    const wide = (e) => e.scrollWidth > e.clientWidth + 1;
    const blocks = [...document.querySelectorAll('main pre')].filter(seen);
    return {
        page: document.documentElement.scrollWidth,
        code: blocks.filter((e) => !e.closest('.cell-output') && wide(e)).length,
        outputs: blocks.filter((e) => e.closest('.cell-output') && wide(e)).length,
        blocks: blocks.length,
    };
})()"""


def serve(site: Path) -> http.server.ThreadingHTTPServer:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def width_problems(pages: dict[str, Page], site: Path, program: str | None) -> Iterator[Problem]:
    "No page scrolls sideways, and no code is cut, on a desk and on a phone"
    from playwright.sync_api import sync_playwright
    server = serve(site)
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for width in (DESKTOP, PHONE):
            window = browser.new_page(viewport={"width": width, "height": 900})
            for page in pages.values():
                window.goto(f"http://127.0.0.1:{server.server_port}/{page.name}")
                window.evaluate("document.querySelectorAll('details').forEach((e) => e.open = true)")
                found = window.evaluate(MEASURE)
                if found["page"] > width:
                    yield f"page wider than {width}", page.name, f"{found['page']} pixels"
                for kind in ("code", "outputs") if width == DESKTOP else ("code",):
                    if found[kind]:
                        yield f"{kind} cut at {width}", page.name, f"{found[kind]} blocks"
            window.close()
        browser.close()
    server.shutdown()


def problems(site: Path, log: str = "") -> Iterator[Problem]:
    pages = read_pages(site)
    for page in pages.values(): yield from page_problems(page, pages, site)
    yield from index_problems(pages, site)
    yield from log_problems(log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path, nargs="?", default=Path("_docs"))
    parser.add_argument("--log", type=Path, help="what Quarto printed")
    parser.add_argument("--browser", action="store_true", help="measure widths with playwright, too")
    parser.add_argument("--program", help="the browser to use; that of playwright if not given")
    options = parser.parse_args()
    found = list(problems(options.site, options.log.read_text() if options.log else ""))
    if options.browser:
        found += width_problems(read_pages(options.site), options.site, options.program)
    for kind, page, what in found: print(f"{kind}: {page}: {what}")
    kinds = sorted({kind for kind, _, _ in found})
    for kind in kinds:
        of_kind = [p for p in found if p[0] == kind]
        print(f"  {len(of_kind):5}  {kind}, on {len({p[1] for p in of_kind})} pages")
    print(f"{len(read_pages(options.site))} pages, {len(found)} problems")
    return bool(found)


if __name__ == "__main__": sys.exit(main())
