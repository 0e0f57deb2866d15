"""`moe_jax.explain` as a table for people."""

from rich import box
from rich.markup import escape
from rich.table import Table

from moe_jax.explanation import Explanation


def chosen(explanations: list[Explanation]) -> dict[str, str]:
    """For each op the implementation that runs: the first that has no reason against it."""
    running: dict[str, str] = {}
    for item in explanations:
        if item.reason is None:
            running.setdefault(item.op, item.implementation)
    return running


def explanation_table(explanations: list[Explanation]) -> Table:
    """Every op's implementations, in the order in which they are tried, and why one does not apply."""
    table = Table(title="what implementation='auto' runs, and why", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("op", "implementation", "runs", "reason"):
        table.add_column(column)
    running = chosen(explanations)
    previous = None
    for item in explanations:
        if item.reason is not None:
            runs, reason = "no", item.reason
        elif running[item.op] == item.implementation:
            runs, reason = "yes", "the first that applies"
        else:
            runs, reason = "no", "applies, but comes after"
        table.add_row(item.op if item.op != previous else "", item.implementation, runs, escape(reason))
        previous = item.op
    return table
