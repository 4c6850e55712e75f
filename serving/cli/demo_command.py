"""``penstock demo``; every option can also be given as a variable, as ``make demo`` does."""

from __future__ import annotations

import sys
from typing import Literal

import click

from penstock.serving.demo.guard import run_demo
from penstock.serving.demo.options import DemoOptions

_DEFAULT = DemoOptions()


@click.command("demo")
@click.option(
    "--queue",
    type=click.Choice(["redis", "kafka"]),
    default=_DEFAULT.queue,
    envvar="QUEUE",
    show_default=True,
)
@click.option("--model", default="", envvar="MODEL", help="Folder or hub name; the bundled demo model if not given.")
@click.option("--prompt", default=_DEFAULT.prompt, envvar="PROMPT", show_default=True, help="What to ask it.")
@click.option("--once", is_flag=True, envvar="ONCE", help="End after the answer.")
@click.option("--prefill", type=click.IntRange(1), default=1, show_default=True, help="Prefill engines.")
@click.option("--decode", type=click.IntRange(1), default=1, show_default=True, help="Decode engines.")
@click.option("--mixed", type=click.IntRange(0), default=0, help="Engines that do both, instead of the other two.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of the API; a free one if not given.")
def command(
    queue: Literal["redis", "kafka"],
    model: str,
    prompt: str,
    once: bool,
    prefill: int,
    decode: int,
    mixed: int,
    port: int,
) -> None:
    sys.exit(run_demo(DemoOptions(queue, model, prompt, once, prefill, decode, mixed, port)))
