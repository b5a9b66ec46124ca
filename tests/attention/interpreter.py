"""Triton's interpreter, without most of its work."""

import dataclasses
from unittest import mock

from triton.runtime import interpreter


def leave_out_the_needless():
    """Spares it what it does again and again, and what it does for results that it drops.

    It puts its own functions into ``triton.language`` for a launch, and once more, to no effect,
    whenever one Triton function calls another. And it looks for overflows of every sum and product
    of integers, but says nothing of those it finds, as nobody asked it to debug.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done = set()

    def patch_once(function):
        module = id(function.__globals__)
        if module not in done:
            done.add(module)
            return patch(function)
        return None

    def launch_anew(self, *args, **options):
        done.clear()
        return launch(self, *args, **options)

    mock.patch.object(interpreter, "_patch_lang", patch_once).start()
    mock.patch.object(interpreter.GridExecutor, "__call__", launch_anew).start()
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
