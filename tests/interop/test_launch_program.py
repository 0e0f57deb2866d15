"""Lowered layers as programs of Mosaic kernels: what each kernel is given, where buffers lie, what is refused. Without a GPU."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from moe_jax import ExpertWeights, MoEConfig, RoutingConfig, moe, quantize_experts
from moe_jax_torch import calls
from moe_jax_torch.program import NotLaunchable, Place, Program, TensorType
from moe_jax_torch.workspace import ALIGNMENT, Span, arrange
from tests.lowering import an_h200, like, without_strings

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 256, 128
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4, "f8E4M3FN": 1}


def lowered(function, *operands, **static):
    with an_h200():
        return function.trace(*operands, **static).lower(lowering_platforms=("cuda",))


def operands_of(tokens, dtype, *, bias=False, routed=True):
    rows, shape = 2 * INTERMEDIATE, (EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    return calls.Operands(
        like(dtype, tokens, HIDDEN),
        like(dtype, *shape),
        like(dtype, EXPERTS, HIDDEN, INTERMEDIATE),
        like("float32", tokens, TOP_K) if routed else None,
        like(dtype, EXPERTS, rows) if bias else None,
        like(dtype, EXPERTS, HIDDEN) if bias else None,
    )


def experts(tokens, dtype, implementation="mosaic", **options):
    static = calls.Static("silu", False, EXPERTS, implementation)
    ids = like("int32", tokens, TOP_K)
    return lowered(calls.experts_forward, operands_of(tokens, dtype, **options), ids, None, static=static)


def whole_layer(tokens, dtype):
    static, routing = calls.Static("silu", False, EXPERTS, "mosaic"), RoutingConfig("renormalize")
    operands = operands_of(tokens, dtype, routed=False), like("float32", tokens, EXPERTS), None, None
    return lowered(calls.moe_forward, *operands, static=static, top_k=TOP_K, routing=routing)


def quantized(tokens, name):
    config = MoEConfig(EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, quantization=name)
    plain = ExpertWeights(*operands_of(tokens, "bfloat16")[1:3])
    weights = jax.eval_shape(lambda weights: quantize_experts(weights, name), plain)
    layer = functools.partial(moe, config=config, implementation="mosaic")
    operands = like("bfloat16", tokens, HIDDEN), weights, like("float32", tokens, EXPERTS)
    return lowered(jax.jit(layer), *operands)


class FromText:
    """The same function read from the text that JAX prints: what each kernel and output is made of, and how large it is."""

    def __init__(self, text):
        self.made_of, self.sizes, self.kernels, self.constants, self.functions = {}, {}, 0, 0, {}
        for line in without_strings(text).splitlines():
            if match := re.search(r"func\.func \w+ @(\w+)\((.*?)\) -> ", line):
                body = []
                self.functions[match[1]] = re.findall(r"(%\w+): tensor", match[2]), body
            elif self.functions:
                body.append(line)
        parameters, _ = self.functions["main"]
        self.outputs = self._read("main", [("argument", i) for i in range(len(parameters))])

    def _read(self, function, arguments):
        parameters, body = self.functions[function]
        outer, self.made_of = self.made_of, dict(zip(parameters, arguments, strict=True))
        for line in body:
            if match := re.match(r"\s*return (.*) : ", line):
                returned, self.made_of = [self.made_of[name] for name in match[1].split(", ")], outer
                return returned
            if match := re.match(r"\s*(%\w+)(?::\d+)? = (?:stablehlo\.|func\.)?(\w+)(.*)", line):
                name, operation, rest = match.groups()
                operands = tuple(self.made_of[o] for o in re.findall(r"%\w+(?:#\d+)?", rest))
                if operation == "reshape":
                    self.made_of[name] = operands[0]
                elif operation == "custom_call":
                    self._kernel(name, operands, rest.rsplit("->", 1)[1])
                elif operation == "call":
                    results = self._read(re.search(r"@(\w+)", rest)[1], operands)
                    several = len(results) > 1
                    self.made_of |= {f"{name}#{i}" if several else name: result for i, result in enumerate(results)}
                elif operation in ("iota", "constant"):
                    self.made_of[name], self.constants = ("constant", self.constants), self.constants + 1
                else:
                    assert operation == "broadcast_in_dim" and operands[0][0] == "constant", line
                    self.made_of[name] = operands[0]
        raise AssertionError(f"{function} does not return")

    def _kernel(self, name, operands, types):
        found = re.findall(r"tensor<(?:([\dx]+)x)?(\w+)>", types)
        for i, (shape, element) in enumerate(found):
            made = ("kernel", self.kernels, i, operands)
            self.made_of[f"{name}#{i}" if len(found) > 1 else name] = made
            self.sizes[made] = math.prod(int(n) for n in shape.split("x") if n) * BYTES[element]
        self.kernels += 1


def check_data_flow(lowered):
    """Runs the program on what buffers are made of: a result written over one that is still needed is found when that is read."""
    program, text = Program.of(lowered), FromText(lowered.as_text())
    written = {}  # (space, index): [(start, end, made of)]

    def read(place):
        if place.space in ("argument", "constant"):
            return place.space, place.index
        (found,) = [made for start, _, made in written[place[:2]] if start == place.offset]
        return found

    for step, launch in enumerate(program.launches):
        results = sorted(made for made in text.sizes if made[1] == step)
        operands = tuple(read(place) for place in launch.buffers[: -len(results)])
        for i, (made, place) in enumerate(zip(results, launch.buffers[-len(results) :], strict=True)):
            assert made == ("kernel", step, i, operands)
            start, end = place.offset, place.offset + text.sizes[made]
            assert start % ALIGNMENT == 0 and (place.space == "output" or end <= program.workspace_bytes)
            beside = [old for old in written.get(place[:2], []) if old[1] <= start or old[0] >= end]
            written[place[:2]] = [*beside, (start, end, made)]
        for place, made in zip(launch.buffers, operands, strict=False):
            assert read(place) == made, f"kernel {step} overwrites what it reads"
    assert [read(Place("output", i)) for i in range(len(program.outputs))] == text.outputs
    return program


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts(dtype, tokens):
    program = check_data_flow(experts(tokens, dtype, bias=dtype == "float16"))
    assert 4 <= len(program.launches) <= 7
    assert program.arguments[0] == program.outputs[0] == TensorType((tokens, HIDDEN), dtype)
    assert program.workspace_bytes < 2**20 * max(1, tokens // 16)


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_whole_layers_are_fewer_kernels(tokens):
    program = check_data_flow(whole_layer(tokens, "bfloat16"))
    assert len(program.launches) == {1: 4, 16: 4, 300: 5}[tokens]  # of 7, 6 and 6


@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_fp8(tokens):
    program = check_data_flow(quantized(tokens, "fp8_block"))
    assert {argument.dtype for argument in program.arguments} == {"bfloat16", "float8_e4m3fn", "float32"}


def test_routing_alone_needs_no_workspace():
    rule = RoutingConfig("renormalize").rule
    logits = like("float32", 16, EXPERTS)
    program = Program.of(lowered(calls.route_forward, logits, None, top_k=TOP_K, rule=rule, implementation="mosaic"))
    assert [output.dtype for output in program.outputs] == ["int32", "float32"]
    assert (len(program.launches), program.workspace_bytes) == (1, 0)


def test_router_weight_on_the_input_reads_a_constant():
    static = calls.Static("silu", True, EXPERTS, "mosaic")
    operands = operands_of(16, "bfloat16")._replace(topk_weights=like("float32", 16, 1))
    program = check_data_flow(lowered(calls.experts_forward, operands, like("int32", 16, 1), None, static=static))
    (constant,) = program.constants
    assert constant.tolist() == [[token] for token in range(16)]


def test_equal_kernels_have_one_hash():
    first, again = (Program.of(whole_layer(16, "bfloat16")) for _ in range(2))
    assert [launch.kernel for launch in first.launches] == [launch.kernel for launch in again.launches]
    assert len({launch.kernel for launch in first.launches}) == len({launch.module for launch in first.launches})


def of(function, *operands):
    return Program.of(jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)))


REFUSED = {
    "stablehlo.sort of 8xf32": jnp.sort,
    "stablehlo.multiply of 8xf32, 8xf32": lambda x: 2 * x,
    "stablehlo.compare": lambda x: jnp.where(x > 0, x, 0),  # in a function of its own
    "stablehlo.broadcast_in_dim of 8xf32": lambda x: jnp.broadcast_to(x, (3, 8)),
    "output 0, 8xf32, is written by no kernel": lambda x: x,
    "output 0, 2xi32, is written by no kernel": lambda x: jnp.arange(2),
    "of 2 arguments 1 are used": lambda x, y: calls.route_forward(
        x[None], None, top_k=2, rule=RoutingConfig("default").rule, implementation="mosaic"
    ),
    "a tensor of i4": lambda x: jax.lax.bitcast_convert_type(x, jnp.int4),
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_operations_are_refused_by_name(message):
    with pytest.raises(NotLaunchable, match=message):
        of(REFUSED[message], *[like("float32", 8)] * (2 if "arguments" in message else 1))


def test_layers_that_xla_has_a_part_in_are_refused():
    with pytest.raises(NotLaunchable, match=r"stablehlo\.\w+ of .* is no Mosaic kernel"):
        Program.of(experts(16, "float32", "xla"))
    with pytest.raises(NotLaunchable, match=r"stablehlo\.reduce"):  # one scale for all rows
        Program.of(quantized(300, "fp8_tensor"))


def test_other_custom_calls_and_an_output_that_is_given_twice_are_refused():
    with pytest.raises(NotLaunchable, match="the custom call elsewhere is no Mosaic kernel"):
        of(lambda x: jax.ffi.ffi_call("elsewhere", x)(x), like("float32", 8))

    def twice(logits):
        topk = calls.route_forward(
            logits, None, top_k=TOP_K, rule=RoutingConfig("renormalize").rule, implementation="mosaic"
        )
        return topk.ids, topk.weights, topk.ids

    with pytest.raises(NotLaunchable, match="output 2, 16x2xi32, is output 0 again"):
        of(twice, like("float32", 16, EXPERTS))


@given(
    st.lists(
        st.tuples(st.integers(0, 4000), st.integers(0, 6), st.integers(0, 6)).map(
            lambda s: Span(s[0], min(s[1:]), max(s[1:]))
        ),
        max_size=12,
    )
)
def test_buffers_that_live_at_the_same_time_lie_apart(spans):
    offsets, total = arrange(spans)
    ends = [offset + span.size for offset, span in zip(offsets, spans, strict=True)]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert max(ends, default=0) <= total <= sum(-(-span.size // ALIGNMENT) * ALIGNMENT for span in spans)
    for i in range(len(spans)):
        for j in range(i):
            together = any(
                spans[i].first <= t <= spans[i].last and spans[j].first <= t <= spans[j].last for t in range(7)
            )
            if together and spans[i].size and spans[j].size:
                assert ends[i] <= offsets[j] or ends[j] <= offsets[i]


def test_memory_is_used_again():
    spans = [Span(1000, step, step + 1) for step in range(10)]
    assert arrange(spans)[1] == 2 * 1024
