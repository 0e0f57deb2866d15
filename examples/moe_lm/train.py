"""Training: one step, and a run that can stop and go on."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import ParallelConfig
from moe_jax.nn import balance, sown, sown_sum
from moe_lm.data import Batches
from moe_lm.model import ByteLM, ModelConfig

BALANCING = ("aux", "bias", "z", "none")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        steps: of the whole run; the learning rate falls to a tenth over them.
        learning_rate: the largest, after `warmup` steps.
        balancing: ``aux``, a load-balancing loss; ``bias``, DeepSeek-V3's bias without a loss; ``z``, the router z-loss alone
            (which keeps logits small, and balances nothing); ``none``.
        aux_coefficient, z_coefficient: of the losses, for the mean over layers.
        bias_rate: step of the bias.
        seed: of the parameters and of the data.
        devices: over how many the batch and the experts are split.
    """

    steps: int = 300
    learning_rate: float = 3e-3
    warmup: int = 20
    balancing: str = "aux"
    aux_coefficient: float = 2e-2
    z_coefficient: float = 1e-3
    bias_rate: float = 1e-2
    seed: int = 0
    devices: int = 1

    def __post_init__(self) -> None:
        if self.balancing not in BALANCING:
            raise ValueError(f"balancing={self.balancing!r} must be one of {', '.join(BALANCING)}")

    @property
    def rates(self) -> dict[str, float]:
        """What the step multiplies each way of balancing with: arguments of one compiled function, zero for the others."""
        rates = {"aux": self.aux_coefficient, "z": self.z_coefficient, "bias": self.bias_rate}
        return {name: rate if name == self.balancing else 0.0 for name, rate in rates.items()}


class Trainer:
    """A model, its optimizer, and the step that both take.

    Args:
        model: sizes.
        train: how.
    """

    def __init__(self, model: ModelConfig, train: TrainConfig):
        self.config, self.step = train, 0
        self.mesh = parallel = None
        if train.devices > 1:
            self.mesh = jax.make_mesh((train.devices,), ("dp",), axis_types=(AxisType.Auto,))
            parallel = ParallelConfig.of_mesh(self.mesh, enable_expert_parallel=True)
        rules = (("expert", "dp"), ("embed", None), ("mlp", None))
        with contextlib.ExitStack() as stack:
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
                stack.enter_context(nnx.logical_axis_rules(rules))
            schedule = (train.learning_rate, min(train.warmup, train.steps - 1), train.steps)
            self.model, self.optimizer = make(model, schedule, train.seed, parallel, self.mesh)
            if self.mesh is not None:  # experts in parts, everything else on every device
                for part in (self.model, self.optimizer):
                    state = nnx.state(part)
                    nnx.update(part, jax.device_put(state, nnx.get_named_sharding(state, self.mesh)))

    def __call__(self, batch: np.ndarray) -> dict[str, Any]:
        """One step on a batch ``[B, S + 1]``; returns its loss (of the bytes alone) and the expert loads ``[L, E]``."""
        if self.mesh is not None:
            batch = jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec("dp")))
        loss, loads = train_step(self.model, self.optimizer, batch, self.config.rates)
        self.step += 1
        return {"step": self.step, "loss": float(loss), "loads": np.asarray(loads).tolist()}

    def state(self) -> dict[str, Any]:
        """All that a run goes on from."""
        return {"model": nnx.state(self.model), "optimizer": nnx.state(self.optimizer)}


@nnx.jit(static_argnums=(0, 1, 2, 3, 4))
def make(
    model: ModelConfig, schedule: tuple[float, int, int], seed: int, parallel: ParallelConfig | None, mesh: Mesh | None
) -> tuple[ByteLM, nnx.Optimizer]:
    """A model with its first parameters, and its optimizer; `schedule` is the learning rate, its warmup and all steps."""
    peak, warmup, steps = schedule
    lm = ByteLM(model, rngs=nnx.Rngs(seed), parallel=parallel, mesh=mesh)
    rate = optax.warmup_cosine_decay_schedule(0.1 * peak, peak, warmup, steps, 0.1 * peak)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.01))
    return lm, nnx.Optimizer(lm, tx, wrt=nnx.Param)


@nnx.jit
def train_step(
    model: ByteLM, optimizer: nnx.Optimizer, batch: jax.Array, rates: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """One step on a batch ``[B, S + 1]``: loss, gradients, optimizer, and the step of the correction bias.

    Returns:
        The loss of the bytes alone, and the expert loads ``[L, E]``.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:]

    def total(model: ByteLM) -> tuple[jax.Array, Any]:
        logits, intermediates = nnx.capture(model, nnx.Intermediate)(inputs)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        penalty = rates["aux"] * sown_sum(intermediates, "load_balancing_loss")
        penalty += rates["z"] * sown_sum(intermediates, "router_z_loss")
        return loss + penalty / len(model.blocks), (loss, intermediates)

    gradients, (loss, intermediates) = nnx.grad(total, has_aux=True)(model)
    optimizer.update(model, gradients)
    balance(model, intermediates, rates["bias"])
    return loss, jnp.stack(list(sown(intermediates, "expert_loads").values()))


def violation(loads: Any) -> float:
    """How far the busiest expert of a layer is above the mean, of it, averaged over layers ``[L, E]``: 0 is balance."""
    return float(np.mean([max(layer) / np.mean(layer) - 1.0 for layer in loads]))


class Checkpoints:
    """The states of a run in a folder, with its records: ``metrics.jsonl`` has a line for each step.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder).resolve()
        self.manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def save(self, trainer: Trainer, records: list[dict[str, Any]]) -> None:
        """Writes the state after `trainer.step` steps."""
        self.manager.save(trainer.step, args=ocp.args.StandardSave(trainer.state()))
        self.manager.wait_until_finished()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.folder / "metrics.jsonl").write_text(lines)

    def restore(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Brings a trainer to the newest state, onto its own devices, and returns the records up to it; none: a new run."""
        step = self.manager.latest_step()
        if step is None:
            return []
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, trainer.state())
        state = self.manager.restore(step, args=ocp.args.StandardRestore(abstract))
        nnx.update(trainer.model, state["model"])
        nnx.update(trainer.optimizer, state["optimizer"])
        trainer.step = step
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["step"] <= step]


def run(
    trainer: Trainer,
    batches: Batches,
    *,
    until: int | None = None,
    checkpoints: Checkpoints | None = None,
    every: int = 100,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Steps up to number `until` (all of them by default), from a checkpoint if there is one; returns all records."""
    records = [] if checkpoints is None else checkpoints.restore(trainer)
    until = trainer.config.steps if until is None else until
    while trainer.step < until:
        records.append(trainer(batches(trainer.step)))
        report(records[-1])
        if checkpoints is not None and (trainer.step % every == 0 or trainer.step == until):
            checkpoints.save(trainer, records)
    return records
