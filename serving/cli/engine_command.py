"""``penstock engine``."""

from __future__ import annotations

import click


@click.command("engine")
@click.option("--role", type=click.Choice(["mixed", "prefill", "decode"]), default="mixed", show_default=True)
@click.option("--node", default="127.0.0.1", show_default=True, help="Address at which others reach this engine.")
def command(role: str, node: str) -> None:
    from penstock.workers.engine_process import main

    main(role, node)
