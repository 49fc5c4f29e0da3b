"""What attnfast adds to parts of torch that it does not import itself: when somebody else does.

``torch.utils.flop_counter`` imports Triton, and ``torch.distributed.tensor`` takes seconds.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, function: Callable[[], None]) -> None:
    """Call a function once a module has been imported: now, where it has been already."""
    if name in sys.modules:
        _call(name, function)
    else:
        sys.meta_path.insert(0, _Finder(name, function))


class _Finder(MetaPathFinder):
    """Finds one module as the finders after it do, and calls a function after its code has run."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name, self.function = name, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]  # another copy of us may be there
        finds = (getattr(finder, "find_spec", None) for finder in others)
        specs = (find(fullname, path, target) for find in finds if find)
        spec: ModuleSpec | None = next(filter(None, specs), None)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _call(self.name, self.function)

        loader.exec_module = exec_module
        return spec


def _call(name: str, function: Callable[[], None]) -> None:
    """What is added to a module must not be what its import fails by."""
    try:
        function()
    except Exception as error:
        message = f"attnfast: nothing was added to {name}: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
