"""`MoETestConfig`: one combination of everything that the layer suite varies, and its name."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass

from moe_jax.config import MoEConfig, RoutingConfig
from moe_jax.parallel import ParallelConfig
from moe_jax.quantization import quant_format

ACTIVATION = "silu"


@dataclass(frozen=True)
class MoETestConfig:
    """One run of the layer suite. Whether it can be run at all says `moe_jax.layer_test.is_valid_config`.

    Attributes:
        m: rows of each shard of tokens; how many of them are tokens differs from shard to shard.
        n: intermediate size I of an expert.
        k: hidden size H of the layer.
        num_experts, top_k: E and the experts of a token.
        in_dtype: of the hidden states and of weights that are not quantized.
        quantization: the name of a number format, or None.
        use_shared_experts: add a shared expert.
        use_gate: compute the router logits in the layer, from the hidden states that the routed experts get.
        use_routed_input_transform: routed experts of half the hidden size, between two projections; the shared expert sees all.
        enable_eplb: balance the load of the experts.
        backend: the exchange, a name of `moe_jax.layer_test.support.BACKENDS`; None on one device.
        ep_size, dp_size, tp_size: ranks of expert, data and tensor parallelism; `ep_size` is 1 or the product of the others.
        sequence_parallel: whether the ranks of tensor parallelism split the tokens. None: if they hold whole experts and there is
            an exchange.
        quantize_before: let codes travel, and not hidden states.

    Source: the arguments of vLLM's ``MoETestConfig``, and two of our own at the end.

    Example:
        >>> config = MoETestConfig(32, 256, 512, 8, 2, "bfloat16", "fp8_block", True, False, False, ep_size=2, dp_size=2,
        ...                        backend="all_to_all")
        >>> config.id()
        '[32-256-512-8-2-bfloat16-fp8_block-True-False-False-False-all_to_all-2-2-1-None-False]'
        >>> MoETestConfig.from_id(config.id()) == config
        True
    """

    m: int
    n: int
    k: int
    num_experts: int
    top_k: int
    in_dtype: str
    quantization: str | None
    use_shared_experts: bool
    use_gate: bool
    use_routed_input_transform: bool
    enable_eplb: bool = False
    backend: str | None = None
    ep_size: int = 1
    dp_size: int = 1
    tp_size: int = 1
    sequence_parallel: bool | None = None
    quantize_before: bool = False

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether the ranks of tensor parallelism hold tokens of their own."""
        if self.sequence_parallel is not None:
            return self.sequence_parallel
        return self.ep_size > 1 and self.tp_size > 1 and self.backend not in ("no_exchange", "batched_no_exchange")

    @property
    def world_size(self) -> int:
        """Devices."""
        return self.dp_size * self.tp_size

    @property
    def routed_hidden_size(self) -> int:
        """H of the routed experts."""
        return self.k // 2 if self.use_routed_input_transform else self.k

    @property
    def parallel(self) -> ParallelConfig:
        """The ranks."""
        return ParallelConfig(
            tp_size=self.tp_size,
            dp_size=self.dp_size,
            enable_expert_parallel=self.ep_size > 1,
            sequence_parallel=self.is_sequence_parallel,
        )

    @property
    def moe_config(self) -> MoEConfig:
        """The layer."""
        return MoEConfig(
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_size=self.routed_hidden_size,
            intermediate_size=self.n,
            activation=ACTIVATION,
            routing=RoutingConfig("renormalize"),
            dtype=self.in_dtype,
            quantization=None if self.quantization is None else quant_format(self.quantization),
            num_shared_experts=int(self.use_shared_experts),
            shared_intermediate_size=self.n if self.use_shared_experts else 0,
        )

    def id(self) -> str:
        """Its name: all values in order."""
        return f"[{'-'.join(str(value) for value in dataclasses.astuple(self))}]"

    @classmethod
    def from_id(cls, text: str) -> MoETestConfig:
        """The config of that name.

        Raises:
            ValueError: a name of other parts.
        """
        fields, parts = dataclasses.fields(cls), text.strip().removeprefix("[").removesuffix("]").split("-")
        if len(parts) != len(fields):
            names = "-".join(field.name for field in fields)
            raise ValueError(f"{text!r} has {len(parts)} parts, but the name of a config is [{names}]")
        kinds = typing.get_type_hints(cls)
        return cls(
            **{
                field.name: _parse(field.name, kinds[field.name], part)
                for field, part in zip(fields, parts, strict=True)
            }
        )


def _parse(name: str, kind: type | types.UnionType, text: str) -> int | bool | str | None:
    """A value from its text, by the annotation of the field."""
    kinds = typing.get_args(kind) or (kind,)
    if text == "None" and type(None) in kinds:
        return None
    if bool in kinds and text in ("True", "False"):
        return text == "True"
    if int in kinds and text.isdecimal():
        return int(text)
    if str in kinds:
        return text
    raise ValueError(f"{name}={text!r} is no {kind}")
