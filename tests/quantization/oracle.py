"""The arithmetic of quantization once more, in NumPy: element by element where it can be, with tables for the grids."""

import numpy as np

from moe_jax.quantization import Spec

F32_MAX = np.finfo(np.float32).max
TINY = np.finfo(np.float32).tiny


def fp8_value(code: int) -> float:
    """What an e4m3 code stands for, from its bits: sign, four bits of exponent, three of fraction; no infinity, two NaNs."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = (code >> 3) & 0xF, code & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (8 + fraction) * 2.0 ** (exponent - 10)


def e5m2_value(code: int) -> float:
    """What an e5m2 code stands for: sign, five bits of exponent, two of fraction; infinities and NaNs as in IEEE 754."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = (code >> 2) & 0x1F, code & 3
    if exponent == 31:
        return float("nan") if fraction else sign * float("inf")
    if exponent == 0:
        return sign * fraction * 2.0**-16
    return sign * (4 + fraction) * 2.0 ** (exponent - 17)


FP8_VALUES = np.array([fp8_value(code) for code in range(256)])
FP8_TABLES = {"float8_e4m3fn": FP8_VALUES, "float8_e5m2": np.array([e5m2_value(code) for code in range(256)])}


def fp8_codes(values: np.ndarray, dtype: str = "float8_e4m3fn") -> np.ndarray:
    """Codes of the nearest FP8 values, by search in the table: ties to the even code, saturating; NaN is 0x7f."""
    positive = FP8_TABLES[dtype][:128]
    positive = positive[np.isfinite(positive)]  # ascending: 0 to 448, or 57344
    with np.errstate(invalid="ignore"):
        values = np.asarray(values, np.float64)
    magnitude = np.minimum(np.abs(np.where(np.isnan(values), 0.0, values)), positive[-1])
    above = np.clip(np.searchsorted(positive, magnitude), 1, len(positive) - 1)
    lower, upper = positive[above - 1], positive[above]
    to_lower, to_upper = magnitude - lower, upper - magnitude
    take_lower = (to_lower < to_upper) | ((to_lower == to_upper) & ((above - 1) % 2 == 0))
    codes = np.where(take_lower, above - 1, above) | np.where(np.signbit(values), 0x80, 0)
    return np.where(np.isnan(values), 0x7F, codes).astype(np.uint8)


FP4_VALUES = np.array([sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])


def fp4_codes(values: np.ndarray) -> np.ndarray:
    """Codes of the nearest e2m1 values, by distance to each: ties to the even code, saturating."""
    values = np.asarray(values, np.float64)
    magnitude = np.minimum(np.abs(values), 6.0)
    distance = np.abs(magnitude[..., None] - FP4_VALUES[:8])
    nearest = distance == distance.min(-1, keepdims=True)
    even = nearest & (np.arange(8) % 2 == 0)
    code = np.where(even.any(-1), even.argmax(-1), nearest.argmax(-1))
    return (code | np.where(np.signbit(values), 8, 0)).astype(np.uint8)


def global_scales(x: np.ndarray, halves: int = 1) -> np.ndarray:
    """NVFP4: of one matrix, or of each of two halves."""
    finite = np.clip(np.where(np.isnan(x), 0, x), -F32_MAX, F32_MAX).astype(np.float32)
    scales = [
        np.float32(np.abs(half).max(initial=0) * (np.float32(1) / np.float32(2688)))
        for half in np.split(finite, halves)
    ]
    scales = np.float32([scale if scale >= TINY else 0 for scale in scales])
    return scales if halves == 2 else scales[0]


def reciprocal(scale: np.ndarray) -> np.ndarray:
    """1 / scale rounded once to float32; 0 for zero and subnormal scales. A float64 quotient has bits to spare."""
    scale = np.asarray(scale, np.float32)
    with np.errstate(all="ignore"):
        exact = (1.0 / scale.astype(np.float64)).astype(np.float32)
    exact = np.where((np.abs(scale) < TINY) | (np.abs(exact) < TINY), np.float32(0), exact)
    return np.where(np.isnan(scale), np.float32(np.nan), exact).astype(np.float32)


def piece_scale(piece: np.ndarray, spec: Spec) -> np.float32:
    """The scale of the elements that share it, before it is stored."""
    inverse = {n: np.float32(1) / np.float32(n) for n in (448, 57344, 127, 7, 8, 15, 6)}
    finite = np.clip(np.where(np.isnan(piece), 0, piece), -F32_MAX, F32_MAX).astype(np.float32)
    high, low = np.float32(max(finite.max(initial=0), 0)), np.float32(max((-finite).max(initial=0), 0))
    if spec.dtype in FP8_TABLES:
        return np.float32(max(high, low, np.float32(1e-10)) * inverse[spec.largest])
    if np.isnan(piece).any():
        return np.float32(np.nan)
    if spec.scale_dtype == "float8_e4m3fn":
        scale = np.float32(max(high, low) * inverse[6])
    elif spec.dtype == "float4_e2m1fn":
        fraction, exponent = np.frexp(
            np.float64(max(high, low))
        )  # 1.75 * 2^k and more is nearer to 8 than to 6, in units of 2^k
        scale = (
            np.float32(np.ldexp(1.0, int(exponent) - (2 if fraction >= 0.875 else 3))) if fraction else np.float32(0)
        )
    elif spec.dtype == "int8":
        scale = np.float32(max(high, low) * inverse[127])
    elif spec.asymmetric:
        with np.errstate(over="ignore"):
            scale = np.float32(min(np.float32(high + low), F32_MAX) * inverse[15])
    else:
        scale = np.float32(max(high * inverse[7], low * inverse[8]))
    return scale if scale >= TINY else np.float32(0)


def up_to_power(scale: np.float32) -> np.float32:
    """The next power of two that is not smaller; zero and NaN stay."""
    if scale == 0 or np.isnan(scale):
        return scale
    fraction, exponent = np.frexp(scale)
    return np.float32(np.ldexp(1.0, exponent - 1 if fraction == 0.5 else exponent))


def piece_codes(piece: np.ndarray, scale: np.float32, spec: Spec) -> tuple[np.ndarray, int]:
    """(codes, zero point) of the elements that share a scale; FP8 codes as their bits."""
    r = reciprocal(scale)
    with np.errstate(all="ignore"):
        scaled = (piece.astype(np.float32) * r).astype(np.float32) if r != 0 else np.zeros(piece.shape, np.float32)
    if spec.is_float:
        return fp8_codes(np.where(np.isnan(piece), np.nan, scaled), spec.dtype), 0
    if spec.dtype == "float4_e2m1fn":
        return fp4_codes(np.where(np.isnan(scaled), 0, scaled)), 0
    rounded = np.rint(np.where(np.isnan(scaled), 0, scaled))
    if spec.dtype == "int8":
        return np.clip(rounded, -128, 127).astype(np.int8), 0
    zero = 8
    if spec.asymmetric:
        low = np.float32(max(np.nanmax(-piece, initial=0), 0))
        with np.errstate(invalid="ignore"):
            wanted = np.float32(low * r)
        zero = 0 if np.isnan(wanted) else int(np.clip(np.rint(wanted), 0, 15))
    return np.clip(rounded + zero, 0, 15).astype(np.uint8), zero


def pieces_of(spec: Spec, rows: int, columns: int, halves: int = 1) -> list[tuple[tuple[int, ...], slice, slice]]:
    """(index into the stored scales, rows, columns) of everything that shares a scale."""
    half = rows // halves
    if spec.granularity == "tensor":
        index = [(h,) if halves == 2 else () for h in range(halves)]
        return [(index[h], slice(h * half, (h + 1) * half), slice(0, columns)) for h in range(halves)]
    if spec.granularity in ("channel", "token"):
        return [((row,), slice(row, row + 1), slice(0, columns)) for row in range(rows)]
    block_rows, block_columns = spec.block
    grid_rows = -(-half // block_rows)
    return [
        (
            (h * grid_rows + i, j // block_columns),
            slice(h * half + i * block_rows, min(h * half + (i + 1) * block_rows, (h + 1) * half)),
            slice(j, min(j + block_columns, columns)),
        )
        for h in range(halves)
        for i in range(grid_rows)
        for j in range(0, columns, block_columns)
    ]


def scales_shape(spec: Spec, rows: int, columns: int, halves: int = 1) -> tuple[int, ...]:
    if spec.granularity == "tensor":
        return (2,) if halves == 2 else ()
    if spec.granularity in ("channel", "token"):
        return (rows,)
    return halves * -(-(rows // halves) // spec.block[0]), -(-columns // spec.block[1])


def quantize(x: np.ndarray, spec: Spec, *, scales=None, valid=None, halves: int = 1, global_scale=None):
    """One matrix: (codes [rows, columns], scales float32, zero points or None); NVFP4's global scale is `global_scales`."""
    x = np.asarray(x).astype(np.float32)
    if valid is not None:
        x = np.where(np.asarray(valid)[:, None], x, np.float32(0))
    shape = scales_shape(spec, *x.shape, halves)
    codes = np.zeros(x.shape, np.int8 if spec.dtype == "int8" else np.uint8)
    found, zeros = np.zeros(shape, np.float32), np.full(shape, 8, np.uint8)
    if spec.has_global_scale and global_scale is None:
        global_scale = global_scales(x, halves)
    for index, rows, columns in pieces_of(spec, *x.shape, halves):
        piece = x[rows, columns]
        scale = piece_scale(piece, spec) if scales is None else np.float32(np.asarray(scales)[index])
        if spec.scale_dtype == "float8_e8m0fnu":
            scale = up_to_power(scale)
        unit = np.float32(1)
        if spec.has_global_scale:
            unit = of_half(global_scale, rows, x.shape[0] // halves)
            with np.errstate(all="ignore"):
                scale = np.float32(FP8_VALUES[fp8_codes(np.float32(scale * reciprocal(unit)))])
        found[index] = scale
        scale = np.float32(scale * unit)
        codes[rows, columns], zeros[index] = piece_codes(piece, scale, spec)
    return codes, found, zeros if spec.asymmetric else None


def of_half(global_scale: np.ndarray, rows: slice, half: int) -> np.float32:
    """The global scale of rows within one half."""
    return np.float32(np.ravel(global_scale)[min(rows.start // max(half, 1), np.size(global_scale) - 1)])


def dequantize(
    codes: np.ndarray, scales: np.ndarray, zeros, spec: Spec, halves: int = 1, global_scale=None
) -> np.ndarray:
    """One matrix, float64, from what `quantize` gives."""
    table = (FP8_TABLES | {"float4_e2m1fn": FP4_VALUES}).get(spec.dtype)
    values = codes.astype(np.float64) if table is None else table[codes]
    out = np.zeros(codes.shape)
    for index, rows, columns in pieces_of(spec, *codes.shape, halves):
        zero = 0.0
        if spec.dtype == "int4":
            zero = 8.0 if zeros is None else float(zeros[index])
        unit = 1.0 if global_scale is None else np.float64(of_half(global_scale, rows, codes.shape[0] // halves))
        out[rows, columns] = (values[rows, columns] - zero) * np.float64(scales[index]) * unit
    return out


def bits(array) -> np.ndarray:
    """Codes as integers that compare bit by bit."""
    array = np.asarray(array)
    return array.view(np.uint8) if array.dtype.name in FP8_TABLES else array
