#!/usr/bin/env python3
"""Run every check of the project, and end with one line: `N passed, N failed`."""

import argparse
import filecmp
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import quick
from fastcore.nbio import write_nb
from text_pages import read_page, text_pages

ROOT = Path(__file__).resolve().parent.parent
PLAIN_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1" # small programs are not worth dividing
)
# a third more to compile, a tenth to run: for the pages whose programs run as long as they compile
FASTER_FLAGS = PLAIN_FLAGS.replace("level=0", "level=1")
LONG_PAGES = {
    "04_discrete_memories",
    "05_denoising_memory",
    "06_two_directions",
    "07_three_gradients",
    "08_completing_digits",
    "10_sparse_memories",
}
# more than ten seconds each; run by the stage "slow", and where -k names them
SLOW_PAGES = LONG_PAGES - {"10_sparse_memories"} | {
    "02_energy_transformer",
    "09_memories_for_tables",
    "11_what_was_never_stored",
    "12_sampling_and_training",
    "adjoints",
    "attention",
    "attractors",
    "candidates",
    "check",
    "continuous",
    "gradients",
    "memory",
    "random_features",
    "recipes",
    "replicas",
    "training",
}
# what pages and their runs import beside hamux
PRELOADED = ["jupytext", "matplotlib.pyplot", "nbdev.test", "optax", "pandas", "sklearn.model_selection"]
Outcome = tuple[str, bool | int]  # what was checked; whether it passed, or how many did


def command(name: str, *args: str) -> Outcome:
    "One command that passes by exiting with 0"
    return (
        name,
        subprocess.run([sys.executable, *args], cwd=ROOT, stdin=subprocess.DEVNULL).returncode == 0,
    )


def notebooks() -> list[Path]:
    from nbdev.doclinks import nbglob
    return sorted([*nbglob(as_path=True), *text_pages(ROOT / "nbs")])


def differing(before: Path, after: Path, pattern: str) -> list[str]:
    "The files under either folder that are not the same in both"
    names = {p.relative_to(top).as_posix() for top in (before, after) for p in top.rglob(pattern)}
    return sorted(
        filecmp.cmpfiles(before, after, names, shallow=False)[1]
        + filecmp.cmpfiles(before, after, names)[2]
    )


def modules(package: Path) -> list[str]:
    "The names of a package's modules"
    found = (p.relative_to(package.parent).with_suffix("").parts for p in package.rglob("*.py"))
    return [".".join(parts) for parts in found if not parts[-1].startswith("_")]


def unexported(package: Path, pages: Path) -> list[str]:
    "Modules of the package that no page exports and nobody writes by hand: what a move leaves behind"
    by_hand = {"__init__.py", "__main__.py", "_modidx.py", "_reference.py"}
    exported = set()
    for page in [*pages.rglob("*.ipynb"), *text_pages(pages)]:
        found = re.search(r"#\|\s*default_exp\s+([\w.]+)", page.read_text(encoding="utf-8"))
        if found: exported.add(found[1].replace(".", "/") + ".py")
    names = (p.relative_to(package).as_posix() for p in package.rglob("*.py"))
    return sorted(n for n in names if n not in exported and Path(n).name not in by_hand)


def lint(options) -> Iterator[Outcome]:
    yield command("ruff", "-m", "ruff", "check", ".")


def generated(options) -> Iterator[Outcome]:
    for script in ("sync_dependencies", "make_readme", "make_names", "make_stub"):
        yield command(script, f"scripts/{script}.py", "--check")


def export(options) -> Iterator[Outcome]:
    "The package is what the notebooks export, and the notebooks are as nbdev-clean leaves them"
    from export import export as export_pages
    from nbdev.clean import nbdev_clean
    with tempfile.TemporaryDirectory() as tmp:
        before = shutil.copytree(ROOT / "hamux", Path(tmp) / "hamux")
        export_pages()
        changed = differing(before, ROOT / "hamux", "*.py")
        for name in changed:
            print(
                f"hamux/{name} was not what the pages export; it is now. Look at the diff, then"
                " commit it."
            )
        left = unexported(ROOT / "hamux", ROOT / "nbs" / "api")
        for name in left: print(f"hamux/{name} is exported by no page; remove it.")
        yield "export in step", not changed and not left

        clean = shutil.copytree(
            ROOT / "nbs", Path(tmp) / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
        )
        nbdev_clean.__wrapped__(str(clean))
        unclean = [
            nb for nb in differing(clean, ROOT / "nbs", "*.ipynb") if ".ipynb_checkpoints" not in nb
        ]
        for name in unclean: print(f"nbs/{name} is not clean; run nbdev-clean.")
        yield "notebooks clean", not unclean


@contextmanager
def as_notebook(path: Path) -> Iterator[Path]:
    "A page in plain text as a notebook, for as long as it is needed"
    if path.suffix == ".ipynb": yield path; return
    with tempfile.TemporaryDirectory() as tmp:
        notebook = Path(tmp) / path.with_suffix(".ipynb").name
        write_nb(read_page(path), notebook)
        yield notebook


def run_notebook(path: Path) -> tuple[bool, float]:
    "Whether every cell of a notebook ran, and in how many seconds"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    config = get_config(path)
    with as_notebook(path) as notebook:
        return test_nb(
            notebook,
            skip_flags=config.tst_flags.split(),
            basepath=str(ROOT),
            profile=bool(config.exec_profile),
            cell_timeout=config.cell_timeout,
        )


def compare_by_numpy() -> None:
    "Let fastcore compare arrays as NumPy's: JAX would compile each comparison of each shape"
    import fastcore.imports
    import fastcore.test
    import jax
    import numpy as np

    def plain(value):
        if not isinstance(value, jax.Array): return value
        is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
        return value if is_key else np.asarray(value)

    def through(compare):
        return lambda a, b, *eps, **named: compare(plain(a), plain(b), *eps, **named)

    fastcore.test.is_close = through(fastcore.test.is_close)
    fastcore.test.equals = fastcore.imports.equals = through(fastcore.imports.equals)


def computes(page: Path) -> bool:
    "Whether the programs of a page run as long as they compile"
    return page.stem in LONG_PAGES


def run_alone(path: Path) -> bool:
    "Run one notebook in this process, which does nothing else, and print how it went"
    quick.settle()
    if computes(path):
        os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(PLAIN_FLAGS, FASTER_FLAGS)
    compare_by_numpy()
    try:
        passed, seconds = run_notebook(path)
    except Exception:
        traceback.print_exc()
        passed, seconds = False, 0.0
    name = path.relative_to(ROOT).as_posix()
    print(f"  {'pass' if passed else 'FAIL'} {seconds:6.1f} s  {name}", flush=True)
    return passed


def run_notebooks(options) -> Iterator[Outcome]:
    "Every cell of the notebooks that take seconds"
    pages = notebooks()
    if not pages: raise RuntimeError("there is no notebook under nbs/")
    unknown = (LONG_PAGES | SLOW_PAGES) - {p.stem for p in pages}
    if unknown: raise RuntimeError(f"no page is called {', '.join(sorted(unknown))}")
    if options.k: return run_pages([p for p in pages if options.k in p.as_posix()], options)
    return run_pages([p for p in pages if p.stem not in SLOW_PAGES], options)


def run_pages(paths: list[Path], options) -> Iterator[Outcome]:
    "Every cell of these notebooks, each in a process of its own"
    # forked from one that has imported everything, but has not let JAX look for devices
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks: context.set_forkserver_preload([*PRELOADED, *modules(ROOT / "hamux")])
    with ProcessPoolExecutor(options.workers, mp_context=context, max_tasks_per_child=1) as pool:
        runs = {pool.submit(run_alone, path): path for path in sorted(paths, key=computes)[::-1]}
        for run in as_completed(runs):
            try:
                passed = run.result()
            except Exception: # the process has died
                traceback.print_exc()
                passed = False
            yield runs[run].relative_to(ROOT).as_posix(), passed


def tested(options, *args: str, **env: str) -> Iterator[Outcome]:
    "What pytest finds with these arguments"
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp) / "report.xml"
        args = ["-m", "pytest", "-q", *args, f"--junitxml={report}"]
        args += ["-n", str(options.workers), "--dist", "worksteal"]
        if options.k: args += ["-k", options.k]
        status = subprocess.run(
            [sys.executable, *args],
            cwd=ROOT,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            timeout=None if options.thorough else 3600, # a run that hangs is one that fails
        ).returncode
        if status == 5 and options.k: return  # nothing here is called that, which is no failure
        cases = list(ET.parse(report).getroot().iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    yield "pytest", sum(c.find("skipped") is None for c in cases) - len(bad)
    for case in bad: yield f"{case.get('classname')}::{case.get('name')}", False
    # pytest can also stop without a failed test: an interrupted collection, no test at all, a
    # crashed worker
    if status and not bad: yield f"pytest, exit status {status}", False


def pytest(options) -> Iterator[Outcome]:
    "The tests but those marked slow; with -k or --thorough those as well"
    if options.thorough: return run_tests(options, "--thorough")
    return run_tests(options, *([] if options.k else ["-m", "not slow"]))


def run_tests(options, *args: str) -> Iterator[Outcome]:
    "Tests, and then those of which the last digits count: their programs must be those of users"
    digits = "tests/test_lagrangians.py"
    yield from tested(options, *args, f"--ignore={digits}", "tests")
    ours = os.environ["XLA_FLAGS"].startswith(PLAIN_FLAGS)
    yield from tested(options, *args, digits, **{"XLA_FLAGS": PLAIN_FLAGS} if ours else {})


def slow(options) -> Iterator[Outcome]:
    "The pages and the tests that take long one by one"
    yield from run_pages([p for p in notebooks() if p.stem in SLOW_PAGES and options.k in p.as_posix()], options)
    yield from run_tests(options, "-m", "slow")


def sample(options) -> Iterator[Outcome]:
    "A small part of each campaign"
    sizes = {"FILES": "2000", "KILLS": "5", "NETWORKS": "1"}
    return tested(options, "--thorough", "tests/thorough", **sizes)


STAGES = {
    "lint": lint,
    "generated": generated,
    "export": export,
    "notebooks": run_notebooks,
    "pytest": pytest,
    "slow": slow,
    "sample": sample,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STAGES,
        default=[stage for stage in STAGES if stage not in ("slow", "sample")],
        metavar="STAGE",
        help=f"{', '.join(STAGES)}; all but the last two if this is not given",
    )
    parser.add_argument(
        "-k",
        default="",
        help="only notebooks whose path contains this, and tests that pytest -k selects, slow or not",
    )
    parser.add_argument(
        "--thorough", action="store_true", help="pytest with slow tests and the campaigns of tests/thorough, some hours"
    )
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.chdir(ROOT)
    if "XLA_FLAGS" not in os.environ: os.environ["XLA_FLAGS"] = quick_flags()
    # and a program that one process compiled, another reads
    with tempfile.TemporaryDirectory() as tmp:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tmp)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        return run_stages(options)


def quick_flags() -> str:
    """Flags of XLA under which small programs compile soon, which is nearly all that tests take;
    give XLA_FLAGS= to have none"""
    emitters = "--xla_cpu_use_fusion_emitters=false" # of some versions only; the others abort
    known = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": emitters},
        capture_output=True,
    )
    return PLAIN_FLAGS if known.returncode else f"{PLAIN_FLAGS} {emitters}"


def run_stages(options) -> int:
    os.environ["MPLBACKEND"] = "Agg"  # a run with no display must not need one
    os.environ.pop("IN_TEST", None)   # nbdev exports nothing while this is set
    passed, failed = 0, []
    for stage in options.only:
        print(f"== {stage}", flush=True)
        start, count = time.perf_counter(), passed
        try:
            for name, outcome in STAGES[stage](options):
                passed += int(outcome)
                if outcome is False: failed.append(name)
        except Exception:
            traceback.print_exc()
            failed.append(f"{stage} (could not run)")
        print(
            f"== {stage}: {passed - count} passed in {time.perf_counter() - start:.1f} s\n",
            flush=True,
        )
    for name in failed: print(f"FAILED {name}")
    sys.stderr.flush()
    print(f"{passed} passed, {len(failed)} failed", flush=True)
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
