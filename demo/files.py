"""Files of text that a user gives; output files appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo.command import UsageError


def read_text(path: Path, option: str) -> str:
    """A UTF-8 file that is not blank.

    Args:
        path: the file.
        option: whose value it is, for errors.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or is blank.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{option}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option}: {path} is not UTF-8 text") from error
    if not text.strip():
        raise UsageError(f"{option}: {path} is empty")
    return text


def output_folder(path: Path) -> Path:
    """Create the folder for results if need be.

    Raises:
        UsageError: it cannot be created, or not written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UsageError(f"--out: cannot write to {path}: {error.strerror}") from error
    return path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed at the end, removed if that fails."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Everything that a demo measured."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1))
