"""What the scripts that generate files share: write them, or with `--check` say how they have
drifted."""

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Files = dict[str, bytes]  # path from the root, contents


def drift(files: Files, root: Path = ROOT) -> str:
    "A diff from what is on disk to what should be; empty where they agree"
    parts = []
    for name, wanted in files.items():
        path = root / name
        found = path.read_bytes() if path.exists() else b""
        if found == wanted: continue
        try:
            old, new = (text.decode().splitlines(keepends=True) for text in (found, wanted))
        except UnicodeDecodeError:
            old, new = [], [f"binary file of {len(wanted)} bytes\n"]
        parts += difflib.unified_diff(old, new, f"{name} (on disk)", f"{name} (as generated)")
    return "".join(parts)


def write(files: Files, root: Path = ROOT):
    for name, contents in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(contents)


def main(build: Callable[[Path], Files], description: str, root: Path = ROOT) -> int:
    "The command line of a script whose files `build(root)` returns"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 with a diff if anything has drifted",
    )
    check = parser.parse_args().check
    files = build(root)
    names = ", ".join(files)
    if not check:
        write(files, root)
        print(f"wrote {names}")
        return 0
    if diff := drift(files, root):
        print(
            f"{diff.rstrip()}\n\n{names}: out of step. Run `python"
            f" scripts/{Path(sys.argv[0]).name}` and commit the result."
        )
        return 1
    print(f"{names}: in step")
    return 0
