"""The package as it is installed: generated files, the wheel, what an import brings, its lines."""

import ast
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import generated
import make_readme
import make_stub
import nbformat
import pytest
import setuptools
import sync_dependencies
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULES = sorted((ROOT / "hamux").rglob("*.py"))
# for those who draw, train, solve or develop; importing hamux must not bring them
HEAVY = "matplotlib sklearn optax diffrax tqdm fastcore.test IPython nbdev pandas".split()
HEAVY += ["scipy.optimize"]
# says what to install before it imports anything else
OF_AN_EXTRA = "hamux/memories/estimators.py"


def python(code: str, cwd: Path = ROOT) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


# --- what is generated ----------------------------------------------------------------------------


def test_settings_in_step(): assert generated.drift(sync_dependencies.build(ROOT)) == ""


def test_readme_in_step(): assert generated.drift(make_readme.build(ROOT)) == ""


def test_stub_in_step(): assert generated.drift(make_stub.build(ROOT)) == ""


def test_drift_sees(tmp_path):
    files = {"a.txt": b"one\ntwo\n", "b.png": b"\x89\x00"}
    assert "+two" in generated.drift(files, tmp_path)
    generated.write(files, tmp_path)
    assert generated.drift(files, tmp_path) == ""
    (tmp_path / "b.png").write_bytes(b"\x89\x01")
    assert "binary file" in generated.drift(files, tmp_path)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize(
    "script, file", [("sync_dependencies", "settings.ini"), ("make_readme", "README.md")]
)
def test_check_option(script, file, tmp_path):
    "The command line says what has drifted, and exits with 1"
    for name in ("pyproject.toml", "scripts", "hamux", "nbs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    cells = [new_markdown_cell("# hamux\n\n> Memories")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "nbs/index.ipynb")
    command = [sys.executable, f"scripts/{script}.py"]
    run = lambda *args: subprocess.run(
        [*command, *args], cwd=tmp_path, capture_output=True, text=True
    )
    missing = run("--check")
    assert missing.returncode == 1 and f"Run `python scripts/{script}.py`" in missing.stdout
    assert run().returncode == 0 and run("--check").returncode == 0
    (tmp_path / file).write_text((tmp_path / file).read_text() + "by hand\n")
    drifted = run("--check")
    assert drifted.returncode == 1 and "-by hand" in drifted.stdout


def test_settings_values():
    "Read back as nbdev 2 reads them"
    from configparser import ConfigParser
    parser = ConfigParser()
    parser.read_string(sync_dependencies.build(ROOT)["settings.ini"].decode())
    settings, project = parser["DEFAULT"], PYPROJECT["project"]
    assert settings["lib_name"] == project["name"]
    assert settings["description"] == project["description"]
    assert settings["requirements"].split() == project["dependencies"]
    assert "optax" in settings["dev_requirements"] and "hamux[" not in settings["dev_requirements"]
    assert len(settings["console_scripts"].split()) == len(project["scripts"])


def readme(tmp_path: Path, *cells) -> str:
    (tmp_path / "nbs").mkdir(exist_ok=True)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nurls.Documentation = "https://docs.example/x/"\n'
    )
    nbformat.write(new_notebook(cells=list(cells)), tmp_path / "nbs/index.ipynb")
    files = make_readme.build(tmp_path)
    generated.write(files, tmp_path)
    return files["README.md"].decode()


@pytest.mark.parametrize(
    "source, made",
    [
        ("## Where to go {#sec-next}", "## Where to go"),
        ("::: {.callout-note}\nMind this.\n:::", "Mind this."),
        ("![an energy](figures/energy.png){fig-alt=\"x\"}", "![an energy](nbs/figures/energy.png)"),
        (
            "see [neurons](api/network/neurons.ipynb#tau)",
            "see [neurons](https://docs.example/x/api/network/neurons.html#tau)",
        ),
        (
            "see [`HAM`](api/network/hypergraph.ipynb), [why](explanations/why.qmd)",
            (
                "see [`HAM`](https://docs.example/x/api/network/hypergraph.html),"
                " [why](https://docs.example/x/explanations/why.html)"
            ),
        ),
        (
            "[![picture](figures/a.png)](tutorials/01_first.ipynb)",
            "[![picture](nbs/figures/a.png)](https://docs.example/x/tutorials/first.html)",
        ),
        (
            "[licence](../LICENSE), [paper](https://a.example/b), [below](#below)",
            "[licence](LICENSE), [paper](https://a.example/b), [below](#below)",
        ),
        ("a dense memory [@krotov2016dense; @x] recalls", "a dense memory recalls"),
        ("`{#keep}` and `[@keep]`", "`{#keep}` and `[@keep]`"),
        (
            "```python\nx = {#keep}\n[a](b.ipynb)\n:::\n```",
            "```python\nx = {#keep}\n[a](b.ipynb)\n:::\n```",
        ),
    ],
)
def test_readme_markdown(source, made, tmp_path):
    assert readme(tmp_path, new_markdown_cell(source)).split("\n\n", 1)[1] == made + "\n"


STREAM = new_output("stream", name="stdout", text="\x1b[31mfalling\x1b[0m\n")


@pytest.mark.parametrize("source, shown, hidden", [
    ("x = 1", ["```python\nx = 1\n```", "```text\nfalling\n```"], ["\x1b"]),
    ("#| echo: false\nx = 1", ["falling"], ["x = 1"]),
    ("#| output: false\nx = 1", ["x = 1"], ["falling", "#|"]),
    ("#| hide\nx = 1", [], ["x = 1", "falling"]),
    ("#| include: false\nx = 1", [], ["x = 1", "falling"]),
])
def test_readme_code(source, shown, hidden, tmp_path):
    made = readme(tmp_path, new_code_cell(source, outputs=[STREAM]))
    assert all(s in made for s in shown) and not any(h in made for h in hidden)


def test_readme_saves_figures(tmp_path):
    cell = new_code_cell(
        "#| fig-alt: An energy that falls\nplot()",
        outputs=[new_output("display_data", {"image/png": "iVBORw=="})],
    )
    made = readme(tmp_path, cell)
    path = re.search(r"!\[An energy that falls\]\((.+)\)", made)[1]
    assert path.startswith("nbs/figures/") and (tmp_path / path).read_bytes() == b"\x89PNG"


def test_readme_runs_the_tests():
    "Continuous integration takes its command from here"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    found = [b.strip() for b in blocks if "scripts/test.py" in b]
    assert found == ["pip install -e '.[dev]' && python scripts/test.py"]


def test_versions_agree():
    "In the package, the citation and the changelog"
    version = sync_dependencies.version(ROOT, PYPROJECT["project"], PYPROJECT["tool"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "The hamux developers"}]
    assert citation["version"] == version
    assert citation["repository-code"] == PYPROJECT["project"]["urls"]["Repository"]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "hamux", source / "hamux", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    # the licence of pyproject.toml is written as setuptools 77 reads it; where that is installed
    # nothing is fetched
    here = int(setuptools.__version__.split(".")[0]) >= 77
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"]
    isolation = ["--no-build-isolation"] if here else []
    run = subprocess.run([*pip, *isolation, "-w", out, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


@pytest.mark.slow
def test_wheel_is_whole(wheel):
    names = wheel.namelist()
    modules = {path.relative_to(ROOT).as_posix() for path in MODULES}
    assert {n for n in names if n.startswith("hamux/")} == {*modules, make_stub.STUB}
    # no tests, scripts or notebooks beside it
    assert {n.split("/")[0].split("-")[0] for n in names} == {"hamux"}
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_wheel_metadata(wheel):
    def read(name):
        found = next(n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
        return wheel.read(found).decode()

    scripts = read("entry_points.txt")
    for name, target in PYPROJECT["project"]["scripts"].items():
        assert f"{name} = {target}" in scripts
    metadata = read("METADATA")
    assert "License-Expression: Apache-2.0" in metadata
    assert "Generated from nbs/index.ipynb" in metadata
    for extra in PYPROJECT["project"]["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in metadata


@pytest.mark.parametrize(
    "target", PYPROJECT["project"]["scripts"].values(), ids=PYPROJECT["project"]["scripts"]
)
def test_console_scripts_resolve(target):
    module, name = target.split(":")
    assert callable(getattr(importlib.import_module(module), name))


# --- importing ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_import_is_light():
    asked = "hamux.HAM, hamux.MemorySynapse, hamux.descend, hamux.draw"
    loaded = python(
        f"import sys, hamux; {asked}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    ).split()
    assert loaded == []


@pytest.mark.slow
def test_a_wing_is_imported_when_asked_for():
    told = "print(*[m for m in sys.modules if m in wings])"
    code = (
        "import sys, hamux; wings = {f'hamux.{w}' for w in hamux._WINGS};"
        f" {told}; hamux.SoftmaxLayer; {told};"
        " from hamux import *; print(all(n in vars(hamux) for n in hamux.__all__))"
    )
    first, second, whole = python(code).split("\n")[:3]
    assert (first, whole) == ("", "True")
    assert set(second.split()) == {"hamux.lagrangians", "hamux.network"}


@pytest.mark.slow
def test_import_is_quiet():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "from hamux import HAM, descend, draw, recall"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_every_import_is_declared():
    "Imports at the top are dependencies or in Python; those inside of functions may be in an extra"
    alias = {"sklearn": "scikit-learn", "IPython": "jupyter"}
    project = PYPROJECT["project"]
    extras = [
        r
        for extra in ("demo", "ode", "train", "sklearn", "arrow")
        for r in project["optional-dependencies"][extra]
    ]
    extras.append("pandas") # who gives a data frame has it
    name = lambda requirement: re.split(r"[<>=!~\[ ;]", requirement)[0]
    required, optional = {name(r) for r in project["dependencies"]}, {name(r) for r in extras}
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                tops = {n.name.split(".")[0] for n in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops = {node.module.split(".")[0]}
            else:
                continue
            tops = {
                alias.get(t, t) for t in tops if t not in sys.stdlib_module_names and t != "hamux"
            }
            top = node in tree.body and path.relative_to(ROOT).as_posix() != OF_AN_EXTRA
            allowed = required if top else required | optional
            where = f"{path.relative_to(ROOT)}, line {node.lineno}"
            assert tops <= allowed, f"{where}: {tops - allowed} is not declared for this"


def test_public_jax_only():
    private = r"\bjax\._src\b|\bfrom jax\S* import _|\bequinox\.(_|internal)|\beqx\.internal"
    for path in MODULES:
        assert not re.search(private, path.read_text(encoding="utf-8")), path.relative_to(ROOT)


def test_public_names():
    hamux = importlib.import_module("hamux")
    assert len(set(hamux.__all__)) == len(hamux.__all__) > 0
    for name in hamux.__all__:
        assert not name.startswith("_")
        value = getattr(hamux, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert (value.__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.parametrize("path", [p.relative_to(ROOT).as_posix() for p in MODULES])
def test_lines_fit(path):
    "As ruff measures the notebooks; here without nbdev's list of names, and its index"
    if path == "hamux/_modidx.py": return
    text = (ROOT / path).read_text(encoding="utf-8")
    names = re.search(r"^__all__ = \[['\"].*?\]$", text, re.M | re.S)
    lines = text.replace(names[0], "") if names else text
    assert [line for line in lines.splitlines() if len(line) > 100] == []


def test_unexported_sees(tmp_path):
    "A module that no page exports is found, in a wing as well; faces are written by hand"
    spec = importlib.util.spec_from_file_location("run_tests", ROOT / "scripts/test.py")
    spec.loader.exec_module(run_tests := importlib.util.module_from_spec(spec))
    package, pages = tmp_path / "hamux", tmp_path / "api"
    for path in ("__init__.py", "wing/__init__.py", "wing/page.py", "wing/old.py", "flat.py"):
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).touch()
    (pages / "wing").mkdir(parents=True)
    nbformat.write(
        new_notebook(cells=[new_code_cell("#| default_exp wing.page")]), pages / "wing/page.ipynb"
    )
    assert run_tests.unexported(package, pages) == ["flat.py", "wing/old.py"]
    (pages / "flat.qmd").write_text("```{python}\n#| default_exp flat\n```\n")
    assert run_tests.unexported(package, pages) == ["wing/old.py"]
    assert run_tests.unexported(ROOT / "hamux", ROOT / "nbs/api") == []


pytest_plugins = ["pytester"]


def test_a_slow_test_keeps_its_first_cases(pytester):
    "In the run without slow ones, and in that of slow ones alone the others"
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("""
        import pytest
        @pytest.mark.slow(but=2)
        @pytest.mark.parametrize("case", range(5))
        def test_some(case): pass
        @pytest.mark.slow
        @pytest.mark.parametrize("case", range(3))
        def test_none(case): pass
        @pytest.mark.slow(minute=True)
        def test_long(): pass
        def test_all(): pass
    """)
    chosen = {"not slow": ["some[0]", "some[1]", "all"],
              "slow": ["long", "some[2]", "some[3]", "some[4]", "none[0]", "none[1]", "none[2]"]}
    for marks, names in chosen.items():
        printed = pytester.runpytest_inprocess("--collect-only", "-q", "-m", marks).outlines
        assert [line.partition("::test_")[2] for line in printed if "::" in line] == names


# --- the files ------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    "The files that git tracks; what else lies in the checkout is its owner's business"
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode: pytest.skip("not a git checkout")
    return [p for name in run.stdout.split("\0") if name and (p := ROOT / name).is_file()]


def check_text(text: str) -> list[str]:
    "Places of one machine, and registries, that a committed file must not name"
    # spelled in parts, so that this file does not contain what it looks for
    folders = "|".join(
        "/" + f + "/" for f in ("root", "work", "tmp", "opt", "home/[a-z]+", "Users/[A-Za-z]+")
    )
    registries = ("pypi org", "pythonhosted org", "npmjs org", "npmjs com", "anaconda org")
    hosts = "|".join(re.escape(host.replace(" ", ".")) for host in registries)
    return [m[0] for m in re.finditer(rf"(?<![\w.$}}~-])(?:{folders})|(?:{hosts})", text)]


def test_no_machine_in_files():
    found = {}
    for path in tracked():
        try:
            problems = check_text(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if problems: found[path.relative_to(ROOT).as_posix()] = problems
    assert found == {}


@pytest.mark.parametrize(
    "text, problems",
    [
        ("/" + "root/x", 1),
        ('File "/' + 'tmp/a.py"', 1),
        ("in /" + "home/ada/x", 1),
        ("https://files.python" + "hosted.org/x", 1),
        ("tmp/x", 0),
        ("$RUNNER/" + "tmp/x", 0),
        ("a/work/b", 0),
        ("pip install hamux", 0),
    ],
)
def test_no_machine_sees(text, problems):
    assert len(check_text(text)) == problems


def test_no_lock_or_build_files():
    names = {p.name for p in tracked()} | {p.relative_to(ROOT).parts[0] for p in tracked()}
    lock = {f"{tool}.lock" for tool in ("uv", "poetry", "Pipfile", "pdm", "pixi")}
    lock |= {"conda-lock.yml", "package-lock.json", "pylock.toml"}
    assert not names & (lock | {"_proc", "_docs", "build", "dist", "node_modules", "nbdev.yml"})


def test_no_large_files():
    assert [p.relative_to(ROOT).as_posix() for p in tracked() if p.stat().st_size > 1_500_000] == []


@pytest.mark.parametrize(
    "name", ["scripts/test.py", "scripts/sync_dependencies.py", "scripts/make_readme.py", ".ci/run"]
)
def test_is_executable(name):
    assert (ROOT / name).stat().st_mode & 0o111


@pytest.mark.parametrize("name", ["tests", "docs", "release", "thorough"])
def test_workflows(name):
    "They parse, and name the Python versions that the package says it runs on"
    workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))
    assert workflow["name"] == name and workflow["permissions"] == {"contents": "read"}
    if name != "tests": return
    job = workflow["jobs"]["test"]
    versions = [
        c.rsplit(" ", 1)[1]
        for c in PYPROJECT["project"]["classifiers"]
        if re.search(r":: 3\.\d+$", c)
    ]
    assert job["strategy"]["matrix"]["python"] == versions
    assert job["steps"][-1]["run"] == ".ci/run"
