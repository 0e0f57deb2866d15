"""Safetensors checkpoints on disk, read lazily: one file, or shards with an index."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")

# The safetensors package hands these dtypes to torch, but not to NumPy: they are mapped here.
_FLOAT8 = {
    "F8_E4M3": jnp.dtype("float8_e4m3fn"),
    "F8_E5M2": jnp.dtype("float8_e5m2"),
    "F8_E8M0": jnp.dtype("float8_e8m0fnu"),
}


class TensorInfo(NamedTuple):
    """What a header says of one tensor: its shape, and its dtype as safetensors spells it (``BF16``, ``F32``)."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of one checkpoint by name; a tensor or a slice of it is read when it is asked for.

    Opening reads only the index (or the header of a single file). Each shard is memory-mapped when a tensor of it is
    first needed, so shards that hold other layers or other ranks' experts are never opened. Arrays come back in the
    dtype they are stored in; bfloat16 and the 8-bit floats are those of ``ml_dtypes``.

    Args:
        path: a directory holding ``model.safetensors``, or ``model.safetensors.index.json`` and its shards; or one
            ``.safetensors`` file; or the index file itself.

    Raises:
        FileNotFoundError: the path, its safetensors files or a shard that the index names do not exist.
        ValueError: a file is truncated or is not safetensors, or the index cannot be understood.

    Source: the safetensors format, https://github.com/huggingface/safetensors.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"w": np.arange(6, dtype=np.float32).reshape(3, 2)}, folder + "/model.safetensors")
        >>> with Checkpoint(folder) as checkpoint:
        ...     print(checkpoint.info("w"), checkpoint.read("w", 1))
        TensorInfo(shape=(3, 2), dtype='F32') [2. 3.]
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[Path, Any] = {}
        self._headers: dict[Path, dict[str, Any]] = {}
        source = _find(self.path)
        if source.name.endswith(".index.json"):
            self._file_of = {name: source.parent / shard for name, shard in _read_index(source).items()}
        else:
            self._file_of = dict.fromkeys(self._open(source).keys(), source)

    @property
    def folder(self) -> Path:
        """Where the files are, and the configs beside them."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor name, in the order of the index or header."""
        return tuple(self._file_of)

    def info(self, name: str) -> TensorInfo:
        """Shape and stored dtype of ``name``, from the header alone."""
        header = self._slice(name)
        return TensorInfo(tuple(header.get_shape()), header.get_dtype())

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """The tensor ``name``, or only its entry ``index`` along the first axis; no other bytes of it are read."""
        lazy = self._slice(name)
        if lazy.get_dtype() in _FLOAT8:
            mapped = self._mapped(name, _FLOAT8[lazy.get_dtype()])
            return mapped if index is None else mapped[index]
        if index is not None:
            return np.asarray(lazy[index])
        return np.asarray(self._open(self._file_of[name]).get_tensor(name))

    def close(self) -> None:
        """Unmaps every file that was opened; arrays of 8-bit floats keep their own mapping."""
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"tensor {name} is not in {self.path}")
        file = self._open(self._file_of[name])
        try:
            return file.get_slice(name)
        except SafetensorError as error:
            raise ValueError(
                f"the index says that {name} is in {self._file_of[name].name}, which does not hold it; "
                "download the checkpoint again, index and shards from the same revision"
            ) from error

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            if not file.is_file():
                raise FileNotFoundError(self._missing_shards(file))
            try:
                self._files[file] = safe_open(file, framework="numpy").__enter__()
            except SafetensorError as error:
                raise ValueError(_unreadable(file, error)) from error
        return self._files[file]

    def _mapped(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The tensor as it lies in the file: a header's length, the header, and the tensors one after another."""
        file = self._file_of[name]
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if file not in self._headers:
                self._headers[file] = json.loads(stream.read(length))
        header = self._headers[file][name]
        start, stop = header["data_offsets"]
        if start == stop:
            return np.empty(header["shape"], dtype)
        raw = np.memmap(file, np.uint8, "r", offset=8 + length + start, shape=stop - start)
        return raw.view(np.ndarray).view(dtype).reshape(header["shape"])

    def _missing_shards(self, file: Path) -> str:
        shards = sorted(set(self._file_of.values()))
        missing = [shard.name for shard in shards if not shard.is_file()]
        return (
            f"shard {file.name}, named by the index, is not in {file.parent} "
            f"({len(missing)} of {len(shards)} shards are missing: {listed(missing)}); download the rest of them"
        )


def listed(items: list[str] | tuple[str, ...], limit: int = 5) -> str:
    """The first ``limit`` items, comma-separated, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _find(path: Path) -> Path:
    """The safetensors file or index that `path` stands for."""
    if path.is_file():
        return path
    if not path.exists():
        if _REPO_ID.fullmatch(str(path)):
            raise FileNotFoundError(
                f"{str(path)!r} is not a directory or file here; if it is a Hugging Face repo id, download it first "
                f"and pass the directory: path = huggingface_hub.snapshot_download({str(path)!r})"
            )
        raise FileNotFoundError(
            f"checkpoint path {str(path)!r} does not exist; pass a directory with {SINGLE_FILE} or {INDEX_FILE}"
        )
    for name in (SINGLE_FILE, INDEX_FILE):
        if (path / name).is_file():
            return path / name
    found = sorted(item.name for item in path.iterdir())
    hint = "pass a directory that holds one of them, or the .safetensors file itself"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        hint = "its weights are PyTorch pickles: load the model in transformers and save it with save_pretrained first"
    raise FileNotFoundError(
        f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE} (it has: {listed(found) or 'nothing'}); {hint}"
    )


def _read_index(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a safetensors index (JSON with a 'weight_map' from tensor to shard): {error!r}; "
            "download it again"
        ) from error


def _unreadable(file: Path, error: SafetensorError) -> str:
    with file.open("rb") as stream:
        if stream.read(23) == b"version https://git-lfs":
            return f"{file} is a Git LFS pointer, not the tensors; run `git lfs pull` in the checkpoint's repository"
    return (
        f"{file} ({file.stat().st_size} bytes) is truncated or is not a safetensors file: {error}; "
        "download it again and compare its size with the original's"
    )
