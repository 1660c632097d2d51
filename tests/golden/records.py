"""Golden records: what official models compute with weights and images that `fill` makes from names alone."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from golden import fill

_FOLDER = Path(__file__).parent


class Record(NamedTuple):
    state_dict: dict[str, Tensor]  # with official keys
    images: Tensor
    arrays: dict[str, np.ndarray]
    tolerance: float
    num_params: int

    def blocks(self) -> list[int]:
        """Blocks, counted from 0, whose output is recorded."""
        return sorted(int(match[1]) for name in self.arrays if (match := re.fullmatch(r"block(\d+)_mean", name)))

    def check(self, name: str, mine: Tensor, *, tolerance: float | None = None) -> None:
        """Compares one output, a map (b, c, h, w) through its mean and deviation over space and 256 of its values.

        The record's own tolerance is for float32.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        if mine.ndim <= 2:
            pairs = [(mine, self.arrays[name])]
        else:
            sample = torch.from_numpy(np.linspace(0, mine.numel() - 1, 256).astype(int))
            reduced = mine.mean((2, 3)), mine.std((2, 3), correction=0), mine.flatten()[sample.to(mine.device)]
            pairs = [
                (ours, self.arrays[f"{name}_{kind}"])
                for ours, kind in zip(reduced, ("mean", "std", "sample"), strict=True)
            ]
        for ours, gold in pairs:
            error = np.abs(ours.float().cpu().numpy() - gold).max() / np.abs(gold).max()
            assert error < tolerance, f"{name}: error {error:.1e} of the peak, tolerance {tolerance:.1e}"


def load(name: str) -> Record:
    record = json.loads((_FOLDER / f"{name}.json").read_text())
    state = fill.state_dict(record["state_dict"], skip=record["computed_buffers"])
    for key, source in record["tied_keys"]:
        state[key] = state[source].clone()
    images = fill.image(record["input"]["shape"], record["input"]["seed"])
    arrays = dict(np.load(_FOLDER / f"{name}.npz"))
    return Record(state, images, arrays, record["tolerance"], record["num_params"])
