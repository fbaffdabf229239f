"""`python -m keeptune` is the same as `keeptune`."""

from __future__ import annotations

import sys

from keeptune.cli import main

if __name__ == "__main__":
    sys.exit(main())
