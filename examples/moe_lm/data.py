"""Text that every Python has: the sources of its standard library, as bytes."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np


def stdlib_bytes(limit: int = 20_000_000) -> np.ndarray:
    """The `.py` files of the standard library one after the other, uint8; tests and installed packages are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    parts, size = [], 0
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            parts.append(path.read_bytes())
            size += len(parts[-1])
            if size >= limit:
                break
    if not parts:
        raise FileNotFoundError(f"no Python sources in {root}, the standard library's folder")
    return np.frombuffer(b"".join(parts), np.uint8)[:limit]


@dataclass(frozen=True)
class Batches:
    """Random pieces of a text. A batch depends on the seed and its number alone, so that a run can go on where it stopped.

    Attributes:
        text: uint8.
        batch_size: pieces of a batch.
        seq_len: bytes that the model sees of a piece; each batch has one more, the last target.
        seed: of the choice.
    """

    text: np.ndarray
    batch_size: int
    seq_len: int
    seed: int = 0

    def __call__(self, step: int) -> np.ndarray:
        """Batch number `step`: int32 ``[batch_size, seq_len + 1]``."""
        starts = np.random.default_rng([self.seed, step]).integers(0, len(self.text) - self.seq_len, self.batch_size)
        return np.stack([self.text[start : start + self.seq_len + 1] for start in starts]).astype(np.int32)
