#!/usr/bin/env python3
"""Generate settings.ini from pyproject.toml; with `--check`, fail if it has drifted."""

import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlparse

from generated import Files, main

HEADER = """\
# Generated from pyproject.toml by scripts/sync_dependencies.py: edit pyproject.toml, then run the script.
# Read by nbdev 2 and older fastai tooling only; nbdev 3 and pip read pyproject.toml and ignore this file.
"""
NBDEV2_LICENSES = {"Apache-2.0": "apache2", "MIT": "mit", "BSD-3-Clause": "bsd3"}


def version(root: Path, project: dict, tool: dict) -> str:
    "The version, from the attribute that setuptools reads it from, without importing the package"
    if "version" in project: return project["version"]
    module, name = tool["setuptools"]["dynamic"]["version"]["attr"].rsplit(".", 1)
    source = (root / module.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    if found := re.search(rf"^{name}\s*=\s*['\"]([^'\"]+)['\"]", source, re.M): return found[1]
    raise SystemExit(
        f"{module}/__init__.py has no `{name} = \"…\"`, which pyproject.toml says holds the version"
    )


def expand(extra: str, project: dict) -> list[str]:
    "The requirements of an extra, with `hamux[a,b]` replaced by what those extras require"
    requirements: list[str] = []
    for requirement in project["optional-dependencies"][extra]:
        itself = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
        for r in (
            [r for e in itself[1].split(",") for r in expand(e.strip(), project)]
            if itself
            else [requirement]
        ):
            if r not in requirements: requirements.append(r)
    return requirements


def classifier(project: dict, prefix: str) -> str:
    return next(
        (c.removeprefix(prefix) for c in project["classifiers"] if c.startswith(prefix)), ""
    )


def settings(root: Path) -> dict[str, str]:
    "The keys that nbdev 2 expects, in its own order"
    config = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project, tool = config["project"], config["tool"]
    nbdev = {
        "nbs_path": "nbs",
        "doc_path": "_docs",
        "lib_path": project["name"].replace("-", "_"),
        "branch": "main",
        "title": project["name"],
        "custom_sidebar": False,
    } | tool["nbdev"]
    repository, docs = (project["urls"][k] for k in ("Repository", "Documentation"))
    user, repo = urlparse(repository).path.strip("/").split("/")[:2]
    return {
        "repo": repo,
        "lib_name": project["name"],
        "version": version(root, project, tool),
        "min_python": project["requires-python"].lstrip(">= "),
        "license": NBDEV2_LICENSES[project["license"]],
        "doc_path": nbdev["doc_path"],
        "lib_path": nbdev["lib_path"],
        "nbs_path": nbdev["nbs_path"],
        "recursive": "True",
        "tst_flags": "notest",
        "put_version_in_init": "True",
        "branch": nbdev["branch"],
        "custom_sidebar": str(nbdev["custom_sidebar"]),
        "doc_host": "{0.scheme}://{0.netloc}".format(urlparse(docs)),
        "doc_baseurl": "/" + urlparse(docs).path.strip("/"),
        "git_url": repository,
        "title": nbdev["title"],
        "audience": classifier(project, "Intended Audience :: "),
        "author": project["authors"][0]["name"],
        "author_email": project["authors"][0].get("email", ""),
        "copyright": project["authors"][0]["name"],
        "description": project["description"],
        "keywords": " ".join(k.replace(" ", "-") for k in project["keywords"]),
        "language": "English",
        "status": classifier(project, "Development Status :: ")[:1],
        "user": user,
        "requirements": " ".join(project["dependencies"]),
        "dev_requirements": " ".join(expand("dev", project)),
        "console_scripts": "\n    ".join(
            f"{name}={target}" for name, target in project["scripts"].items()
        ),
    }


def build(root: Path) -> Files:
    lines = [f"{k} = {v}".replace("%", "%%").rstrip() for k, v in settings(root).items()]
    return {"settings.ini": (HEADER + "\n[DEFAULT]\n" + "\n".join(lines) + "\n").encode()}


if __name__ == "__main__": sys.exit(main(build, __doc__))
