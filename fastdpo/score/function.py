"""Scorers that are functions of the user's own: found by name, and their faults shown in their own
lines.

What such a function raises is a traceback that begins where its code does. What it returns that is
no score is shown with the line that defines it.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdpo.errors import ConfigError

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_IMPORTING = ("<frozen importlib", importlib.__file__, __file__)


def load_function(spec: str) -> Callable[..., Any]:
    """The function of ``module:function`` or ``path/to/file.py:function``.

    Modules in the working directory are found too, and those beside the file.

    Raises ConfigError when there is none, or its module can't be imported: then with the traceback
    of the module's own lines.
    """
    module_name, colon, name = spec.rpartition(":")
    if not colon:
        raise ConfigError(f"scorer {spec!r} names no function in the file. Write {spec}:function.")
    is_file = module_name.endswith(".py")
    # The command line tool starts without the working directory; at the end it hides nothing.
    places = {"", os.getcwd()} if not is_file else {str(Path(module_name).resolve().parent)}
    if not places & set(sys.path):
        sys.path.append(max(places))
    try:
        module = _of_file(module_name) if is_file else importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"scorer {spec!r}: module {module_name!r} can't be imported "
            f"({type(error).__name__}: {error}). Check the name, or run where its file lies."
            + own_lines(error, skip=_IMPORTING)
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"scorer {spec!r}: module {module_name!r} has no function {name!r}. "
            "Write module:function."
        )
    return function


def _of_file(path: str) -> Any:
    """The module of a file, under a name that no other file has."""
    place = Path(path).resolve()
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:8]
    name = f"fastdpo_scorer_{place.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # by its suffix
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_lines(error: BaseException, skip: tuple[str, ...]) -> str:
    """The traceback of an exception from the first frame on whose file is not to be skipped, to
    stand below a message; "" where fastdpo itself raised it.

    Args:
        skip: beginnings of names of files.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(skip):
        trace = trace.tb_next
    if trace is None and not isinstance(error, SyntaxError):  # which has its line with it
        return ""
    if trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        return ""
    return "\n" + "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def defined_at(function: Any) -> str:
    """The line that begins a function, as a traceback has it, to stand below a message; "" where it
    is not known, or in fastdpo."""
    function = inspect.unwrap(function)
    if not inspect.isroutine(function):  # an object with a __call__
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    if code is None or code.co_filename.startswith(_PACKAGE):
        return ""
    place = traceback.FrameSummary(code.co_filename, code.co_firstlineno, code.co_name)
    return "\n" + "".join(traceback.format_list([place])).rstrip()
