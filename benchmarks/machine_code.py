"""What ptxas makes of a grouped matmul, or of its weights' gradient: registers, spills, whether products wait for each other, and
the instructions of each loop of products. Needs no GPU.

python benchmarks/machine_code.py up --tile-rows 160 --k 2048 --n 1536
python benchmarks/machine_code.py down --tile-rows 192 --k 768 --n 2048 --config stages=3,cluster=1
python benchmarks/machine_code.py up --tile-rows 128 --k 2048 --n 1536 --quantization fp8_block --config quantizes=1
python benchmarks/machine_code.py up --tile-rows 96 --k 2048 --n 1536 --quantization nvfp4_fp8
python benchmarks/machine_code.py weight_grad --k 1536 --n 2048 --config stages=4,buffers=2
python benchmarks/machine_code.py up-grad --tile-rows 192 --k 1536 --n 2048
python benchmarks/machine_code.py up --k 2048 --n 1536 --quantization nvfp4_w4a4 --blackwell

Needs `jax[cuda13]` and nvdisasm (of a CUDA toolkit, or of the triton package). Without a driver a C compiler makes a stand-in for
libcuda, which says that there is a Hopper GPU, or a Blackwell one, and launches nothing. Loops of Blackwell are not taken apart.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

ROWS, EXPERTS = 131072, 128
STAND_IN = """
typedef int R;
R cuInit(unsigned flags) { return 0; }
R cuGetErrorString(R e, const char **s) { *s = "no driver"; return 0; }
R cuGetErrorName(R e, const char **s) { *s = "no driver"; return 0; }
R cuDriverGetVersion(int *v) { *v = 13000; return 0; }
R cuDeviceGetCount(int *n) { *n = 1; return 0; }
R cuDeviceGet(int *d, int i) { *d = 0; return 0; }
R cuCtxGetDevice(int *d) { *d = 0; return 0; }
R cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
R cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? MAJOR : a == 76 ? 0 : a == 16 ? 132 : 1; return 0; }
R cuModuleLoadData(void **m, const void *image) { *m = (void *)1; return 0; }
R cuModuleGetFunction(void **f, void *m, const char *name) { *f = (void *)1; return 0; }
R cuFuncSetAttribute(void *f, int a, int v) { return 0; }
R cuModuleUnload(void *m) { return 0; }
"""


class Loop(NamedTuple):
    """A loop that multiplies.

    Attributes:
        columns: N of its wgmma instructions.
        products: wgmma instructions.
        uniform: instructions of the uniform datapath, once a warp.
        vector: other instructions, once a thread.
        moves: R2UR, from a vector to a uniform register.
        spills: loads and stores of local memory.
    """

    columns: int
    products: int
    uniform: int
    vector: int
    moves: int
    spills: int


def loops(sass: str) -> list[Loop]:
    """The innermost loops of a disassembly that hold wgmma instructions, in the order of the code."""
    lines = re.sub(r"\b[QI]GMMA\b", "HGMMA", sass).splitlines()  # of FP8 and int8
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_\w+):", line))}
    branches = [(m[1], i) for i, line in enumerate(lines) if (m := re.search(r"BRA\s+`\((\.L_\w+)\)", line))]
    spans = [(labels[label], end) for label, end in branches if labels.get(label, end) < end]
    spans = [span for span in spans if any("HGMMA" in line for line in lines[slice(*span)])]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [_loop(lines[start : end + 1]) for start, end in inner]


def decoding_loop(sass: str) -> dict[str, int] | None:
    """The smallest loop that permutes bytes for weights of four bits and multiplies nothing; None if there is none."""
    lines = sass.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_\w+):", line))}
    branches = [(m[1], i) for i, line in enumerate(lines) if (m := re.search(r"BRA\s+`\((\.L_\w+)\)", line))]
    counted = [
        _operations(lines[labels[label] : end + 1])[1] for label, end in branches if labels.get(label, end) < end
    ]
    ops = min((ops for ops in counted if ops["PRMT"] >= 32), key=lambda ops: ops.total(), default=None)
    if ops is None or any("GMMA" in op for op in ops):
        return None
    uniform = sum(count for op, count in ops.items() if op.startswith("U"))
    return {
        "uniform": uniform,
        "vector": ops.total() - uniform,
        "permutations": ops["PRMT"],
        "spills": ops["LDL"] + ops["STL"],
    }


def _operations(lines: list[str]) -> tuple[list[str], collections.Counter[str]]:
    """What the lines ``... /*address*/ [@predicate] OPERATION[.modifiers] operands`` hold, and how often each operation."""
    lines = [line for line in lines if "/*" in line]
    codes = [re.sub(r".*/\*[0-9a-f]+\*/\s+|@!?U?P\w+\s+", "", line) for line in lines]
    return codes, collections.Counter(re.split(r"[\s.;]", code)[0] for code in codes)


def _loop(lines: list[str]) -> Loop:
    codes, ops = _operations(lines)
    uniform = sum(count for op, count in ops.items() if op.startswith("U"))
    columns = next(int(m[1]) for code in codes if (m := re.match(r"HGMMA\.64x(\d+)", code)))
    vector = len(codes) - uniform - ops["HGMMA"]
    return Loop(columns, ops["HGMMA"], uniform, vector, ops["R2UR"], ops["LDL"] + ops["STL"])


def compile_kernel(module: bytes, folder: Path, major: int = 9) -> None:
    """Compiles a serialized Mosaic kernel; its code and ptxas' report are left in the folder.

    Without a driver it is compiled for compute capability `major`.0, with one for the GPU there.
    """
    import jax_plugins.xla_cuda13 as plugin

    packages = Path(plugin.__file__).parents[2]
    toolkit = folder / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    for part in (packages / "nvidia" / "cu13").iterdir():
        if part.name != "bin":
            (toolkit / part.name).symlink_to(part)
    for part in (packages / "nvidia" / "cu13" / "bin").iterdir():
        (toolkit / "bin" / part.name).symlink_to(part)
    if not (toolkit / "bin" / "nvdisasm").exists():
        (toolkit / "bin" / "nvdisasm").symlink_to(_nvdisasm())
    os.environ |= {
        "MOSAIC_GPU_CUDA_ROOT": str(toolkit),
        "MOSAIC_GPU_RUNTIME_LIB_PATH": str(packages / "jax_cuda13_plugin" / "libmosaic_gpu_runtime.so"),
        "MOSAIC_GPU_DUMP_TO": str(folder),
        **{f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "SASS")},
    }
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        (folder / "cuda.c").write_text(STAND_IN)
        library = str(folder / "libcuda.so.1")
        made = [
            "cc",
            "-shared",
            "-fPIC",
            f"-DMAJOR={major}",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            library,
            str(folder / "cuda.c"),
        ]
        subprocess.run(made, check=True)
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    compile_ = ctypes.CDLL(plugin._get_library_path()).MosaicGpuCompile
    compile_.argtypes, compile_.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    if not compile_(module, len(module)):
        raise RuntimeError("Mosaic could not compile the kernel")


def _nvdisasm() -> str:
    triton = importlib.util.find_spec("triton")
    places = [shutil.which("nvdisasm")]
    places += [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm")] if triton else []
    found = next((place for place in places if place and Path(place).exists()), None)
    if found is None:
        raise FileNotFoundError("nvdisasm: not on the PATH, nor in a triton package; pip install triton")
    return found


def kernel_of(
    projection: str, tile_rows: int, k: int, n: int, changes: dict[str, Any], quantization: str | None = None
) -> tuple[bytes, object]:
    """The serialized grouped matmul of a projection, or of a gradient, and its configuration."""
    from moe_jax.kernels.hopper.matmul_config import default_config

    if projection == "weight_grad":
        return _weight_grad(changes, k, n)
    activation = _activation(projection)
    if projection.endswith("-grad"):
        config, run, operands = _input_grad(tile_rows, changes, k, n)
        return _module(run, *operands, *_schedule(tile_rows, config)), config
    rule = default_config(tile_rows, activation is not None, n // 2 if activation else n, EXPERTS)
    if quantization is None:
        config = dataclasses.replace(rule, **changes)
        run, operands = _plain(config, activation, k, n)
    else:
        config, run, operands = _quantized(rule, changes, activation, k, n, quantization)
    return _module(run, *operands, *_schedule(tile_rows, config)), config


def _schedule(tile_rows: int, config) -> list:
    tiles = 2 * EXPERTS + ROWS // tile_rows
    schedule = [*[_like(tiles)] * 3, _like(1), _like(tiles, 2)]
    return schedule + ([_like(ROWS + tile_rows)] if config.gather else [])


def _module(run, *operands) -> bytes:
    """The only Mosaic kernel of a function, lowered for CUDA."""
    import jax
    from jaxlib.mlir import ir

    module = jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found: list[bytes] = []

    def visit(op):
        if op.name == "stablehlo.custom_call":
            found.append({a.name: a.attr for a in op.attributes["mhlo.backend_config"]}["module"].value_bytes)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found[0]


def _weight_grad(changes: dict[str, Any], m: int, n: int) -> tuple[bytes, object]:
    """The kernel of a gradient ``[E, m, n]``, and its configuration."""
    from moe_jax.kernels.hopper import weight_grad as kernel

    config = dataclasses.replace(kernel.default_config(m, n), **changes)

    def run(left, right, starts, sizes):
        return kernel.weight_grad(left, right, starts, sizes, None, out_dtype="bfloat16", config=config)

    operands = [_like(ROWS, columns, dtype="bfloat16") for columns in (m, n)]
    return _module(run, *operands, _like(EXPERTS), _like(EXPERTS)), config


def _activation(projection: str):
    from moe_jax.activations import get_activation

    return get_activation("silu") if projection == "up" else None


def _like(*shape: int, dtype: str = "int32"):
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def _block_scaled(activation, k: int, n: int, quantization: str) -> bytes:
    """The kernel for Blackwell GPUs of a format whose rows are quantized as its weights."""
    import jax

    from moe_jax.ops.block_scaled_matmul import block_scaled_matmul
    from moe_jax.ops.group_tokens import Groups, max_tiles
    from moe_jax.ops.quantize_rows import quantize_block_scaled
    from moe_jax.quantization import quant_format, quantize

    form, halves = quant_format(quantization), 2 if activation else 1
    rows = jax.eval_shape(lambda x: quantize_block_scaled(x, form.activations), _like(ROWS, k, dtype="bfloat16"))
    weights = _like(EXPERTS, n, k, dtype="bfloat16")
    weights = jax.eval_shape(lambda w: quantize(w, form.weights, halves=halves), weights)
    schedule = [_like(max_tiles(ROWS, EXPERTS, 128))] * 3
    groups = Groups(_like(ROWS, 1), *schedule, _like(EXPERTS), _like(1), tile_rows=128)

    def multiply(rows, weights, groups):
        return block_scaled_matmul(rows, weights, groups, groups.tile_group, activation=activation)

    return _module(multiply, rows, weights, groups)


def _plain(config, activation, k: int, n: int):
    """The kernel of 16-bit operands, and these."""
    from moe_jax.kernels.hopper.matmul_bf16 import grouped_matmul

    def run(rows, weights, *schedule):
        more = _more(config, schedule)
        return grouped_matmul(rows, weights, *schedule[:4], None, activation, config=config, **more)

    return run, [_like(ROWS, k, dtype="bfloat16"), _like(EXPERTS, n, k, dtype="bfloat16")]


def _more(config, schedule) -> dict:
    """What a kernel takes of `_schedule` beside the first four, which are in the order of its arguments."""
    by_token = dict(row_tokens=schedule[5], total_rows=ROWS) if config.gather else {}
    return dict(tile_spans=schedule[4]) | by_token


def _input_grad(tile_rows: int, changes: dict[str, Any], k: int, n: int):
    """The configuration and the kernel of the gradient of a projection's input, contracted over k, and its operands."""
    from moe_jax.kernels.hopper import input_grad

    config = dataclasses.replace(input_grad.config_for(tile_rows), **changes)
    operands = [_like(ROWS, k, dtype="bfloat16"), _like(EXPERTS, k, n, dtype="bfloat16")]

    def run(rows, weights, *schedule):
        return input_grad.input_grad(rows, weights, *schedule[:4], config=config, **_more(config, schedule))

    return config, run, operands


def _quantized(rule, changes: dict[str, Any], activation, k: int, n: int, quantization: str):
    """The configuration and the kernel of a number format, and its operands: rows of codes, or rows for codes to be decoded."""
    import jax

    from moe_jax.kernels.hopper import matmul_bf16, matmul_fp8, matmul_rows_first
    from moe_jax.kernels.hopper.decoding_config import Projection, four_bit, one_byte
    from moe_jax.kernels.hopper.gather_quantize import scales_shape
    from moe_jax.kernels.hopper.matmul_config import eight_bit, from_four_bits
    from moe_jax.quantization import prepare, quant_format, quantize
    from moe_jax.quantization.prepared_fp8 import prepare_fp8
    from moe_jax.tuning.fit import within_memory

    form = quant_format(quantization)
    weights = jax.eval_shape(
        lambda w: quantize(w, form.weights, halves=2 if activation else 1), _like(EXPERTS, n, k, dtype="bfloat16")
    )
    from_four = form.multiplies_codes and weights.spec.codes_per_value == 2
    gated = activation is not None
    mean_rows = min(ROWS / EXPERTS, rule.tile_rows / 8)  # few rows for the tiles that are for them
    projection = Projection(gated, n // 2 if gated else n, EXPERTS, mean_rows)
    if weights.spec.codes_per_value == 2 and not from_four:
        rule = four_bit(rule, projection)
        rule = within_memory(rule, "bfloat16", f"weights {weights.spec.dtype} group")
        config = dataclasses.replace(rule, **changes)

        def decode_four_bits(rows, weights, *schedule):
            more = _more(config, schedule)
            return matmul_bf16.grouped_matmul(rows, weights, *schedule[:4], None, activation, config=config, **more)

        return config, decode_four_bits, [_like(ROWS, k, dtype="bfloat16"), jax.eval_shape(prepare, weights)]
    if from_four:
        weights = jax.eval_shape(prepare_fp8, weights)
    scales = weights.scales.shape if weights.scales.ndim > 1 else (EXPERTS, 1)
    operands = [weights if from_four else weights.values, _like(*scales, dtype="float32")]
    if form.is_weight_only:
        rule = one_byte(rule, projection, in_blocks=weights.spec.granularity == "block")
        rule = within_memory(rule, "bfloat16", f"weights {weights.spec.dtype} {weights.spec.granularity}")
        config = dataclasses.replace(rule, **changes)

        def decode(rows, weights, scales, *schedule):
            return matmul_bf16.grouped_matmul(
                rows,
                weights,
                *schedule[:4],
                None,
                activation,
                config=config,
                weight_scales=scales,
                **_more(config, schedule),
            )

        return config, decode, [_like(ROWS, k, dtype="bfloat16"), *operands]
    rule = from_four_bits(eight_bit(rule)) if from_four else eight_bit(rule)
    config = dataclasses.replace(rule, **changes)
    spec = form.activations

    def multiply(rows, row_scales, weights, scales, *schedule):
        more = dict(quantize=spec if config.quantizes else None, out_dtype="bfloat16", config=config, aligned=True)
        more |= _more(config, schedule)
        kernel = matmul_rows_first if config.rows_first else matmul_fp8
        return kernel.grouped_matmul(rows, row_scales, weights, scales, *schedule[:4], None, activation, **more)

    of_rows = [_like(ROWS, k, dtype=spec.dtype), _like(*scales_shape(ROWS, k, spec), dtype="float32")]
    return config, multiply, [*of_rows, *operands]


def main(
    projection: Annotated[str, typer.Argument(help="up (gated), down, up-grad, down-grad, or weight_grad [k, n]")],
    tile_rows: int = 160,
    k: int = 2048,
    n: int = 1536,
    config: Annotated[
        str, typer.Option(help="changes to the rule's configuration, as stages=3,row_counts=128/160")
    ] = "",
    quantization: Annotated[str | None, typer.Option(help="number format of the experts")] = None,
    blackwell: Annotated[bool, typer.Option(help="the block-scaled kernel for Blackwell GPUs")] = False,
    keep: Annotated[Path | None, typer.Option(help="an empty folder for the code")] = None,
) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    items = (item.split("=") for item in config.split(",") if item)
    changes = {name: tuple(map(int, value.split("/"))) if "/" in value else int(value) for name, value in items}
    if blackwell:
        module = _block_scaled(_activation(projection), k, n, quantization or "nvfp4_w4a4")
    else:
        module, used = kernel_of(projection, tile_rows, k, n, changes, quantization)
        print(used)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if keep is None else keep
        compile_kernel(module, folder, 10 if blackwell else 9)
        report = next(folder.glob("*.ptxas")).read_text()
        print(
            "; ".join(
                re.findall(
                    r"for 'sm_\w+'|\d+ bytes spill \w+|Used \d+ registers|wgmma\S+ instructions are serialized", report
                )
            )
        )
        sass = next(folder.glob("*.sass*")).read_text()
        for loop in loops(sass):
            print("  ".join(f"{field} {value}" for field, value in loop._asdict().items()))
        decoding = decoding_loop(sass)
        if decoding is not None:
            print("decoding  " + "  ".join(f"{field} {value}" for field, value in decoding.items()))


if __name__ == "__main__":
    typer.run(main)
