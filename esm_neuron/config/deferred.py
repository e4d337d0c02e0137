"""Import a library without the parts that it imports and never calls here; these are imported when they are first used.

`import transformers` and `import peft` load torch's compiler, sympy, scikit-learn, accelerate and a list of all models:
four times the seconds of torch, of which an ESM-2 uses nothing. In a `window` such parts are stood in for while a
library is imported. Nothing broken is left behind:

- The stand-ins are in `sys.modules` during the window alone. Whoever imports such a part later gets the real one.
- A name taken from a stand-in (`from scipy.optimize import linear_sum_assignment`) is a `Deferred`, which imports the
  part when it is used in any way. As soon as somebody has imported the part, every module and every table that holds
  such a name is given the real object. Before that no object of a deferred class exists, so comparisons hold too.
- A package whose start is only postponed (`transformers`, which reads all its 2,000 files for their names) starts when
  somebody asks for a name of it.
- What is imported already is left as it is, and where the window fails, everything is imported in full, with a warning.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import itertools
import logging
import operator
import sys
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any
from unittest import mock

logger = logging.getLogger(__name__)


class Deferred:
    """Stands for a name of a module that is not imported yet; any use imports it."""

    def __init__(self, home: str, name: str) -> None:
        self._home, self._name = home, name
        _finder.held[home].append((self, self._real))

    def _real(self) -> Any:
        return _real(self._home, self._name)

    def __getattr__(self, name: str) -> Any:
        # typing and functools ask for names like __origin__ or __wrapped__ of whatever is annotated or decorated
        if (name.startswith("__") and name.endswith("__")) or name in _finder.absent:
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __instancecheck__(self, instance: Any) -> bool:
        # nothing can be an instance of a class whose package has not been imported
        return _finder.is_imported(self._home.partition(".")[0]) and isinstance(instance, self._real())

    def __subclasscheck__(self, kind: Any) -> bool:
        return issubclass(kind, self._real())

    def __or__(self, other: Any) -> Any:
        return typing.Union[self, other]  # noqa: UP007 - of an annotation

    def __ror__(self, other: Any) -> Any:
        return typing.Union[other, self]  # noqa: UP007

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real())

    def __repr__(self) -> str:
        return f"<{self._home}.{self._name}, not imported yet>"


def _forwarded(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(operator, name)(self._real(), *others)


for _name in ("getitem", "contains", "floordiv", "mul", "lt", "gt", "le", "ge"):  # of tables and numbers
    setattr(Deferred, f"__{_name}__", _forwarded(_name))


def decorator(home: str, name: str) -> Callable[..., Any]:
    """Return the stand-in of a decorator that matters to its own module alone, such as one for torch's compiler.

    What it is put on is called as it is until that module is imported, and is decorated then.
    """

    def decorate(function: Any = None, *args: Any, **kwargs: Any) -> Any:
        if function is None:
            return lambda function: decorate(function, *args, **kwargs)
        if not _finder.open:
            _finder.remove_stand_ins()  # see `spare`
        decorated = functools.cache(lambda: _real(home, name)(function, *args, **kwargs))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (decorated() if _finder.is_imported(home) else function)(*args, **kwargs)

        _finder.held[home].append((call, decorated))
        return call

    return decorate


def calls(times: int) -> Callable[[], None]:
    """Return the stand-in of a function that does nothing here; the last of some calls ends what `spare` began."""
    left = itertools.cycle(range(times - 1, -1, -1))

    def call() -> None:
        if next(left) == 0:
            _finder.remove_stand_ins()

    return call


class _StandIn(ModuleType):
    """Is imported in the place of a module while the window is open."""

    __path__: MutableSequence[str] = []  # noqa: RUF012 - a package without a folder

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return metadata.version(self.__name__)
        if name.startswith("__"):
            raise AttributeError(name)
        if not _finder.open:  # of `module`, or of a module that is held as a whole: `import sympy`
            if sys.modules.get(self.__name__) is self:
                _finder.remove_stand_ins()
            return _attribute(importlib.import_module(self.__name__), name)
        return vars(self).setdefault(name, Deferred(self.__name__, name))


class _Postponed(ModuleType):
    """A package whose `__init__` runs when somebody asks for a name of it; its modules are imported as always."""

    def __init__(self, spec: ModuleSpec, homes: Mapping[str, str]) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__loader__, self.__file__ = spec, spec.loader, spec.origin
        self.__package__, self.__path__ = spec.name, list(spec.submodule_search_locations or ())
        self._homes = homes
        self._started: ModuleType | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return metadata.version(self.__name__)
        if name.startswith("__"):
            raise AttributeError(name)
        if _finder.open and self._started is None:
            if name in self._homes:
                return _attribute(importlib.import_module(self._homes[name]), name)
            if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
                raise AttributeError(name)  # the import system then imports the submodule itself
            return Deferred(self.__name__, name)
        return getattr(self._start(), name)

    def _start(self) -> ModuleType:
        if self._started is None:
            spec, self._started = self.__spec__, self
            assert spec is not None and spec.loader is not None  # noqa: S101 - set in __init__
            with _finder.paused():
                spec.loader.exec_module(self)  # may put another module in its place, as transformers does
            self._started = sys.modules[self.__name__]
            _finder.put_real(self.__name__)
        if self._started is self:  # asked while it starts
            raise AttributeError(f"module {self.__name__!r} has not started")
        return self._started


def _real(home: str, name: str) -> Any:
    with _finder.paused():
        return _attribute(importlib.import_module(home), name)


def _attribute(module: ModuleType, name: str) -> Any:
    """Return what `from module import name` gives."""
    try:
        return getattr(module, name)
    except AttributeError:
        return importlib.import_module(f"{module.__name__}.{name}")


class _Finder(MetaPathFinder, Loader):
    """Gives stand-ins while the window is open; afterwards learns when one of their modules is imported."""

    def __init__(self) -> None:
        self.open = False
        self.parts: Mapping[str, Mapping[str, Any]] = {}
        self.absent: frozenset[str] = frozenset()
        self.held: defaultdict[str, list[tuple[Any, Callable[[], Any]]]] = defaultdict(list)
        """Module -> stand-ins for it and its names, each with the function that returns the real object."""
        self.waiting: defaultdict[str, list[Callable[[], object]]] = defaultdict(list)
        self.spared: defaultdict[str, dict[CodeType, Mapping[str, Any]]] = defaultdict(dict)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not self.open:
            names = self.spared[name].get(_importer()) if name in self.spared else None
            if names is not None:
                return ModuleSpec(name, self, is_package=True, loader_state=names)
            return self._watched(name, path) if name in self.held or name in self.waiting else None
        if not any(name == part or name.startswith(f"{part}.") for part in self.parts):
            return None
        if "." not in name and self._real_spec(name, path) is None:
            return None  # transformers asks in this way whether it is installed
        return ModuleSpec(name, self, is_package=True, loader_state=self.parts.get(name, {}))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        made = _StandIn(spec.name)
        vars(made).update(spec.loader_state)
        self.held[spec.name].append((made, lambda: sys.modules[spec.name]))
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stand-in finds its names when it is asked."""

    def _real_spec(self, name: str, path: Any) -> ModuleSpec | None:
        others = (finder for finder in sys.meta_path if finder is not self)
        return next((spec for finder in others if (spec := finder.find_spec(name, path)) is not None), None)

    def _watched(self, name: str, path: Any) -> ModuleSpec | None:
        spec = self._real_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.put_real(name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign] # of this loader alone, which is new
        return spec

    def is_imported(self, name: str) -> bool:
        """Return whether the real module is there."""
        return name in sys.modules and not isinstance(sys.modules[name], _StandIn)

    def put_real(self, name: str) -> None:
        """Put real objects in the place of the module's stand-ins, and call who waits for it."""
        held = self.held.pop(name, [])
        reals = {id(stand_in): real for stand_in, real in held}
        # one look at all objects for all stand-ins; dicts are those of modules, classes and objects, and tables
        tables = [names for names in gc.get_referrers(*(stand_in for stand_in, _ in held)) if isinstance(names, dict)]
        owners = _classes(tables) if tables else {}
        for names in tables:
            for key in [key for key, value in names.items() if id(value) in reals]:
                # a name that the module lacks was asked for in `try: ... except ImportError`, and is not used
                with suppress(ImportError):
                    _put(names, key, reals[id(names[key])](), owners.get(id(names)))
        for call in self.waiting.pop(name, ()):
            call()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Import real modules within the block."""
        was, self.open = self.open, False
        if was:
            self.remove_stand_ins()
        try:
            yield
        finally:
            self.open = was

    def remove_stand_ins(self) -> None:
        """Take stand-ins out of `sys.modules`, their packages, and what lazy modules remember of them."""
        for name, module in list(sys.modules.items()):
            if isinstance(module, _StandIn):
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
                    delattr(sys.modules[parent], child)
            elif isinstance(module, ModuleType) and type(module) is not ModuleType:
                for key in [key for key, value in vars(module).items() if isinstance(value, Deferred)]:
                    del vars(module)[key]  # transformers' `_LazyModule` finds it again when it is asked


def _classes(tables: Sequence[dict[Any, Any]]) -> dict[int, type]:
    """Return the id of each table of names that is a class's -> the class."""
    classes = (owner for owner in gc.get_referrers(*tables) if isinstance(owner, type))
    return {id(names): owner for owner in classes for names in gc.get_referents(owner) if isinstance(names, dict)}


def _put(names: dict[Any, Any], key: Any, real: Any, owner: type | None) -> None:
    """Put an object in the place of a stand-in; in a class by `setattr`.

    Python remembers where it found a class's names. Past `setattr` it would go on with the stand-in, which is freed.
    """
    if owner is None:
        names[key] = real
    else:
        setattr(owner, key, real)


def _importer() -> CodeType:
    """Return the code of the function whose import statement is at work."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code


_finder = _Finder()


@contextmanager
def window(
    parts: Mapping[str, Mapping[str, Any]],
    *,
    postponed: Mapping[str, Mapping[str, str]] | None = None,
    replaced: Mapping[str, Mapping[str, Any]] | None = None,
    absent: Sequence[str] = (),
    optional: bool = False,
) -> Iterator[None]:
    """Have what is imported in the block leave out some parts.

    Args:
        parts: module or package -> its names that are used in the block -> what stands in for them.
        postponed: package whose start is postponed -> name of it that is asked for in the block -> its module.
        replaced: module -> its names that have another value in the block.
        absent: names that deferred objects are asked for (`hasattr`) and that none of them has.
        optional: an error ends the block and is only logged; the same is then imported in full.
    """
    _finder.parts = {part: names for part, names in parts.items() if part not in sys.modules}
    _finder.absent = frozenset(absent)
    for name, homes in (postponed or {}).items():
        if name not in sys.modules and (spec := importlib.util.find_spec(name)) is not None:
            sys.modules[name] = package = _Postponed(spec, homes)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, package)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.open = True
    try:
        with ExitStack() as patches:
            for name, values in (replaced or {}).items():
                patches.enter_context(mock.patch.multiple(importlib.import_module(name), **values))
            yield
    except Exception as error:  # whatever a library of another version does with a stand-in
        if not optional:
            raise
        logger.warning("libraries are imported in full, which takes seconds longer: %r", error)
    finally:
        _finder.open = False
        _finder.remove_stand_ins()


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage in the block: imports make none, and looking takes a sixth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def module(name: str) -> Any:
    """Return what stands for a module, and imports it when it is asked for a name."""
    return _StandIn(name)


def spare(importer: CodeType, name: str, names: Mapping[str, Any]) -> None:
    """Give a stand-in with these names to one function that imports a module, and to it alone.

    They are `decorator`s or of `calls`, which take the stand-in out of `sys.modules` again.
    """
    _finder.spared[name][importer] = names


def when_imported(name: str, call: Callable[[], object]) -> None:
    """Call a function as soon as a module has been imported, now if it is there."""
    if name in sys.modules:
        call()
    else:
        _finder.waiting[name].append(call)
