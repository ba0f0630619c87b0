"""Imports a plug-in's class, and sees to it that `sglang` can be imported for that.

Called once by the backend's `open`, in a storage process.  Three cases:

    SGLang is installed and imports    its modules are used
    its packages beside it are missing    (pip install --no-deps) its modules are used one by one: the package `sglang`
                                       is put in place without running its first file, which imports all of SGLang
    it is not installed                a stand-in takes the names of the modules that plug-ins import their interface
                                       from, so that a plug-in of one's own does not need an installation of 10 GB
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sglang_hicache.errors import StorageError
from sglang_hicache.storage import plugin_interface
from sglang_hicache.storage.dynamic_settings import ALIASES
from sglang_hicache.storage.plugin_calls import careful

_INTERFACE = "sglang.srt.mem_cache.hicache_storage"

#: Packages of the stand-in, and its modules with what is in them.
_PACKAGES = ("sglang", "sglang.srt", "sglang.srt.mem_cache")
_HOST_POOL = {"HostKVCache": plugin_interface.HostKVCache}
_MODULES = {
    _INTERFACE: {name: value for name, value in vars(plugin_interface).items() if not name.startswith("_")},
    "sglang.srt.mem_cache.memory_pool_host": _HOST_POOL,
    "sglang.srt.mem_cache.pool_host": _HOST_POOL,
}


def interface_blocking() -> ModuleType:
    """The module of the interface: SGLang's, or what stands in for it."""
    if _INTERFACE not in sys.modules:
        if is_installed():
            _import_sglang_blocking()
        else:
            _stand_in()
    return importlib.import_module(_INTERFACE)  # lazy door: SGLang costs seconds, and may not be there


def is_installed() -> bool:
    """Is there a package?  A folder of its name without a first file is none: somebody's copy of its repository, most
    often, in the folder where the server was started."""
    if "sglang" in sys.modules:
        return True
    found = importlib.util.find_spec("sglang")
    return found is not None and found.origin is not None


def class_blocking(module_path: str, class_name: str, backend_name: str) -> type[Any]:
    """The plug-in's class; the interface has been imported.  StorageError: what is missing, or what it raised."""
    try:
        module = careful("its module", importlib.import_module, module_path)  # lazy door: the operator names it
        found = careful("its module", getattr, module, class_name, None)
    except StorageError as error:
        raise _not_imported(module_path, backend_name, error.__cause__) from error.__cause__
    if not isinstance(found, type):
        raise StorageError(f"the module {module_path} has no class {class_name}", "refused", "bad_config")
    return found


def _import_sglang_blocking() -> None:
    try:
        importlib.import_module("sglang")  # lazy door: as above
    except ImportError:
        spec = importlib.util.find_spec("sglang")
        assert spec is not None, "it was there a moment ago"
        bare = importlib.util.module_from_spec(spec)
        bare.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["sglang"] = bare


def _stand_in() -> None:
    """Register the modules; a package without a path has no others."""
    for name in (*_PACKAGES, *_MODULES):
        module = ModuleType(name, "Stands in for SGLang's module of this name; see sglang_hicache.storage.")
        module.__spec__ = ModuleSpec(name, None, is_package=name in _PACKAGES)
        if name in _PACKAGES:
            module.__path__ = []
        vars(module).update(_MODULES.get(name, {}))
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            vars(sys.modules[parent])[own] = module


def _not_imported(module_path: str, backend_name: str, error: BaseException | None) -> StorageError:
    if isinstance(error, ImportError):
        return _missing(module_path, backend_name, error)
    if isinstance(error, SystemExit):
        return StorageError(f"the plug-in {module_path} ends the process that imports it", "refused")
    return StorageError(f"the plug-in {module_path} cannot be imported: {type(error).__name__}: {error}", "refused")


def _missing(module_path: str, backend_name: str, error: ImportError) -> StorageError:
    """What to install: the package that the plug-in asked for, or the one that it is a part of."""
    what = error.name or str(error)
    text = f"the plug-in {module_path} needs {what!r}, which cannot be imported here ({error})"
    if backend_name in ALIASES:
        needs = ALIASES[backend_name].needs
        text += f": {backend_name} is a part of SGLang (pip install sglang)" + (f" and needs {needs}" if needs else "")
    elif what.partition(".")[0] == module_path.partition(".")[0]:
        text += ": install it, or name its folder in PYTHONPATH"
    return StorageError(text, "refused", "missing_library")
