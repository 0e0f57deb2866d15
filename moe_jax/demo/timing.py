"""How the demo takes times, the same way on both sides."""

import statistics
import time
from collections.abc import Callable

# On a busy machine a call can take a hundred times longer than it should (threads that wait for one another while
# something else has their core). Then fewer calls are timed, and the demo still ends within a minute.
_BUDGET_SECONDS = 1.0


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of up to ``repeats`` calls, at least one, after one that does not count. ``call`` returns when it is done.

    Example:
        >>> calls = []
        >>> median_seconds(lambda: calls.append(1), 5) >= 0, len(calls)
        (True, 6)
    """
    call()
    times: list[float] = []
    while len(times) < repeats and sum(times) < _BUDGET_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
