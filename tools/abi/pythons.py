"""Find an installed Python of a given version."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PROBE = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"


def find(version: str) -> Path | None:
    """The path of a Python such as "3.13" that runs and can make a venv, or None."""
    return next((path for path in candidates(version) if answers(path, version)), None)


def candidates(version: str) -> list[Path]:
    """Where that version may be: the PATH first, then the version managers' folders."""
    home = Path.home()
    environment = os.environ.get
    data = Path(environment("XDG_DATA_HOME") or home / ".local/share")
    folders = [
        (Path(environment("PYENV_ROOT") or home / ".pyenv") / "versions", f"{version}.*"),
        (Path(environment("UV_PYTHON_INSTALL_DIR") or data / "uv/python"), f"cpython-{version}.*"),
        (Path(environment("ASDF_DATA_DIR") or home / ".asdf") / "installs/python", f"{version}.*"),
        (Path(environment("MISE_DATA_DIR") or data / "mise") / "installs/python", f"{version}*"),
        (home / "miniconda3/envs", "*"),
        (home / "miniforge3/envs", "*"),
        (Path("/opt/python"), f"cp{version.replace('.', '')}-*"),
    ]
    name = f"python{version}"
    on_path = shutil.which(name)
    found = [Path(on_path)] if on_path else []
    for folder, pattern in folders:
        found.extend(path / "bin" / name for path in sorted(folder.glob(pattern)))
    return found


def answers(path: Path, version: str) -> bool:
    """Whether it runs, as the version it is named for, and has venv and ensurepip.

    A version manager's shim exists for versions that are not active, and then only complains.
    """
    try:
        done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, timeout=30)
    except OSError:
        return False
    return done.stdout.strip() == version
