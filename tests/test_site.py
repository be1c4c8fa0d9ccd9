"""The site, checked without Quarto: what its configuration names, and its pages say, is there.

Each check is a function that returns a list of problems; a broken sample shows that it finds some.
"""

import ast
import base64
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from posixpath import normpath

import nbformat
import pytest
import yaml
from nbdev.doclinks import patch_name
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from text_pages import FENCE, read_page

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
MAX_CELLS, MAX_IMAGE_BYTES = 50, 150_000
CROSSREF = re.compile(r"(fig|tbl|sec|eq|lst|thm|lem|cor|prp|cnj|def|exm|exr)-")


# --- reading pages --------------------------------------------------------------------------------


def prose(text: str) -> str:
    "Markdown without what is not read as text: code, mathematics, comments, addresses"
    for pattern in (
        r"^(```+|~~~+).*?^\1",
        r"<!--.*?-->",
        r"(`+).+?\1",
        r"\$\$.+?\$\$",
        r"\$[^$\n]+\$",
        r"<[^>\s]+[@:][^>]*>",
    ):
        text = re.sub(pattern, " ", text, flags=re.M | re.S)
    return text


def options(cell) -> dict[str, str]:
    "The `#|` lines of a code cell"
    if cell.cell_type != "code": return {}
    return dict(re.findall(r"^#\|[ ]*([\w-]+)[ ]*:?[ ]*(.*?)[ ]*$", cell.source, re.M))


def slug(heading: str) -> str:
    "The identifier that pandoc gives a heading"
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"\{[^}]*\}\s*$", "", heading))
    heading = re.sub(r"[^\w\s.-]", "", heading).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", heading))


@dataclass
class Page:
    name: str  # from nbs/
    cells: list

    @classmethod
    def read(cls, path: Path, root: Path = NBS):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".ipynb": return cls(name, nbformat.read(path, as_version=4).cells)
        text = path.read_text(encoding="utf-8")
        if FENCE.search(text): return cls(name, nbformat.from_dict(read_page(path)).cells)
        return cls(name, [new_markdown_cell(text)])

    @cached_property
    def markdown(self) -> str:
        return "\n\n".join(c.source for c in self.cells if c.cell_type == "markdown")

    @cached_property
    def prose(self) -> str:
        return prose(self.markdown)

    @cached_property
    def code(self) -> list:
        return [c for c in self.cells if c.cell_type == "code"]

    @cached_property
    def labels(self) -> set[str]:
        "What can be referred to: `{#id}`, and the label of a cell"
        without_code = re.sub(r"^(```+|~~~+).*?^\1", "", self.markdown, flags=re.M | re.S)
        return set(re.findall(r"\{#([\w:.-]+)", without_code)) | {
            o["label"] for c in self.code if "label" in (o := options(c))
        }

    @cached_property
    def anchors(self) -> set[str]:
        "What can be linked to: labels, headings, and the names that nbdev documents with a heading"
        without_code = re.sub(r"^(```+|~~~+).*?^\1", "", self.markdown, flags=re.M | re.S)
        headings = re.findall(r"^#{1,6}\s+(.+?)\s*$", without_code, re.M)
        names = set()
        for cell in self.code:
            if not {"export", "exports"} & options(cell).keys(): continue
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found = patch_name(node)
                    names |= {n.lower() for n in ([found] if isinstance(found, str) else found)}
                    # where a function has the name of a class
                    if isinstance(node, ast.ClassDef): names.add(f"{node.name.lower()}-class")
        return self.labels | {slug(h) for h in headings} | names

    @cached_property
    def citations(self) -> set[str]:
        "Keys of `@key`, cross-references included"
        found = re.findall(r"(?<![\w@/.\\])@\{?([A-Za-z0-9][\w:.#$%&+?<>~/-]*)", self.prose)
        return {key.rstrip(".:;,?!-") for key in found}

    @cached_property
    def links(self) -> list[tuple[bool, str, str]]:
        "(is it an image, text, target) of every link outside code"
        text = re.sub(r"^(```+|~~~+).*?^\1|<!--.*?-->", "", self.markdown, flags=re.M | re.S)
        # a code span may be a link's text
        text = re.sub(r"(`+).+?\1", lambda m: "c" * len(m[0]), text, flags=re.S)
        text = re.sub(r"!\[\]\(([^)\s]+)\)\{fig-alt=\"([^\"]+)\"\}", r"![\2](\1)", text)
        # a picture may be a link's text
        pictures = r"\[(!\[[^\]]*\]\([^)\s]+\))\]\(([^)\s]+)\)"
        text = re.sub(pictures, r"\1 [picture](\2)", text)
        link = r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)[^)]*\)(?:\{[^}]*\})?"
        return [(bool(image), label, url) for image, label, url in re.findall(link, text)]


def page_paths(nbs: Path = NBS) -> list[Path]:
    "Every page under nbs/: what nbdev and Quarto would render"
    found = (p for suffix in ("ipynb", "qmd") for p in nbs.rglob(f"*.{suffix}"))
    found = (p for p in found if p.name != "404.qmd") # which no other page leads to
    return sorted(p for p in found if not any(part[0] in "_." for part in p.relative_to(nbs).parts))


# --- the checks -----------------------------------------------------------------------------------


def hrefs(node) -> list[str]:
    "The pages that a navbar or a sidebar names, in reading order"
    if isinstance(node, str): return [node] if re.search(r"\.(ipynb|qmd)$", node) else []
    if isinstance(node, list): return [h for item in node for h in hrefs(item)]
    keys = ("href", "file", "left", "right", "tools", "menu", "contents")
    return [h for key in keys for h in hrefs(node.get(key))] if isinstance(node, dict) else []


def check_navigation(site: dict, pages: set[str]) -> list[str]:
    sidebar, navbar = hrefs(site["website"]["sidebar"]), hrefs(site["website"]["navbar"])
    problems = [
        f"{h} is named in _quarto.yml and does not exist"
        for h in dict.fromkeys(sidebar + navbar)
        if h not in pages
    ]
    problems += [
        f"{p} is a page that the sidebar does not name" for p in sorted(pages) if p not in sidebar
    ]
    return problems + [
        f"{h} is twice in the sidebar" for h in sorted({h for h in sidebar if sidebar.count(h) > 1})
    ]


def check_reading_order(site: dict) -> list[str]:
    "Numbered pages stand in the order of their numbers"
    problems, last = [], {}
    for name in map(PurePosixPath, hrefs(site["website"]["sidebar"])):
        if not name.name[0].isdigit(): continue
        if name.name < last.get(name.parent, ""):
            problems.append(f"{name} comes after {last[name.parent]}")
        last[name.parent] = name.name
    return problems


def wings(node) -> list[tuple[str, set[str]]]:
    "(title, folders of its pages) of each section that lies in another section, in reading order"
    sections = [s for s in node if isinstance(s, dict)]
    inner = [s for section in sections for s in section["contents"] if isinstance(s, dict)]
    return [(s["section"], {str(PurePosixPath(h).parent) for h in hrefs(s)}) for s in inner]


def check_wings(site: dict, order: list[str]) -> list[str]:
    "The Library has a section for each folder of nbs/api, in the order of the package's face"
    found = wings(site["website"]["sidebar"]["contents"])
    mixed = [f"{title} mixes {sorted(folders)}" for title, folders in found if len(folders) != 1]
    names = [folder.removeprefix("api/") for _, folders in found for folder in folders]
    names = [name for name in names if name != "api"]  # the pages that belong to no wing
    if mixed or names == order: return mixed
    how = "in the order " if sorted(names) == sorted(order) else ""
    return [f"sections {how}{names}, wings {order}"]


def check_files(site: dict, nbs: Path) -> list[str]:
    "Style sheets, bibliography and images that the configuration names"
    html, website = site["format"]["html"], site["website"]
    themes = html.get("theme", {})
    named = [
        site.get("bibliography"),
        site.get("csl"),
        html.get("css"),
        website.get("favicon"),
        website.get("image"),
        website["navbar"].get("logo"),
        website["sidebar"].get("logo"),
        *(themes.values() if isinstance(themes, dict) else [themes]),
    ]
    flat = [n for item in named if item for n in (item if isinstance(item, list) else [item])]
    return [
        f"{n} is named in _quarto.yml and does not exist"
        for n in flat
        if "." in n and not (nbs / n).is_file()
    ]


def check_metadata(site: dict, pyproject: dict) -> list[str]:
    website, project = site["website"], pyproject["project"]
    wanted = {
        "title": pyproject["tool"]["nbdev"]["title"],
        "description": project["description"],
        "repo-url": project["urls"]["Repository"],
        "site-url": project["urls"]["Documentation"],
        "repo-branch": pyproject["tool"]["nbdev"].get("branch", "main"),
    }
    return [
        f"website.{k} is {website.get(k)!r}; pyproject.toml says {v!r}"
        for k, v in wanted.items()
        if website.get(k) != v
    ]


def bibliography(text: str) -> list[str]:
    return re.findall(r"^@(?!comment|string|preamble)\w+\{\s*([^,\s]+)\s*,", text, re.M | re.I)


PRINTED = {"habbema1974"} # a volume that nobody has put on the net


def check_bibliography(text: str) -> list[str]:
    keys = bibliography(text)
    problems = [f"{k} is defined twice" for k in sorted({k for k in keys if keys.count(k) > 1})]
    for entry in re.split(r"^(?=@)", text, flags=re.M)[1:]:
        key = entry.split("{")[1].split(",")[0].strip()
        if entry.count("{") != entry.count("}"): problems.append(f"{key}: braces do not balance")
        problems += [
            f"{key} has no {field}"
            for field in ("author", "title", "year")
            if not re.search(rf"^\s*{field}\s*=", entry, re.M)
        ]
        found = re.search(r"^\s*(doi|url)\s*=", entry, re.M)
        if not found and key not in PRINTED: problems.append(f"{key} has no address")
    return problems


def check_citations(page: Page, keys: set[str]) -> list[str]:
    return [
        f"@{k} is not in references.bib"
        for k in sorted(page.citations)
        if not CROSSREF.match(k) and k not in keys
    ]


def check_crossrefs(page: Page) -> list[str]:
    "In a website, Quarto resolves a cross-reference within its own page only"
    return [
        f"@{k} has no label on this page"
        for k in sorted(page.citations)
        if CROSSREF.match(k) and k not in page.labels
    ]


def check_links(page: Page, pages: dict[str, Page], nbs: Path) -> list[str]:
    problems = []
    for _, text, url in page.links:
        if re.match(r"[a-z][a-z+.-]*:", url): continue
        path, _, anchor = url.partition("#")
        name = normpath(PurePosixPath(page.name).parent / path) if path else page.name
        if name.startswith(("..", "/")):
            problems.append(f"[{text}]({url}) leads out of nbs/, which is all that the site has")
        elif not (nbs / name).is_file():
            problems.append(f"[{text}]({url}): nbs/{name} does not exist")
        elif anchor and name in pages and anchor not in pages[name].anchors:
            problems.append(f"[{text}]({url}): {name} has no #{anchor}")
    return problems


def pictures(cell) -> list[bytes]:
    "The images saved in a cell's outputs"
    found = []
    for output in cell.get("outputs", []):
        for kind, data in output.get("data", {}).items():
            if kind.startswith("image/"):
                found.append(data.encode() if "svg" in kind else base64.b64decode(data))
    return found


def check_figures(page: Page, nbs: Path) -> list[str]:
    problems = []
    for image, text, url in page.links:
        if not image: continue
        if not text.strip(): problems.append(f"![]({url}) has no alt text")
        path = nbs / PurePosixPath(page.name).parent / url
        if path.is_file() and path.stat().st_size >= MAX_IMAGE_BYTES:
            problems.append(f"{url} weighs {path.stat().st_size} bytes")
    for i, cell in enumerate(page.cells):
        large = [len(p) for p in pictures(cell) if len(p) >= MAX_IMAGE_BYTES]
        problems += [
            f"cell {i} has an image of {n} bytes; {MAX_IMAGE_BYTES} is the limit" for n in large
        ]
        hidden = "hide" in options(cell) or options(cell).get("output") == "false"
        if pictures(cell) and not hidden and not options(cell).get("fig-alt", "").strip("\"' "):
            problems.append(f"cell {i} shows a figure and has no `#| fig-alt:`")
    return problems


def check_outputs(page: Page) -> list[str]:
    problems = [
        f"cell {i} has a saved error: {o.ename}"
        for i, c in enumerate(page.cells)
        for o in c.get("outputs", [])
        if o.output_type == "error"
    ]
    if page.name.endswith(".qmd"): return problems # Quarto runs its cells
    if page.code and not any(c.outputs for c in page.code):
        problems.append("no cell has a saved output; run nbdev-test --save")
    return problems


def check_style(page: Page) -> list[str]:
    first, problems = page.cells[0].source.strip() if page.cells else "", []
    if page.name.endswith(".qmd"):
        titled = re.match(r"---\n(?:.*\n)*?title:\s*\S.*\n(?:.*\n)*?---\n", first + "\n")
        return [] if titled else ["it does not begin with a title in YAML"]
    if not re.fullmatch(r"# [^\n]+\n+(?:>[^\n]*(?:\n|$))+", first):
        problems.append(
            "the first cell is not `# title` and `> subtitle` alone; nbdev drops the rest of it"
            " from the site"
        )
    if len(page.cells) >= MAX_CELLS:
        problems.append(f"it has {len(page.cells)} cells; {MAX_CELLS - 1} is the most")
    for i, cell in enumerate(page.cells):
        if cell.cell_type != "code" or "hide" in options(cell): continue
        source = re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M)
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body}
        if len(kinds) == 2:
            problems.append(
                f"cell {i} mixes imports and other code; nbdev runs it alone when the site is made"
            )
    return problems


UNSEEN = {"export", "exporti", "hide", "default_exp"}


def defined(cell) -> set[str]:
    "The names that a cell defines at its top"
    names = set()
    for node in ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef): names.add(node.name)
        if isinstance(node, ast.Assign):
            stored = (n for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
            names |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
    return names - {"_", "_all_"}


def check_shown(page: Page) -> list[str]:
    "A page shows what it defines for others, and the definitions of what its examples use"
    problems, unseen = [], set()
    for i, cell in enumerate(page.cells):
        if cell.cell_type != "code": continue
        if "export" in options(cell):
            public = sorted(name for name in defined(cell) if not name.startswith("_"))
            if public: problems.append(f"cell {i} must be `#| exports`: it defines {public}")
        if {"export", "exporti"} & options(cell).keys(): unseen |= defined(cell)
        if UNSEEN & options(cell).keys() or "exports" in options(cell): continue
        source = re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M)
        names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
        hidden = sorted(names & unseen)
        if hidden: problems.append(f"cell {i} uses {hidden}, whose definition is not shown")
    return problems


def check_opening(page: Page) -> list[str]:
    "After the title a page opens with words"
    for cell in page.cells[1:]:
        if cell.cell_type == "markdown": return []
        if not UNSEEN & options(cell).keys(): return ["it opens with code"]
    return []


def check_headings(page: Page) -> list[str]:
    "A heading is not a name that the page documents, which has a heading of its own"
    text = re.sub(r"^(```+|~~~+).*?^\1", "", page.markdown, flags=re.M | re.S)
    headings = {h.strip("` ") for h in re.findall(r"^#{2,6}\s+(.+?)\s*$", text, re.M)}
    names = set()
    for cell in page.code:
        if "exports" in options(cell): names |= defined(cell)
    return [f"the heading {h!r} is a name that has one" for h in sorted(headings & names)]


def check_repeats(page: Page) -> list[str]:
    text = re.sub(r"^(```+|~~~+).*?^\1", "", page.markdown, flags=re.M | re.S)
    headings = re.findall(r"^(#{2,6}\s+.+?)\s*$", text, re.M)
    pairs = zip(headings, headings[1:], strict=False)
    return [f"the heading {one!r} stands twice" for one, two in pairs if one == two]


MATHS = r"\\(?:begin\{(?:psmallmatrix|smallmatrix)\})" # which Quarto leaves as TeX


def check_maths(page: Page) -> list[str]:
    return [f"{found} is not a formula to Quarto" for found in re.findall(MATHS, page.markdown)]


def process(project: Path) -> subprocess.CompletedProcess:
    "nbdev.serve.proc_nbs, as for the site; in a process of its own since it leaves a shell behind"
    command = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=2, force=True)"
    return subprocess.run(
        [sys.executable, "-c", command], cwd=project, capture_output=True, text=True, timeout=300
    )


def check_processed(project: Path, run: subprocess.CompletedProcess) -> list[str]:
    problems = [] if run.returncode == 0 else [run.stderr[-3000:]]
    if "Found cells containing imports and other code" in run.stderr:
        problems.append(run.stderr[-3000:])
    for path in page_paths(project / "nbs"):
        name = path.relative_to(project / "nbs")
        made = project / "_proc" / name
        if not made.exists(): problems.append(f"{name} was not processed")
        elif made.suffix == ".ipynb" and "output-file" not in made.read_text(encoding="utf-8"):
            problems.append(f"{name} has lost its front matter")
    return problems


# --- the site passes them -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> dict:
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {p.name: p for p in map(Page.read, page_paths())}


@pytest.fixture(params=[p.relative_to(NBS).as_posix() for p in page_paths()] or ["index.ipynb"])
def page(request) -> Page:
    return Page.read(NBS / request.param)


def test_stub(site):
    "Quarto reads the stub first; the options come from the root, for nbs/ and nbdev's copy of it"
    stub = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    assert stub["project"]["type"] == "website" and stub["metadata-files"] == ["../_quarto.yml"]
    assert (NBS / stub["metadata-files"][0]).resolve() == ROOT / "_quarto.yml"
    nbdev = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]
    assert stub["project"]["output-dir"] == nbdev.get("doc_path", "_docs")
    # where both define something Quarto takes the included one, so the stub would mislead
    assert not (stub.keys() & site.keys())


def test_options(site):
    html = site["format"]["html"]
    assert html["html-math-method"] == "mathml"
    assert html["theme"].keys() == {"light", "dark"}
    assert site["website"]["llms-txt"] is True and site["website"]["search"]
    assert set(site["website"]["repo-actions"]) >= {"source", "issue"}
    assert site["website"]["repo-subdir"] == NBS.name


def test_navigation(site):
    assert check_navigation(site, {p.relative_to(NBS).as_posix() for p in page_paths()}) == []


def test_reading_order(site): assert check_reading_order(site) == []


def test_wings(site):
    "In the order of CONTRIBUTING's table; the workshops come last"
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| wing |")[1]
    names = re.findall(r"^\| `(\w+)` \|", table.split("\n\n")[0], re.M)
    faces = {p.parent.name for p in (ROOT / "hamux").glob("*/__init__.py")}
    folders = faces - {"sklearn"} # names of the memories, where users of scikit-learn look
    assert len(names) == len(folders) == len(folders & set(names))
    assert check_wings(site, names) == []


def test_files(site): assert check_files(site, NBS) == []


def test_metadata(site):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert check_metadata(site, pyproject) == []


def test_bibliography():
    text = (NBS / "references.bib").read_text(encoding="utf-8")
    assert len(bibliography(text)) > 10 and check_bibliography(text) == []


def test_citations(page):
    keys = bibliography((NBS / "references.bib").read_text(encoding="utf-8"))
    assert check_citations(page, set(keys)) == []


def test_crossrefs(page): assert check_crossrefs(page) == []


def test_links(page, pages): assert check_links(page, pages, NBS) == []


def test_figures(page): assert check_figures(page, NBS) == []


def test_outputs(page): assert check_outputs(page) == []


def test_style(page): assert check_style(page) == []


# these are written elsewhere at the moment
LATER = ()


def test_shown(page):
    if not page.name.startswith(LATER): assert check_shown(page) == []


def test_opening(page):
    if not page.name.startswith(LATER): assert check_opening(page) == []


def test_headings(page): assert check_headings(page) + check_repeats(page) == []


def test_maths(page): assert check_maths(page) == []


def test_gallery(pages):
    "Every tutorial has a card, with its picture, what is seen, its level and its minutes"
    text = pages["tutorials/index.qmd"].markdown
    cards = re.findall(r"^::: \{\.card\}\n(.*?)^:::$", text, re.M | re.S)
    names = sorted(p.removeprefix("tutorials/") for p in pages if re.match(r"tutorials/\d", p))
    assert [re.search(r"### \[[^\]]+\]\(([^)]+)\)", card)[1] for card in cards] == names
    for name, card in zip(names, cards, strict=True):
        assert f"thumbnails/{name.removesuffix('.ipynb')}.png" in card and "You will have" in card
        assert re.search(r"^\[(first steps|further|research) · [\d½ –]+ min", card, re.M), card


@pytest.mark.slow(minute=True)
def test_proc_nbs(tmp_path):
    for name in ("nbs", "hamux"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".*", "__pycache__")
        )
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "_quarto.yml"): shutil.copy(ROOT / name, tmp_path)
    assert check_processed(tmp_path, process(tmp_path)) == []
    # what the stub names is found from the copy as well
    assert (tmp_path / "_proc" / "../_quarto.yml").resolve() == (tmp_path / "_quarto.yml").resolve()
    made = {p.name for p in (tmp_path / "_proc").iterdir()}
    assert {"_quarto.yml", "references.bib", "styles.css"} <= made


# --- and a broken sample does not -----------------------------------------------------------------


def md(*sources: str) -> Page: return Page("p/a.ipynb", [new_markdown_cell(s) for s in sources])


def code(source: str, *outputs) -> Page:
    return Page("p/a.ipynb", [new_code_cell(source, outputs=list(outputs))])


def image(size: int = 100):
    return new_output("display_data", {"image/png": base64.b64encode(bytes(size)).decode()})


def sample(**changes) -> dict:
    contents = ["index.ipynb", {"section": "Library", "contents": ["api/a.ipynb"]}]
    navbar = {"left": [{"text": "Start", "href": "index.ipynb"}]}
    website = {"sidebar": {"contents": contents}, "navbar": navbar} | changes.pop("website", {})
    return {"website": website, "format": {"html": {"css": "styles.css"}}} | changes


@pytest.mark.parametrize("pages, problems", [
    ({"index.ipynb", "api/a.ipynb"}, 0),
    ({"index.ipynb"}, 1),
    ({"index.ipynb", "api/a.ipynb", "lost.qmd"}, 1),
])
def test_navigation_sees(pages, problems): assert len(check_navigation(sample(), pages)) == problems


def test_navigation_sees_navbar_and_repeats():
    site = sample(website={"navbar": {"left": [{"text": "x", "menu": [{"href": "gone.ipynb"}]}]}})
    assert "gone.ipynb" in check_navigation(site, {"index.ipynb", "api/a.ipynb"})[0]
    site["website"]["sidebar"] = {"contents": ["index.ipynb", "index.ipynb"]}
    assert "twice" in check_navigation(site, {"index.ipynb", "gone.ipynb"})[-1]


@pytest.mark.parametrize(
    "order, problems",
    [
        (["a/01_x.ipynb", "a/02_y.ipynb"], 0),
        (["a/02_y.ipynb", "a/01_x.ipynb"], 1),
        (["b/02_y.ipynb", "a/01_x.ipynb"], 0),
    ],
)
def test_reading_order_sees(order, problems):
    assert len(check_reading_order(sample(website={"sidebar": {"contents": order}}))) == problems


@pytest.mark.parametrize(
    "sections, order, problem",
    [
        ([["api/a/x.ipynb"], ["api/b/y.ipynb"]], ["a", "b"], ""),
        ([["api/a/x.ipynb"], ["api/cli.ipynb"], ["api/b/y.ipynb"]], ["a", "b"], ""),
        ([["api/b/y.ipynb"], ["api/a/x.ipynb"]], ["a", "b"], "in the order ['b', 'a']"),
        ([["api/a/x.ipynb"]], ["a", "b"], "sections ['a'], wings ['a', 'b']"),
        ([["api/a/x.ipynb", "api/b/y.ipynb"]], ["a", "b"], "W0 mixes ['api/a', 'api/b']"),
    ],
)
def test_wings_sees(sections, order, problem):
    library = [{"section": f"W{i}", "contents": pages} for i, pages in enumerate(sections)]
    contents = ["index.ipynb", {"section": "Library", "contents": library}]
    problems = check_wings(sample(website={"sidebar": {"contents": contents}}), order)
    assert len(problems) == bool(problem) and problem in "".join(problems)


def test_files_sees(tmp_path):
    site = sample(
        bibliography=["references.bib"],
        format={"html": {"css": "styles.css", "theme": {"light": ["cosmo", "own.scss"]}}},
    )
    assert len(check_files(site, tmp_path)) == 3
    for name in ("references.bib", "styles.css", "own.scss"): (tmp_path / name).touch()
    assert check_files(site, tmp_path) == []


def test_metadata_sees():
    urls = {"Repository": "https://a.example/x", "Documentation": "https://b.example/"}
    pyproject = {"project": {"description": "d", "urls": urls}, "tool": {"nbdev": {"title": "t"}}}
    website = {
        "title": "t",
        "description": "d",
        "repo-url": urls["Repository"],
        "site-url": urls["Documentation"],
        "repo-branch": "main",
    }
    assert check_metadata({"website": website}, pyproject) == []
    for key in website:
        assert len(check_metadata({"website": website | {key: "other"}}, pyproject)) == 1


@pytest.mark.parametrize("text, problem", [
    ("@misc{a,\n author={A},\n title={T},\n year={1},\n doi={1}\n}\n" * 2, "a is defined twice"),
    ("@misc{a,\n author = {A},\n title = {T},\n url = {1}\n}\n", "a has no year"),
    ("@misc{a,\n author = {A},\n title = {T},\n year = {1}\n}\n", "a has no address"),
    ("@misc{a,\n author={A},\n title={T,\n year={1},\n doi={1}\n}\n", "a: braces do not balance"),
])
def test_bibliography_sees(text, problem): assert check_bibliography(text) == [problem]


@pytest.mark.parametrize(
    "text, missing",
    [
        ("as shown [@known; see @gone2020, p. 3].", "gone2020"),
        ("By @gone2020.", "gone2020"),
        ("[-@gone2020]", "gone2020"),
        ("[@known]", None),
        ("me@gone2020.org", None),
        ("`@gone2020`", None),
        ("```python\n@gone2020\n```", None),
        (r"a \@gone2020", None),
        ("<me@gone.org>", None),
        ("$x@gone$", None),
        ("@sec-elsewhere", None),
    ],
)
def test_citations_sees(text, missing):
    problems = [f"@{missing} is not in references.bib"] if missing else []
    assert check_citations(md(text), {"known"}) == problems


@pytest.mark.parametrize(
    "text, problems",
    [
        ("@eq-gone", 1),
        ("see @sec-a, @fig-gone.", 2),
        ("## H {#sec-a}\n\n@sec-a", 0),
        ("$$x$$ {#eq-a}\n\nby @eq-a.", 0),
        ("`{#eq-a}` @eq-b", 1),
        ("```\n{#eq-b}\n```\n@eq-b", 1),
    ],
)
def test_crossrefs_sees(text, problems):
    assert len(check_crossrefs(md(text))) == problems


def test_crossrefs_reads_cell_labels():
    page = code("#| label: fig-energy\nplot()")
    page.cells.append(new_markdown_cell("In @fig-energy it falls; in @fig-other it does not."))
    assert check_crossrefs(page) == ["@fig-other has no label on this page"]


@pytest.mark.parametrize(
    "url, problem",
    [
        ("b.ipynb", None),
        ("b.ipynb#two-words", None),
        ("b.ipynb#model.energy", None),
        ("#here", None),
        ("https://a.example", None),
        ("c.ipynb", "does not exist"),
        ("b.html", "does not exist"),
        ("b.ipynb#gone", "no #gone"),
        ("#gone", "no #gone"),
        ("../../LICENSE", "out of nbs"),
    ],
)
def test_links_sees(url, problem, tmp_path):
    here = md(f"# Here\n\n[`a`]({url}) and `[x](gone.ipynb)`\n\n```\n[x](gone.ipynb)\n```")
    method = "#| export\n@patch\ndef energy(self:Model): ..."
    other = Page("p/b.ipynb", [new_markdown_cell("## Two *words*"), new_code_cell(method)])
    (tmp_path / "p").mkdir()
    for page in (here, other): (tmp_path / page.name).touch()
    found = check_links(here, {p.name: p for p in (here, other)}, tmp_path)
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


def moves_for_all(svg: str) -> bool:
    "Whether a picture moves for those, too, who ask for reduced motion"
    calm = re.search(r"@media ?\(prefers-reduced-motion: ?reduce\)\s*\{[^@]*animation: ?none", svg)
    return ("@keyframes" in svg and not calm) or "<animate" in svg


@pytest.mark.parametrize("path", sorted(NBS.rglob("*.svg")), ids=lambda p: p.name)
def test_pictures_stand_still_for_those_who_ask(path):
    assert not moves_for_all(path.read_text(encoding="utf-8"))


def test_a_picture_that_never_stands_still_is_seen():
    moving = "<style>@keyframes a{0%{opacity:1}} g{animation:a 1s infinite}"
    calm = "@media (prefers-reduced-motion:reduce){g{animation:none}}"
    assert moves_for_all(moving) and not moves_for_all(moving + calm)
    assert moves_for_all("<svg><circle><animate/></circle></svg>") and not moves_for_all("<svg/>")


@pytest.mark.parametrize(
    "page, problems",
    [
        (md("![](x.png)"), 1),
        (md("![an energy that falls](x.png){width=50%}"), 0),
        (md("[](x.png)"), 0),
        (code("plot()", image()), 1),
        (code("#| fig-alt: ''\nplot()", image()), 1),
        (code("#| fig-alt: An energy that falls\nplot()", image()), 0),
        (code("#| hide\nplot()", image()), 0),
        (code("#| fig-alt: Large\nplot()", image(MAX_IMAGE_BYTES)), 1),
    ],
)
def test_figures_sees(page, problems, tmp_path):
    assert len(check_figures(page, tmp_path)) == problems


def test_figures_sees_large_files(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/x.png").write_bytes(bytes(MAX_IMAGE_BYTES))
    assert len(check_figures(md("![alt](x.png)"), tmp_path)) == 1


@pytest.mark.parametrize(
    "page, problems",
    [
        (code("1", new_output("execute_result", {"text/plain": "1"})), 0),
        (code("1"), 1),
        (md("only prose"), 0),
        (code("1/0", new_output("error", ename="ZeroDivisionError", evalue="", traceback=[])), 1),
    ],
)
def test_outputs_sees(page, problems):
    assert len(check_outputs(page)) == problems


TITLE = "# Title\n\n> Subtitle"


@pytest.mark.parametrize(
    "cells, problems",
    [
        ([TITLE, "more"], 0),
        (["# Title\n> One\n> two"], 0),
        (["# Title"], 1),
        ([TITLE + "\n\nmore"], 1),
        (["prose"], 1),
        ([TITLE] * MAX_CELLS, 1),
        ([TITLE] * (MAX_CELLS - 1), 0),
    ],
)
def test_style_sees_cells(cells, problems):
    assert len(check_style(md(*cells))) == problems


@pytest.mark.parametrize(
    "source, problems",
    [
        ("import a\nfrom b import c", 0),
        ("x = 1", 0),
        ("import a\nx = a.b", 1),
        ("#| hide\nimport a\na.b()", 0),
        ("%matplotlib inline\nimport a", 0),
        ("def f():\n    import a", 0),
    ],
)
def test_style_sees_imports(source, problems):
    assert (
        len(check_style(Page("a.ipynb", [new_markdown_cell(TITLE), new_code_cell(source)])))
        == problems
    )


@pytest.mark.parametrize(
    "text, problems",
    [
        ("---\ntitle: Why energy\n---\n\nText", 0),
        ("# Why energy", 1),
        ("---\ndescription: x\n---\n", 1),
    ],
)
def test_style_sees_qmd(text, problems):
    assert len(check_style(Page("a.qmd", [new_markdown_cell(text)]))) == problems


@pytest.mark.parametrize(
    "sources, problems",
    [
        (["#| exports\ndef f(): ...", "f()"], 0),
        (["#| export\ndef f(): ..."], 1),
        (["#| export\nSIZE = 3"], 1),
        (["#| export\ndef _f(): ...", "#| hide\n_f()"], 0),
        (["#| export\ndef _f(): ...", "_f()"], 1),
        (["#| exporti\ndef f(): ...", "f()"], 1),
        (["#| exports\ndef _f(): ...", "_f()"], 0),
        (["#| export\nimport a", "a.b()"], 0),
    ],
)
def test_shown_sees(sources, problems):
    assert len(check_shown(Page("p/a.ipynb", [new_code_cell(s) for s in sources]))) == problems


@pytest.mark.parametrize(
    "cells, problems",
    [
        ([new_markdown_cell("words"), new_code_cell("1")], 0),
        ([new_code_cell("#| export\nimport a"), new_markdown_cell("words")], 0),
        ([new_code_cell("import a"), new_markdown_cell("words")], 1),
    ],
)
def test_opening_sees(cells, problems):
    assert len(check_opening(Page("p/a.ipynb", [new_markdown_cell(TITLE), *cells]))) == problems


def test_headings_sees():
    page = md("## `f`\n\n## Other\n\n```\n## f\n```")
    page.cells.append(new_code_cell("#| exports\ndef f(): ..."))
    assert len(check_headings(page)) == 1
    assert len(check_repeats(md("## A\n\nwords\n\n## A", "## B"))) == 1


def test_maths_sees():
    assert len(check_maths(md(r"$\begin{psmallmatrix}0\end{psmallmatrix}$"))) == 1


def test_links_reads_pictures():
    page = md('[![](a.png){fig-alt="an energy"}](b.ipynb) ![c](d.png)')
    wanted = [(True, "an energy", "a.png"), (False, "picture", "b.ipynb"), (True, "c", "d.png")]
    assert page.links == wanted


@pytest.mark.slow
def test_proc_nbs_sees(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "sample"\n[tool.nbdev]\n')
    cells = [new_markdown_cell(TITLE), new_code_cell("#| export\nimport no_such_module_anywhere")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "nbs/a.ipynb")
    problems = check_processed(tmp_path, process(tmp_path))
    assert (
        any("no_such_module_anywhere" in p for p in problems)
        and "a.ipynb was not processed" in problems
    )
