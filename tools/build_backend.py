"""What pip builds the package with: setuptools, or one line about how to get it.

pip's ``--no-build-isolation`` ignores which versions pyproject.toml asks for. Python 3.11 puts
setuptools 65 into a new virtual environment and 3.12 none, and what they say by themselves is a
traceback.
"""

import sys

NEEDED = 77  # the first that takes pyproject.toml's license = "Apache-2.0"; it has bdist_wheel, too
COMMAND = f"pip install 'setuptools>={NEEDED}' cmake ninja"


def missing() -> str | None:
    """Returns what is against building with this Python's setuptools; None where nothing is."""
    try:
        from setuptools import __version__ as found
    except Exception as error:  # Python 3.12 lacks what setuptools 65 imports
        none = isinstance(error, ModuleNotFoundError) and error.name == "setuptools"
        found = "none" if none else "one that this Python cannot import"
    else:
        if int(found.split(".")[0]) >= NEEDED:
            return None
    return f"vstar_kernels is built by setuptools {NEEDED} or later, and there is {found}"


if problem := missing():
    sys.exit(f"{problem}: {COMMAND}")

from setuptools.build_meta import *  # noqa: E402, F403
