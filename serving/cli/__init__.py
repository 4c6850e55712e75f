"""The command line. ``penstock --help`` imports click and nothing else; each command is one module,
imported when used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version

import click

COMMANDS = {
    "demo": "Run the whole stack on this machine and stream an answer.",
    "ingress": "Serve the OpenAI-compatible API.",
    "workers": "Run the engines and the dispatcher on a local Ray.",
    "engine": "Run one engine by itself, without Ray.",
    "dispatcher": "Run one dispatcher by itself, without Ray.",
    "batch": "Submit, watch and fetch asynchronous batch jobs, or run one here.",
    "keys": "Create, list and revoke API keys.",
    "queue": "Look into the queue.",
    "dead-letters": "List, show, retry and drop requests that were given up.",
    "bench": "Compare benchmark results.",
    "config": "Print the effective settings, their names and where each comes from.",
}
"""Name -> what ``--help`` says. The module is ``penstock.serving.cli.<name>_command``, the command its
``command``.
"""


class _LazyGroup(click.Group):
    """A group that knows its commands' names and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name.replace('-', '_')}_command").command
        command.help = COMMANDS[cmd_name]
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("penstock"), prog_name="penstock")
def cli() -> None:
    """Queue-driven, distributed LLM inference on Ray."""


def main() -> None:
    """Run one command. Exit codes: 0 done, 1 it failed, 2 wrong usage or settings."""
    try:
        cli()
    except Exception as error:
        from penstock.serving.cli.failures import explain

        explained = explain(error)
        if explained is None:
            raise
        click.echo(f"penstock: {explained.message}", err=True)
        sys.exit(explained.exit_code)
