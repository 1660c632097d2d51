"""Deterministic weights for a golden record: the same tensors on every machine.

A golden record (NAME.json + NAME.npz in this folder) pins down what an official model computes.
It lists the official state dict as (key, shape) pairs; the weights are not stored, they are
regenerated from the keys alone, so that a checkpoint in the official format can be made anywhere:

    record = json.load(open("NAME.json"))
    state = fill.state_dict(record["state_dict"], skip=record["computed_buffers"])
    images = fill.image(record["input"]["shape"], record["input"]["seed"])

The scales keep activations finite through deep networks and every branch alive, so a wrong layer
shows in the outputs.
"""

import re
import zlib

import numpy as np
import torch


def tensor(key: str, shape) -> torch.Tensor:
    """The float32 tensor of `shape` that belongs to the state-dict key `key`."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    shape = tuple(shape)
    name = key.lower()
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.long)
    noise = rng.standard_normal(shape).astype(np.float32) if shape else np.float32(rng.standard_normal())
    if "a_log" in last or "a_b_log" in last:  # A = -exp(A_log), last axis is the state axis
        base = np.log(np.arange(1, shape[-1] + 1, dtype=np.float32))
        value = base + 0.1 * noise
    elif re.fullmatch(r"d(s|_b|_\d+)?", last):  # D: below 1, so that the state counts beside it
        value = 0.3 + 0.1 * noise
    elif ("dt_proj" in name and last.endswith("bias")) or last == "dt_bias":
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), size=shape)).astype(np.float32)
        value = dt + np.log(-np.expm1(-dt))  # inverse of softplus
    elif last == "running_mean":
        value = 0.1 * noise
    elif last == "running_var":
        value = 1.0 + 0.1 * np.abs(noise)
    elif last.startswith("gamma") or "scale" in last or "layer_scale" in name:  # large enough that its branch counts
        value = 0.5 + 0.1 * noise
    elif len(shape) <= 1 and last.endswith("weight"):  # scale of a normalisation
        value = 1.0 + 0.1 * noise
    elif len(shape) <= 1:  # bias and other vectors
        value = 0.05 * noise
    elif "rpb" in name:  # relative position bias of attention
        value = 0.5 * noise
    elif "pos_embed" in name or "cls_token" in name or "token" in last:
        value = 0.02 * noise
    elif last in ("x_proj_weight", "dt_projs_weight"):  # linear layers stacked over directions: (k, out, in)
        value = noise / np.sqrt(max(shape[-1], 1))
    else:
        fan_in = int(np.prod(shape[1:]))
        value = noise / np.sqrt(max(fan_in, 1))
        if ".cpe" in name:  # convolution added to a bare residual stream: keep the stream bounded
            value = 0.1 * value
    return torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)).reshape(shape)


def state_dict(entries, skip=()) -> dict:
    """A state dict for `entries`, the (key, shape) pairs of a record; `skip`: buffers the model computes itself."""
    return {key: tensor(key, shape) for key, shape in entries if key not in set(skip)}


def image(shape, seed: int = 0) -> torch.Tensor:
    """The standard-normal input image batch of `shape`, (batch, channels, height, width)."""
    rng = np.random.Generator(np.random.PCG64(1000 + seed))
    return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))
