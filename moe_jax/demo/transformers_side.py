"""What transformers does in the demo: make a checkpoint, read one, run its own MoE blocks. The only file with torch."""

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.demo.errors import DemoError
from moe_jax.demo.timing import median_seconds


@dataclasses.dataclass
class CapturedLayer:
    """One MoE layer as transformers runs it.

    Attributes:
        index: of the decoder layer in the checkpoint.
        hidden_states: float32 ``[T, H]``, what enters the layer; rounded to the dtype that moe_jax computes in.
        output: float32 ``[T, H]``, what transformers' block, in float32, makes of it.
        topk_ids: ``[T, k]``, the experts that transformers' router chose; None where its block does not tell.
        seconds: median time of transformers' block in the compute dtype, on a GPU if torch has one.
    """

    index: int
    hidden_states: np.ndarray
    output: np.ndarray
    topk_ids: np.ndarray | None
    seconds: float


def import_torch() -> tuple[Any, Any]:
    """torch and transformers, quiet; or a `DemoError` that says how to install them."""
    try:
        import matplotlib  # noqa: F401  (the picture in the end needs it: say so before the work, not after)
        import torch
        import transformers
    except ImportError as error:
        raise DemoError(
            f"the demo needs torch, transformers and matplotlib ({error}): pip install 'moe_jax[demo]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


def make_checkpoint(folder: Path, dtype: str, seed: int = 0) -> None:
    """Writes a small Qwen3-MoE model with random weights, in several safetensors shards with their index."""
    torch, transformers = import_torch()
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,  # one token per byte
        hidden_size=256,
        moe_intermediate_size=128,
        num_experts=32,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen3MoeForCausalLM(config)
        # Larger than what the layers add, as in trained models: tokens stay different, and so do their experts.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="16MB")


def read_config(folder: Path) -> Any:
    """The Hugging Face config of a checkpoint on disk; nothing is downloaded."""
    _, transformers = import_torch()
    if not (folder / "config.json").is_file():
        raise DemoError(f"{folder} holds no config.json; --checkpoint takes a folder as `save_pretrained` writes it")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except Exception as error:  # transformers raises whatever the file provokes
        raise DemoError(f"transformers cannot read {folder / 'config.json'}: {error}") from error


def token_ids(text: bytes, folder: Path, vocab_size: int, max_tokens: int) -> tuple[np.ndarray, str]:
    """``[T]`` token ids of the text, and what made them: the checkpoint's tokenizer if it has one, else the bytes."""
    _, transformers = import_torch()
    if (folder / "tokenizer.json").is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = np.asarray(tokenizer(text.decode("utf-8", errors="replace"))["input_ids"], np.int64)
        name = "the checkpoint's tokenizer"
    else:
        ids = np.frombuffer(text, np.uint8).astype(np.int64)
        name = "bytes"
    ids = ids[:max_tokens]
    if ids.size == 0:
        raise DemoError("the text is empty; give --text a file with at least one byte")
    if ids.max() >= vocab_size:
        raise DemoError(
            f"token id {ids.max()} is outside the model's vocabulary of {vocab_size}; it has no room for {name}"
        )
    return ids, name


def first_layers(config: Any, count: int) -> Any:
    """The config of the same model with only its first decoder layers."""
    whole = config.num_hidden_layers
    if count >= whole:
        return config
    config = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == whole:  # one entry per layer
            setattr(config, name, value[:count])
    config.num_hidden_layers = count
    return config


def capture_layers(folder: Path, config: Any, ids: np.ndarray, dtype: str, repeats: int) -> list[CapturedLayer]:
    """Runs the model on the tokens in float32 and its MoE blocks, one by one, on what enters them.

    The inputs of the blocks are rounded to ``dtype`` first: both sides start from the same numbers, and what differs in
    the end is how they compute.
    """
    torch, transformers = import_torch()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True
        )
    except Exception as error:
        raise DemoError(f"transformers cannot load {folder}: {error}") from error
    model.eval()
    blocks = _moe_blocks(model)
    inputs: dict[int, Any] = {}
    hooks = [block.register_forward_pre_hook(_keeper(inputs, index)) for index, block in blocks.items()]
    with torch.no_grad():
        model(torch.from_numpy(ids)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    compute_dtype = getattr(torch, dtype)
    captured = []
    for index, block in blocks.items():
        hidden = inputs[index].to(compute_dtype)
        output, topk_ids = _run_block(block, hidden.float())
        seconds = _time_block(torch, block, hidden, repeats)
        captured.append(CapturedLayer(index, hidden[0].float().numpy(), output, topk_ids, seconds))
    return captured


def timing_device() -> str:
    """Where transformers' block is timed: ``cuda`` if torch has one, else ``cpu``."""
    torch, _ = import_torch()
    return "cuda" if torch.cuda.is_available() else "cpu"


def _moe_blocks(model: Any) -> dict[int, Any]:
    """Decoder layer index -> the module that holds router and experts."""
    blocks = {}
    for name, module in model.named_modules():
        match = re.search(r"(?:^|\.)layers\.(\d+)\.\w+$", name)
        if match and hasattr(module, "experts"):
            blocks[int(match.group(1))] = module
    return blocks


def _keeper(kept: dict[int, Any], key: int) -> Callable[[Any, tuple], None]:
    def keep(_module: Any, args: tuple) -> None:
        kept[key] = args[0].detach()

    return keep


def _run_block(block: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray | None]:
    torch, _ = import_torch()
    chosen: dict[str, Any] = {}

    def keep_ids(_module: Any, args: tuple) -> None:
        # transformers' experts take (hidden_states, top_k_index, top_k_weights); Llama 4's only the weighed rows.
        if len(args) > 1 and not args[1].is_floating_point():
            chosen["ids"] = args[1].detach().cpu().numpy()

    hook = block.experts.register_forward_pre_hook(keep_ids)
    with torch.no_grad():
        output = block(hidden)
    hook.remove()
    output = output[0] if isinstance(output, tuple) else output
    return output.reshape(-1, hidden.shape[-1]).float().numpy(), chosen.get("ids")


def _time_block(torch: Any, block: Any, hidden: Any, repeats: int) -> float:
    """Median seconds of the block in the dtype of ``hidden``; on a CPU the better of one thread and all of them.

    torch's threads spin while they wait for one another: all of them are fastest on a quiet machine, and can be far
    slower than one where something else keeps the cores busy.
    """
    device = timing_device()
    if device != "cpu" or hidden.dtype != torch.float32:
        block = copy.deepcopy(block).to(device=device, dtype=hidden.dtype)
        hidden = hidden.to(device)

    def call() -> None:
        with torch.no_grad():
            block(hidden)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = median_seconds(call, repeats)
    threads = torch.get_num_threads()
    if device == "cpu" and threads > 1:
        torch.set_num_threads(1)
        try:
            seconds = min(seconds, median_seconds(call, repeats))
        finally:
            torch.set_num_threads(threads)
    return seconds
