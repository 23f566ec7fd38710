"""What computed a run: versions, the program's digest and commit."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from config import PROGRAM_FOLDER


def output(*command: str) -> str:
    """What a program says, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """Versions of what computed the run."""
    import timm
    import torch
    import torchvision
    return {"python": sys.version.split()[0],  # str: torch's own version is an object that no safe reader would take
            **{module.__name__: str(module.__version__) for module in (torch, torchvision, timm)}}


def program_digest(root: str = PROGRAM_FOLDER) -> str:
    """Digest of this program's own source files, their places included, in the folders of ``root`` and all below them."""
    digest = hashlib.sha256()
    rooms = [path for folder in ("models", "data", "utils") for path in (Path(root) / folder).rglob("*.py")]
    for path in sorted([*Path(root).glob("*.py"), *rooms]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def git_commit() -> str:
    """The commit this program is at, or nothing outside a checkout."""
    return output("git", "-C", PROGRAM_FOLDER, "rev-parse", "HEAD")
