"""`python -m graphwright`: the command line, where its script is not on the path."""

from __future__ import annotations

from .compiler.cli import main

if __name__ == "__main__":
    main()
