"""`python -m paca`: the program `paca`, where that is not on the path. Python imports the whole package first."""

from __future__ import annotations

import sys

from paca.cli import main

if __name__ == "__main__":
    sys.argv[0] = "paca"  # what the records of a run call it
    main()
