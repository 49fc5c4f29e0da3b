"""What pip asks before it builds: setuptools answers, and torch is fetched only if there is none.

torch's headers are needed to build. Named in pyproject.toml, torch would be downloaded into every
isolated build, whether or not it is installed.
"""

from __future__ import annotations

import sys
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

from . import build


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What a build needs beside pyproject.toml's list."""
    requires: list[str] = build_meta.get_requires_for_build_wheel(config_settings)
    if sys.platform == "linux" and build.torch_folder() is None:
        requires.append(f"torch>={'.'.join(map(str, build.OLDEST_TORCH))}")
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel
