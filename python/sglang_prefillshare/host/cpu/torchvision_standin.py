"""A stand-in for torchvision's transforms, for CPU hosts that have no torchvision.

SGLang imports `torchvision.transforms` at start-up for its image models, and no package registry carries a torchvision
that was built for CPU torch. Text models never call it. The stand-in makes the import succeed and every use of it
fail with a message that says what to install.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

_ROOT = "torchvision"


class _Absent:
    """Whatever SGLang imports by name; calling or subclassing-and-building it says that torchvision is missing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise ImportError(
            "this needs torchvision, which is not installed here. Install a torchvision build that matches your "
            "torch; text models do not need it."
        )


class _StandInModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Absent,), {}) if name[0].isupper() else _refuse


class _Modes(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name.lower()


class InterpolationMode(metaclass=_Modes):
    """Named modes that SGLang's model configurations read while they are imported."""


def _refuse(*_args: Any, **_kwargs: Any) -> None:
    _Absent()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name == _ROOT or name.startswith(_ROOT + "."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _StandInModule(spec.name)
        vars(module)["InterpolationMode"] = InterpolationMode
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def install_if_absent() -> None:
    """Let `import torchvision` find the stand-in, unless a real one is installed."""
    if importlib.util.find_spec(_ROOT) is not None:
        return
    from transformers.utils import import_utils

    # Transformers remembers the answer; asked after the stand-in is there, it would look for a version of it.
    assert not import_utils.is_torchvision_available()
    sys.meta_path.append(_Finder())
