"""Rows leave shared memory from where copies may begin: a GPU ends a kernel otherwise, the interpreter does not."""

import jax
import pytest

from moe_jax.kernels.hopper.views import LINE, send_first


@pytest.mark.parametrize("row_bytes", [64, 128])
@pytest.mark.parametrize("most", [32, 128])
def test_copies_of_rows(row_bytes, most):
    @jax.jit
    def run(size):
        send_first(
            lambda first, count: jax.debug.callback(lambda first: sent.append((int(first), count)), first),
            size,
            most,
            row_bytes=row_bytes,
        )

    for size in range(-1, most + 2):
        sent: list[tuple[int, int]] = []
        run(size)
        jax.effects_barrier()
        rows = sorted(row for first, count in sent for row in range(first, first + count))
        assert rows == list(range(min(max(size, 0), most))), (size, sent)
        assert not any(first * row_bytes % LINE for first, _ in sent), (size, sent)
