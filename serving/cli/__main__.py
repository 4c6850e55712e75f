"""``python -m penstock.serving.cli``: the command line where no ``penstock`` script is installed."""

from __future__ import annotations

from penstock.serving.cli import main

if __name__ == "__main__":
    main()
