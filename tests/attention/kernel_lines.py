"""The statements of Triton kernels, which tests watch being interpreted."""

import ast
import functools
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def watched(*modules):
    """Gives what lists the statements of the modules' kernels that have not run, as "file:line"."""
    files = {module.__file__ for module in modules}
    missing = {place for module in modules for place in _statements(module)}
    lines_of = functools.cache(lambda code: {(code.co_filename, x) for *_, x in code.co_lines()})

    def trace(frame, event, _):
        file = frame.f_code.co_filename
        if file not in files:
            return None
        missing.discard((file, frame.f_lineno))
        # A function whose lines have all been seen is not watched: that takes most of the time.
        if event == "call" and missing.isdisjoint(lines_of(frame.f_code)):
            return None
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: sorted(f"{Path(file).name}:{line}" for file, line in missing)
    finally:
        sys.settrace(before)


def _statements(module):
    """(file, line) of every statement in the module's kernels but their docstrings."""
    kernels = [
        node
        for node in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    ]
    assert kernels
    return {
        (module.__file__, statement.lineno)
        for kernel in kernels
        for statement in ast.walk(kernel)
        if isinstance(statement, ast.stmt) and statement is not kernel and not _is_text(statement)
    }


def _is_text(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
