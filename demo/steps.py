"""What the demos share: headings, and `cxr` commands that are shown before they run."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

CXR = str(Path(sys.executable).with_name("cxr"))


def step(title: str) -> None:
    """Print a heading."""
    print(f"\n== {title}", flush=True)


def show(*arguments: object) -> list[str]:
    """Print a `cxr` command, and return its words."""
    words = [str(argument) for argument in arguments]
    print(f"$ cxr {shlex.join(words)}", flush=True)
    return [CXR, *words]


def cxr(*arguments: object) -> None:
    """Show a `cxr` command, and run it; a failure ends the demo."""
    if code := subprocess.run(show(*arguments), check=False).returncode:
        sys.exit(code)


def load_json(path: Path) -> Any:
    """A JSON file's content."""
    return json.loads(path.read_bytes())
