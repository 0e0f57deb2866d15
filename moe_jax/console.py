"""How the commands print, and how they end when something is wrong."""

import os

import typer
from rich.console import Console
from rich.markup import escape


def console(stderr: bool = False) -> Console:
    """The terminal; piped into a file or a CI log there is none to measure, and lines are wide enough for the tables."""
    wide = not os.environ.get("COLUMNS") and not Console(stderr=stderr).is_terminal
    return Console(stderr=stderr, width=140 if wide else None)


def fail(message: str, code: int) -> typer.Exit:
    """Prints an error; to be raised."""
    console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)
    return typer.Exit(code)
