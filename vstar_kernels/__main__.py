"""``python -m vstar_kernels``."""

import sys

from vstar_kernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
