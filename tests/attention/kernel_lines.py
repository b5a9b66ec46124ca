"""The statements of Triton kernels, which tests watch being interpreted."""

import ast
from pathlib import Path


def statements(module):
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
