"""Change a function of another library, whether that library is imported already, later or never."""

import functools
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType

Callback = Callable[[ModuleType], None]


class _Watcher(MetaPathFinder):
    """Finds nothing itself: lets the other finders find a module and runs its callback after its code."""

    def __init__(self):
        self.callbacks: dict[str, Callback] = {}

    def find_spec(self, name, path, target=None):
        if name not in self.callbacks:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            callback, run = self.callbacks.pop(name), spec.loader.exec_module

            def exec_module(module):
                run(module)
                callback(module)

            spec.loader.exec_module = exec_module
        return spec


_watcher = _Watcher()


def when_imported(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` now if the module ``name`` is there, else right after it is imported, if ever."""
    if name in sys.modules:
        callback(sys.modules[name])
        return
    _watcher.callbacks[name] = callback
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)


def wrap_once(owner, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``wrapper`` of it, unless that has been done."""
    function = getattr(owner, name)
    if not hasattr(function, "mixdq_wrapped"):
        wrapped = functools.wraps(function)(wrapper(function))
        wrapped.mixdq_wrapped = True
        setattr(owner, name, wrapped)
