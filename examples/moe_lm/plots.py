"""Pictures of a run."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np


def save_plots(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws ``loss.png`` and ``expert_load.png`` into a folder."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [record["step"] for record in records]
    fig, panel = plt.subplots(figsize=(6, 3))
    panel.plot(steps, [record["loss"] for record in records], linewidth=1)
    panel.set(title="loss of the next byte (nats)", xlabel="step")
    fig.tight_layout()
    fig.savefig(folder / "loss.png", dpi=120)
    plt.close(fig)

    loads = np.array([record["loads"] for record in records], float)  # [steps, L, E]
    shares = loads / loads.sum(-1, keepdims=True) * loads.shape[-1]
    layers = loads.shape[1]
    fig, panels = plt.subplots(layers, 1, figsize=(6, 1.2 + 1.3 * layers), sharex=True, squeeze=False)
    for layer, panel in enumerate(panels[:, 0]):
        extent = (steps[0], steps[-1] + 1, loads.shape[-1] - 0.5, -0.5)
        image = panel.imshow(shares[:, layer].T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, extent=extent)
        panel.set(ylabel=f"layer {layer}\nexpert")
    panels[0, 0].set_title("load of each expert, 1 is an even share")
    panels[-1, 0].set_xlabel("step")
    fig.colorbar(image, ax=panels[:, 0].tolist())
    fig.savefig(folder / "expert_load.png", dpi=120)
    plt.close(fig)
    return [folder / "loss.png", folder / "expert_load.png"]
