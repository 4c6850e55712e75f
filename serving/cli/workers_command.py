"""``penstock workers``."""

from __future__ import annotations

import click


@click.command("workers")
def command() -> None:
    from penstock.workers.app import main  # brings in Ray: not before the arguments were read

    main()
