"""``penstock dispatcher``."""

from __future__ import annotations

import click


@click.command("dispatcher")
def command() -> None:
    from penstock.workers.dispatch_process import main

    main()
