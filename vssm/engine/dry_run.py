"""Two steps of a training run that writes nothing: does it fit into memory, and how long would it take?"""

import time
from dataclasses import replace

import torch

from vssm.engine import distributed
from vssm.engine.progress import peak_memory_mib
from vssm.engine.recipe import Recipe
from vssm.engine.training_setup import Setting, initial_state, network_of, prepare
from vssm.engine.training_step import NonFiniteLoss, train_step


def dry_run(recipe: Recipe, setting: Setting) -> dict[str, float | int]:
    """Builds everything that `vssm.engine.train.train` builds and takes two steps, on the first batch of two epochs.

    Args:
        recipe: What to do.
        setting: Where; nothing is written into its folder.

    Returns:
        ``peak_memory_mib`` (of the GPU, or else of the whole process), ``images_per_s`` of the second step, data
        already there, ``steps`` of the whole run, and ``seconds`` that so many would take, evaluation not counted.

    Raises:
        ValueError: As `vssm.engine.train.train`.
    """
    with distributed.joined(setting.device) as device:
        run = prepare(recipe, replace(setting, device=device), fresh=True)
        state = initial_state(run)
        network = network_of(run, state)
        state.model.train()
        seconds = images = 0.0
        for epoch in range(2):
            run.batches.begin(epoch)
            batch = next(iter(run.loader))
            start = time.perf_counter()
            try:
                with state.reducing():
                    images = train_step(run, state, network, batch).images
            except NonFiniteLoss as failure:
                raise ValueError(f"train: {failure} at step {epoch + 1}") from failure
            state.step += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
        steps = recipe.epochs * len(run.batches)
        return {
            "peak_memory_mib": peak_memory_mib(device),
            "images_per_s": images / seconds,
            "steps": steps,
            "seconds": steps * seconds,
        }
