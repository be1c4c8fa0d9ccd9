"""What the site is made with: the documentation of a name, what is mended before Quarto and after
it, and the check of the result."""

import ast
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import after_render
import before_render
import check_site
import make_names
import nbformat
import pytest
import text_pages
from generated import drift
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import hamux
from hamux._reference import INDEX, MODULES, Reference, exported, tree

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = [
    name
    for name, module in sorted(MODULES.items())
    if name.partition(".")[0] in import_module(module).__all__
    and not any(part.startswith("_") and part != "__call__" for part in name.split("."))
]


# --- the documentation of a name ------------------------------------------------------------------


def test_renderer_is_the_one_that_nbdev_uses():
    from nbdev.config import get_config
    from nbdev.showdoc import show_doc
    assert get_config(ROOT).renderer == "hamux._reference.Reference"
    assert isinstance(show_doc(hamux.descend, renderer=Reference), Reference)


@functools.cache
def documentation(name): return str(Reference(exported(None, name), name))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_documented(name):
    text = documentation(name)
    assert not re.search(r"__main__|NoneType|<class|<function|object at 0x|<factory>", text)
    assert f"{{#{name.lower()}" in text


@pytest.mark.parametrize("name", [n for n in PUBLIC if "." not in n])
def test_every_parameter_stands_in_the_call(name):
    "A class that holds what only the library can give it shows none"
    thing, text = exported(None, name), documentation(name)
    shown = re.search(r"```python\n(.*?)```", text.split("\n####")[0], re.S)
    if inspect.isclass(thing) and (inspect.isabstract(thing) or issubclass(thing, Exception)):
        return
    names = list(inspect.signature(thing).parameters)
    if inspect.isclass(thing) and any(n.startswith("_") for n in names): assert shown is None
    elif shown is None: assert not names
    else:
        said = ast.parse(f"def {shown[1].strip()}: pass").body[0].args
        stars = [arg for arg in (said.vararg, said.kwarg) if arg]
        order = [*said.posonlyargs, *said.args, *stars[: bool(said.vararg)], *said.kwonlyargs]
        assert [arg.arg for arg in order + stars[bool(said.vararg) :]] == names


@pytest.mark.parametrize(
    "name, parameter, wanted",
    [
        ("NeuronLayer", "tau", ("`float`", "`1.0`", "time constant > 0")),
        ("HAM", "connections", ("by name or by position",)),
        ("MemorySynapse", "Xi", ("`Float[Array",)),
        ("Descent", "xs", ("`dict`", "states by layer")),
        ("Langevin", "temperature", ("`",)),
        ("descend", "ham", ("`HAM`", "`VectorizedHAM`", "the network")),
    ],
)
def test_tables_tell_type_default_and_meaning(name, parameter, wanted):
    "Of a class with an `__init__` of its own, of one without, and of a function"
    row = re.search(rf"^\| `{parameter}` \|.*$", str(Reference(getattr(hamux, name))), re.M)[0]
    for part in wanted: assert part in row


def test_no_two_public_names_are_the_same():
    "Or a page would show the documentation of another"
    names = [
        (module, full.removeprefix(f"{module}."))
        for module, listed in INDEX["syms"].items()
        for full in listed
    ]
    public = [name for module, name in names if name in import_module(module).__all__]
    assert sorted(public) == sorted(set(public))


def unexplained(text: str) -> list[str]:
    "What the site shows of a name without saying what it means"
    out = []
    for block in text.split("::: {.api}\n")[1:]:
        call = re.search(r"```python\n(.*?)\n```", block, re.S)
        if call and not call[1].endswith("()") and ".api-table" not in block: out.append(call[1])
        for table in re.findall(r"^\| name.*?(?=\n\n)", block, re.M | re.S):
            head, _, *rows = table.splitlines()
            told = head.endswith("| meaning |")
            out += [row.split("`")[1] for row in rows if not told or row.endswith("|  |")]
        for kind, said in re.findall(r"^\[Returns\]\{.api-word\} (.*?`)(:.*)?$", block, re.M):
            if not said and kind.strip("`") not in MODULES: out.append(f"-> {kind}")
    return out


def is_in_its_class(name: str) -> bool:
    "Whether a method is shown with its class, or not at all: others are patched, and shown alone"
    owner, _, method = name.rpartition(".")
    if not owner: return False
    return method in {getattr(node, "name", "") for node in tree(exported(None, owner)).body}


@pytest.mark.slow
def test_every_parameter_and_result_is_explained():
    "By a comment beside it, or by what is passed on, returned, implemented or held"
    shown = [name for name in PUBLIC if not is_in_its_class(name)]
    found = {name: unexplained(str(Reference(exported(None, name), name))) for name in shown}
    assert {name: missing for name, missing in found.items() if missing} == {}


def test_what_is_not_explained_is_seen():
    text = Reference(hamux.descend).text
    assert unexplained(text) == []
    assert unexplained(text.replace("the states to start from, by layer", "")) == ["xs"]
    tables = re.compile(r"::: \{.api-table\}.*?\n:::\n", re.S)
    assert unexplained(tables.sub("", text))[0].startswith("descend(ham, xs")
    assert unexplained(text.replace("`Descent`", "`dict`")) == ["-> `dict`"]
    bare = re.sub(r"(\|[^|\n]*\|[^|\n]*\|[^|\n]*\|)[^|\n]*\|$", r"\1", text, flags=re.M)
    assert len(unexplained(bare)) > 10


def test_what_is_not_said_is_taken_from_where_it_is():
    "From the class that is returned, the function it is passed on to, a base or a held class"
    text = str(Reference(hamux.TanhLayer))
    assert "time constant > 0" in text and "inverse temperature > 0" in text
    assert "a state per layer" in str(Reference(hamux.VectorizedHAM.activations))
    assert "the point at the state that was proposed last" in str(Reference(hamux.Euler.step))
    (row,) = re.findall(r"^\| `numbers` \|.*$", str(Reference(hamux.Euler)), re.M)
    assert "another value needs no other program" in row


def test_comments_are_found_behind_what_is_not_ascii():
    "Of a field whose default has such a letter, and of keywords that are passed on"
    assert "what it is called in messages" in str(Reference(hamux.Lazy))
    assert "passed on to matplotlib" in str(Reference(hamux.plot_energy))


def test_what_is_returned_and_raised():
    text = str(Reference(hamux.NeuronLayer.energy))
    assert "[Returns]{.api-word} `Float[Array, \"\"]`: \\<x̂, x> − L(x), or 0 without leak" in text
    text = str(Reference(hamux.NeuronLayer))
    assert "- `ValueError`: NeuronLayer: tau must be a positive finite number, got …" in text


@pytest.mark.slow
def test_what_helpers_raise_is_told_in_the_words_of_the_call():
    "Not what is caught, and not what says nothing without its numbers"
    text = lambda name: str(Reference(getattr(hamux, name)))
    raised = lambda name: re.findall(r"^- `(\w+)`: (.*)$", text(name), re.M)
    assert ("ValueError", "HAM: a connection must join a layer, got …") in raised("HAM")
    assert ("TypeError", "LinearSynapse: W must be real, got dtype …") in raised("LinearSynapse")
    wanted = "ValueError", "LinearSynapse: W must have … axes, got shape …"
    assert wanted in raised("LinearSynapse")
    wanted = "TypeError", "descend: ham must be a HAM or a VectorizedHAM, got …"
    assert wanted in raised("descend")
    assert not raised("load") # all of it becomes a `FileProblem`
    messages = [said for name in hamux.__all__ if name in MODULES for _, said in raised(name)]
    assert not [said for said in messages if re.search(r"…[. …]*…|^…:", said)]


def test_what_a_page_defines_is_read_from_the_package():
    "A class of `__main__` has no source"
    page = {}
    exec("class Euler:\n    'Not this one.'", page)
    text = str(Reference(page["Euler"]))
    assert "Not this one" not in text and "blob/main/hamux/dynamics/euler.py#L" in text


def test_source_links_lead_to_the_definition():
    for name in ("descend", "NeuronLayer", "NeuronLayer.init"):
        text = str(Reference(exported(None, name), name))
        path, line = re.search(r"blob/main/(\S+?)#L(\d+)", text).groups()
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1 :][:3]
        assert any(re.match(rf"(def|class) {name.split('.')[-1]}\b", line) for line in lines)


# --- pages in plain text --------------------------------------------------------------------------

PAGE = """---
title: A wing
subtitle: What it is for.
---

Words, and code that is only shown:

```python
1 / 0
```

```{python}
#| default_exp wing.page
```

```{python}
#| export
import math
```

```{python}
#| exports
def area(r): # the radius
    "Of a circle."
    return math.pi * r**2


class Shape: ...
```

```{python}
#| hide
assert area(0) == 0
```

```{python}
#| label: fig-area
area(1)
```
"""


@pytest.fixture
def project(tmp_path) -> Path:
    "A project of nbdev with one page in plain text, and one notebook"
    settings = '[project]\nname = "sample"\nversion = "1"\n[tool.nbdev]\nlib_name = "sample"\n'
    (tmp_path / "pyproject.toml").write_text(settings)
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/a.qmd").write_text(PAGE)
    (tmp_path / "nbs/prose.qmd").write_text("---\ntitle: Prose\n---\n\n```python\n1 / 0\n```\n")
    cells = [new_markdown_cell("# B\n\n> b"), new_code_cell("#| default_exp b\n#| export\ny = 2")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "nbs/b.ipynb")
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample/__init__.py").write_text('__version__ = "1"\n')
    return tmp_path


def run_export(project: Path):
    command = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); from pathlib import Path;"
        f"from export import export; export(Path({str(project)!r}))"
    )
    subprocess.run([sys.executable, "-c", command], check=True, cwd=project, env=plain_env())


def plain_env() -> dict: return {k: v for k, v in os.environ.items() if k != "IN_TEST"}


def test_text_pages_are_those_with_cells(project):
    (project / "nbs/_proc").mkdir()
    (project / "nbs/_proc/c.qmd").write_text(PAGE)
    assert text_pages.text_pages(project / "nbs") == [project / "nbs/a.qmd"]


def test_a_text_page_is_read_as_a_notebook(project):
    cells = text_pages.read_page(project / "nbs/a.qmd").cells
    kinds = [c.cell_type for c in cells]
    assert kinds == ["raw", "markdown", *["code"] * 5]
    assert "1 / 0" in cells[1].source and cells[3].source == "#| export\nimport math"
    assert [c.id for c in cells[3:5]] == ["imports", "area"]


@pytest.mark.slow
def test_text_pages_export_as_notebooks_do(project):
    run_export(project)
    module = (project / "sample/wing/page.py").read_text()
    assert module.startswith('"""What it is for.')
    assert "__all__ = ['area', 'Shape']" in module and "1 / 0" not in module
    assert "assert area" not in module and "# %% ../../nbs/a.qmd #area" in module
    assert "y = 2" in (project / "sample/b.py").read_text()
    index = (project / "sample/_modidx.py").read_text()
    assert "'a.html#area'" in index and "'a.html#shape'" in index
    found = subprocess.run(
        [sys.executable, "-c", "from sample.wing.page import *; print(round(area(2), 1))"],
        cwd=project, env=plain_env() | {"PYTHONPATH": str(project)}, capture_output=True, text=True,
    )
    assert found.stdout == "12.6\n", found.stderr


@pytest.mark.slow
def test_a_cell_keeps_its_name_when_another_is_put_before_it(project):
    page = project / "nbs/a.qmd"
    run_export(project)
    before = (project / "sample/wing/page.py").read_text()
    page.write_text(PAGE.replace("Words, and", "```{python}\n2 + 2\n```\n\nWords, and"))
    run_export(project)
    assert (project / "sample/wing/page.py").read_text() == before


@pytest.mark.slow
def test_a_page_without_a_module_is_no_riddle(project):
    (project / "nbs/c.qmd").write_text("```{python}\n#| export\nx = 1\n```\n")
    with pytest.raises(subprocess.CalledProcessError): run_export(project)


@pytest.mark.slow
def test_text_pages_are_processed_as_notebooks_are(project):
    run_export(project)
    cells = before_render.as_rendered(project / "nbs/a.qmd", project)
    text = ["".join(c["source"]) for c in cells]
    code = [t for c, t in zip(cells, text, strict=True) if c["cell_type"] == "code"]
    shown = [t for t in code if "include: false" not in t]
    order = [before_render.shown_name({"cell_type": "code", "source": t}) for t in shown]
    assert set(order[:3]) == {"area", "Shape", None} and order[3] is None
    source = next(t for t in shown if "def area" in t)
    assert before_render.SOURCE in source and not any(t.startswith("#| export") for t in text)
    hidden = [t for t in text if "include: false" in t]
    assert "from sample.wing.page import *" in hidden[0]
    assert any("assert area" in t for t in hidden) and any("import math" in t for t in hidden)


def test_one_page_is_kept_in_plain_text():
    "The living example, whose module is as it exports it"
    pages = text_pages.text_pages(ROOT / "nbs/api")
    assert [p.relative_to(ROOT).as_posix() for p in pages] == ["nbs/api/numerics/streaming.qmd"]


# --- the index of names ---------------------------------------------------------------------------


def test_names_are_in_step():
    assert drift(make_names.build(ROOT)) == "", "run scripts/make_names.py"


def test_names_are_all_there():
    text = (ROOT / make_names.PAGE).read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`([^`]+)`\]", text, re.M)
    assert sorted(listed) == sorted(n for n in PUBLIC if "." not in n)
    functions = {n for n in hamux.__all__ if n in MODULES}
    assert set(listed[: len(functions)]) == functions


# --- before Quarto --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("see [[`fit`](https://a.b/l.html#fit)](t.ipynb).", "see [`fit`](t.ipynb)."),
        (
            "[the [`a`](https://x.y/p.html#a) and [`b`](https://x.y/p.html#b)](q.ipynb)",
            "[the `a` and `b`](q.ipynb)",
        ),
        ("[`a`](https://x.y/p.html#a)", "[`a`](https://x.y/p.html#a)"),
        ("[`_c`](https://x.y/p.html#_c)", "`_c`"),
        ("[`c`](p.ipynb#c)", "[`c`](p.ipynb#c)"),
    ],
)
def test_unlink(text, wanted):
    known = {"p#a", "p#b", "l#fit"}
    assert before_render.unlink(text, known) == wanted


TERMS = {"state": ("state", "What moves."), "states": ("state", "What moves.")}


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Two states.", 'Two [states](g.qmd#state){.term title="What moves."}.'),
        ("A state, a state.", 'A [state](g.qmd#state){.term title="What moves."}, a state.'),
        ("`state` and $state$", "`state` and $state$"),
        ("[a state](x.ipynb)", "[a state](x.ipynb)"),
        ("## A state\n\n```\nstate\n```", "## A state\n\n```\nstate\n```"),
        ("$$state$$ {#eq-state}", "$$state$$ {#eq-state}"),
        ("a steady-state, @sec-state", "a steady-state, @sec-state"),
        ("statement", "statement"),
    ],
)
def test_words_are_linked_once(text, wanted):
    assert before_render.link_words(text, TERMS, set(), "g.qmd") == wanted


def test_glossary():
    terms = before_render.glossary(ROOT / "nbs/explanations/glossary.qmd")
    wanted = "state activation lagrangian hypersynapse clamp residual fixed-point basin recall"
    assert {anchor for anchor, _ in terms.values()} == {*wanted.split(), "landscape"}
    assert "clamped" in terms and "fixed points" in terms
    for _, meaning in terms.values():
        assert 20 < len(meaning) < 140 and not re.search(r"[\\$`{}\"→]", meaning)


def cell(source: str) -> dict: return {"cell_type": "code", "source": source}


def test_documentation_stands_before_its_source_in_the_order_of_the_source():
    source = cell('#| code-summary: "Exported source"\nclass A: ...\ndef b(): ...\ndef c(): ...')
    shows = {n: cell(f"#| output: asis\nshow_doc({n})") for n in ("A", "b", "c", "d")}
    after = cell("test_eq(b(), 1)")
    lone = cell('#| code-summary: "Exported source"\n_SIZE = 3')
    other = cell('#| code-summary: "Exported source"\n@patch\ndef d(self: A): ...')
    given = [lone, shows["c"], source, shows["b"], shows["A"], after, shows["d"], other]
    wanted = [lone, shows["A"], shows["b"], shows["c"], source, after, shows["d"], other]
    assert before_render.in_order(given) == wanted
    assert before_render.in_order([lone, shows["d"], other]) == [lone, shows["d"], other]


def test_nothing_is_mended_in_the_sources(tmp_path):
    (tmp_path / "nbs").mkdir()
    page = tmp_path / "nbs/a.ipynb"
    page.write_text("not even JSON")
    assert before_render.main(tmp_path / "nbs") == 0 and page.read_text() == "not even JSON"


# --- after it -------------------------------------------------------------------------------------


def function(name: str) -> str:
    return f'<mrow><mi mathvariant="normal">{name}</mi><mo>\u2061</mo></mrow>'


def formula(inner: str, tex: str = "x") -> str:
    note = f'<annotation encoding="application/x-tex">{tex}</annotation>'
    return f"<math><semantics><mrow>{inner}</mrow>{note}</semantics></math>"


def test_named_functions_have_spaces():
    x, paren = "<mi>x</mi>", '<mo stretchy="false" form="prefix">(</mo>'
    space = after_render.SPACE
    logcosh = after_render.spaced(formula(function("log") + function("cosh") + x))
    assert logcosh.count(space) == 2 and "annotation" not in logcosh
    assert after_render.spaced(formula(function("log") + paren)).count(space) == 0
    assert after_render.spaced(formula(x + function("tanh") + x)).count(space) == 2
    least = f"<msub>{function('min')}<mi>k</mi></msub>"
    assert f"</msub>{space}{x}</mrow>" in after_render.spaced(formula(least + x))
    total = function("log") + "<munder><mo>∑</mo><mi>k</mi></munder>" + x # has a space of its own
    assert after_render.spaced(formula(total)).count(space) == 0


def test_norms_and_hats_are_close():
    bar, hat = '<mo stretchy="false" form="postfix">∥</mo>', '<mo accent="true">\u0302</mo>'
    brace = '<mo accent="true">⏟</mo>' # is as wide as its term
    text = after_render.spaced(formula(bar + hat + brace))
    assert 'form="postfix" lspace="0" rspace="0">∥' in text and brace in text
    assert '<mo accent="true" stretchy="false">\u0302</mo>' in text


def test_search_finds_names_and_no_tex():
    html = (
        f"<main><p>Energy {formula('<mi>α</mi>', chr(92) + 'alpha')}</p>"
        '<h3 class="api-name anchored" data-anchor-id="descend">descend</h3><div class="api">'
        '<p><span class="api-line">Slide <em>down</em>.</span></p></div></main>'
    )
    entry = {"objectID": "a.html", "href": "a.html", "title": "Recall", "section": ""}
    entries = [entry | {"text": "Energy α\\alpha", "crumbs": ["Dynamics"]}]
    for _ in range(2): # a second rendering changes nothing
        entries = after_render.search_index(entries, {"a.html": html})
        assert entries[0]["text"] == "Energy α"
        (found,) = entries[1:]
        assert (found["title"], found["href"]) == ("descend", "a.html#descend")
        assert found["text"] == "descend: Slide down." and found["crumbs"] == ["Dynamics", "Recall"]


def test_llms_has_every_page_in_reading_order(tmp_path):
    texts = {"index": "# Home\n\nWords.\n", "t/02_b": "# B\n\n## H", "t/01_a": "# A\n\nWhat."}
    for name, text in texts.items():
        path = tmp_path / f"{name}.llms.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    section = {"section": "T", "contents": ["t/01_a.ipynb", "t/02_b.ipynb", "no.qmd"]}
    website = {"title": "h", "description": "d", "site-url": "https://x/"}
    website["sidebar"] = {"contents": ["index.ipynb", section]}
    lines = after_render.llms_txt({"website": website}, tmp_path).splitlines()
    assert [line for line in lines if line.startswith(("-", "##"))] == [
        "## Start",
        "- [Home](https://x/index.llms.md): Words.",
        "## T",
        "- [A](https://x/t/01_a.llms.md): What.",
        "- [B](https://x/t/02_b.llms.md)",
    ]


# --- the check ------------------------------------------------------------------------------------


GOOD = '<main><h1>Title</h1><p id="here"><a href="#here">x</a> <img src="x.png" alt="x"></p></main>'


def site(tmp_path: Path, **pages: str) -> Path:
    pages = {"index": GOOD} | pages
    for name, html in pages.items():
        (tmp_path / f"{name}.html").write_text(html)
        (tmp_path / f"{name}.llms.md").write_text("")
    (tmp_path / "x.png").write_bytes(bytes(9))
    (tmp_path / "sitemap.xml").write_text("<loc>https://a.b/index.html</loc>")
    listed = "".join(f"(https://a.b/{name}.llms.md)" for name in pages)
    (tmp_path / "llms.txt").write_text(listed)
    (tmp_path / "search.json").write_text("[]")
    return tmp_path


def kinds(tmp_path: Path, **pages: str) -> list[str]:
    return [kind for kind, _, _ in check_site.problems(site(tmp_path, **pages))]


@pytest.mark.parametrize(
    "html, problems",
    [
        (GOOD, []),
        ("<main><p>see [x](https://a.b)</p></main>", ["markup shown as text"]),
        ("<main><code>[x](https://a.b)</code></main>", []),
        ("<main><pre>tau:NoneType=None</pre></main>", ["leak of the notebook's process"]),
        ('<main><span class="math inline">$x$</span></main>', ["formula left as TeX"]),
        ("<main><h2>A</h2><h3>A</h3></main>", ["heading twice in a row"]),
        ('<main><img src="x.png"></main>', ["picture without a text"]),
        ('<main><img src="y.png" alt="y"></main>', ["missing file"]),
        ('<main><a href="index.html#gone">y</a></main>', ["missing anchor"]),
        ('<main><a href="https://a.b/index.html#gone">y</a></main>', ["missing anchor"]),
        ('<main><a href="https://a.b/index.html#here">y</a></main>', []),
        ('<main><a href="https://elsewhere.org/#gone">y</a></main>', []),
        ("<main>" + "x" * 1_000_000 + "</main>", ["page too heavy"]),
        ('<main><div class="cell-output cell-output-display"> </div></main>', ["empty output"]),
        (
            '<main><h3 class="api-name anchored" data-anchor-id="f">f</h3></main>',
            ["name not found by the search"],
        ),
    ],
)
def test_check_sees(html, problems, tmp_path):
    assert kinds(tmp_path, a=html) == problems


def test_check_sees_what_machines_read(tmp_path):
    here = site(tmp_path)
    (here / "llms.txt").write_text("")
    entry = {"href": "index.html", "text": r"so \frac ab", "title": "", "section": ""}
    (here / "search.json").write_text(json.dumps([entry]))
    found = [kind for kind, _, _ in check_site.problems(here, "\x1b[33mWARN: no such file\x1b[0m")]
    assert found == ["not in llms.txt", "TeX in the search index", "Quarto warns"]


def test_check_exits_with_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_site.py", str(site(tmp_path))])
    assert check_site.main() == 0
    assert capsys.readouterr().out == "1 pages, 0 problems\n"
    site(tmp_path, a="<main><img src='x.png'></main>")
    assert check_site.main() == 1


def test_index_of_nbdev_names_what_the_renderer_links_to():
    "The settings that source links are made of"
    assert INDEX["settings"]["git_url"] == "https://github.com/hamux/hamux"
