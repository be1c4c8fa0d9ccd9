#!/usr/bin/env python3
"""Export a page to hamux/ each time it is saved, from any editor. Stop with Ctrl-C."""

import subprocess
import sys
import time
from pathlib import Path

from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

ROOT = Path(__file__).resolve().parent.parent


class Export(FileSystemEventHandler):
    """nbdev's own `watch-export` hears only writes in place; Jupyter saves by moving a finished
    file over the old one"""

    def __init__(self): self.done: dict[Path, int] = {}

    def on_any_event(self, event):
        path = Path(event.dest_path or event.src_path)
        if (
            event.is_directory
            or path.suffix not in (".ipynb", ".qmd")
            or path.name.startswith((".", "tmp"))
            or not path.exists()
        ):
            return
        if (
            event.event_type not in ("created", "modified", "moved", "closed")
            or ".ipynb_checkpoints" in path.parts
        ):
            return
        saved = path.stat().st_mtime_ns
        if self.done.get(path) == saved: return  # one save is several events
        self.done[path] = saved
        # a process of its own: a page that does not parse must not stop the watching
        result = subprocess.run(
            [sys.executable, str(ROOT / "scripts/export.py")],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        said = (
            "exported"
            if result.returncode == 0
            else f"NOT exported: {result.stderr.strip().splitlines()[-1]}"
        )
        print(f"{path.relative_to(ROOT)}: {said}", flush=True)


if __name__ == "__main__":
    observer = Observer()
    observer.schedule(Export(), str(ROOT / "nbs"), recursive=True)
    observer.start()
    print("watching nbs/", flush=True)
    try:
        while observer.is_alive(): time.sleep(1)
    except KeyboardInterrupt:
        observer.stop()
    observer.join()
