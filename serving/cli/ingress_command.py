"""``penstock ingress``."""

from __future__ import annotations

import click


@click.command("ingress")
def command() -> None:
    from penstock.serving.ingress import main  # brings in vLLM: not before the arguments were read

    main()
