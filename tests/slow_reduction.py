"""Token reduction written out: one sample, one token, one step at a time, by numbers of tokens instead of index tables.

It shares with `vssm.pruning` only the rule for the number of tokens left. Everything is slow on purpose.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vssm.layers.ss2d import SS2D
from vssm.layers.ssm import SelectiveSSM
from vssm.models._base import GridBackbone, TokenBackbone
from vssm.models.plainmamba import PlainMambaMixer
from vssm.models.vim import VimMixer
from vssm.pruning import count_kept
from vssm.scan_order import scan_moves, scan_order

Stream = dict[int, Tensor]  # token, numbered as before the first cut, to its values (c,)


class SlowReducer:
    """Computes what `vssm.pruning.TokenReducer` promises, on the model in double precision."""

    def __init__(self, model: nn.Module, *, after, keep: float, policy: str, align: str, conv: str) -> None:
        self.model, self.after, self.keep, self.policy = model, after, keep, policy
        self.align, self.conv = align, conv
        self.kept: dict[int, list[list[int]]] = {cut: [] for cut in after}
        self.intermediates: list[list[Tensor]] = []

    def logits(self, images: Tensor) -> Tensor:
        return torch.cat([self._one(image[None]) for image in images])

    def _one(self, image: Tensor) -> Tensor:
        model, index = self.model, 0
        self.intermediates.append([])
        if isinstance(model, TokenBackbone):
            x, size = model._embed(image)
            x, _ = self._stage(x[0], model.blocks, size, model.class_token_index(x.shape[1]), index)
            return model.forward_head(model.norm(x[None]))
        assert isinstance(model, GridBackbone)
        x = model.stem(image)
        for stage in model.stages:
            x = stage.downsample(x)
            size = x.shape[1:3]
            tokens, index = self._stage(x[0].flatten(0, 1), stage.blocks, size, None, index)
            x = tokens.unflatten(0, size)[None]
        return model.forward_head(x)

    def _stage(self, x: Tensor, blocks, size, class_token, index: int) -> tuple[Tensor, int]:
        stream: Stream = dict(enumerate(x))
        weight = dict.fromkeys(stream, 1)
        holder: dict[int, int] = {}  # of merged tokens
        left: Stream = {}  # dropped tokens with their last values
        for block in blocks:
            index += 1
            before = stream
            stream, y, step = _run_block(block, stream, size, len(x), self.align, self.conv)
            if index in self.after:
                count = count_kept(len(stream), self.keep, class_token=class_token is not None)
                fate = _fate(self.policy, before, stream, y, step, count, class_token)
                stream, weight = _apply(fate, before, stream, weight, left, holder)
                self.kept[index].append(sorted(stream))
            self.intermediates[-1].append(_all_tokens(stream, left, holder, len(x)))
        return _all_tokens(stream, left, holder, len(x)), index


def _all_tokens(stream: Stream, left: Stream, holder: dict[int, int], tokens: int) -> Tensor:
    values = []
    for token in range(tokens):
        while token in holder:
            token = holder[token]
        values.append(stream[token] if token in stream else left[token])
    return torch.stack(values)


def _fate(policy: str, before: Stream, stream: Stream, y: Stream, step: Stream, count: int, class_token) -> dict:
    """For each token that goes: None, or the token it is merged into and whether its hidden part is merged too."""
    free = [token for token in sorted(stream) if token != class_token]
    gone = len(stream) - count
    hidden = {token: F.normalize(stream[token] - before[token], dim=0) for token in stream}
    clipped = {token: sum(max(0.0, value) for value in y[token].tolist()) for token in free}

    def closest(source: int, targets: list[int]) -> tuple[float, int]:
        return max((float(hidden[source] @ hidden[target]), target) for target in targets)

    if policy == "top":
        return dict.fromkeys(sorted(free, key=clipped.__getitem__)[:gone])
    if policy == "merge":
        pairs = sorted(((*closest(source, free[1::2]), source) for source in free[::2]), reverse=True)[:gone]
        return {source: (target, True) for _, target, source in pairs}
    if policy == "mtr":
        ranked = sorted(free, key=lambda token: float(step[token]))
        return {source: (closest(source, ranked[gone : 2 * gone])[1], True) for source in ranked[:gone]}
    ranked = sorted(free, key=clipped.__getitem__)
    half = len(ranked) // 2
    pairs = sorted(((*closest(source, ranked[half:]), source) for source in ranked[:half]), reverse=True)[:gone]
    return {source: (target, rank >= round(gone / 2)) for rank, (_, target, source) in enumerate(pairs)}


def _apply(fate: dict, before: Stream, stream: Stream, weight: dict, left: Stream, holder: dict) -> tuple[Stream, dict]:
    kept = {}
    heavier = {}
    for token in sorted(set(stream) - set(fate)):
        members = [token] + [each for each, goal in fate.items() if goal is not None and goal[0] == token]
        speaking = [each for each in members if each == token or fate[each][1]]
        old = _weighted({each: before[each] for each in members}, weight)
        added = _weighted({each: stream[each] - before[each] for each in speaking}, weight)
        kept[token] = old + added
        heavier[token] = sum(weight[each] for each in members)
    for token, goal in fate.items():
        if goal is None:
            left[token] = stream[token]
        else:
            holder[token] = goal[0]
    return kept, heavier


def _weighted(values: Stream, weight: dict) -> Tensor:
    return sum(weight[token] * value for token, value in values.items()) / sum(weight[token] for token in values)


def _run_block(block, stream: Stream, size, tokens: int, align: str, conv: str):
    """The block's output, and per token what out_proj reads and the score of its steps."""
    seen = {}
    if align == "mask" or len(stream) == tokens:
        whole = torch.zeros(tokens, len(next(iter(stream.values()))), dtype=torch.float64)
        for token, value in stream.items():
            whole[token] = value
        handles = [
            block.mixer.out_proj.register_forward_pre_hook(lambda _, args: seen.update(y=args[0][0])),
            block.mixer.ssm.register_forward_pre_hook(lambda _, args: seen.update(u=args[0])),
        ]
        out = block(whole[None], size)[0]
        for handle in handles:
            handle.remove()
        step = block.mixer.ssm.step(seen["u"])[0].mean(-1).sum(-1)
        return tuple({token: value[token] for token in stream} for value in (out, seen["y"], step))
    names = sorted(stream)
    x = torch.stack([stream[token] for token in names])
    mixed, y, step = _run_mixer(block.mixer, block.norm1(x), names, size, tokens, align, conv)
    x = x + mixed
    if hasattr(block, "mlp"):
        x = x + block.mlp(block.norm2(x))
    return tuple(dict(zip(names, value, strict=True)) for value in (x, y, step))


def _run_mixer(mixer, x: Tensor, names: list[int], size, tokens: int, align: str, conv: str):
    projected = mixer.in_proj(x)
    gated = not isinstance(mixer, SS2D) or mixer.gate
    u, z = projected.chunk(2, dim=-1) if gated else (projected, None)

    nothing = torch.zeros(1, tokens, u.shape[1], dtype=u.dtype)

    def on_grid(layer, *more):
        whole = nothing.clone()
        whole[0, names] = u
        return layer(whole, *more)[0, names]

    if isinstance(mixer, VimMixer):
        u = on_grid(mixer.conv) if conv == "grid" else mixer.conv(u[None])[0]
        y = sum(
            _scan(mixer.ssm, u[:, i], names, walk, align, parameters=i, idle=mixer.conv(nothing)[0, 0, i])
            for i, walk in enumerate((range(tokens), range(tokens - 1, -1, -1)))
        )
    else:
        u, idle = (F.silu(layer) for layer in (on_grid(mixer.conv, size), mixer.conv(nothing, size)[0, 0]))
        if isinstance(mixer, PlainMambaMixer):
            walks, moves = scan_order("snake", *size).tolist(), scan_moves("snake", *size).tolist()
            y = sum(
                _scan(mixer.ssm, u, names, walk, align, parameters=0, idle=idle, moves=way)
                for walk, way in zip(walks, moves, strict=True)
            )
        else:
            walks = scan_order("cross", *size).tolist()
            y = sum(_scan(mixer.ssm, u, names, walk, align, parameters=i, idle=idle) for i, walk in enumerate(walks))
            y = mixer.out_norm(y)
    step = mixer.ssm.step(u[None])[0].mean(-1).sum(-1)
    y = y if z is None else y * F.silu(z)
    return mixer.out_proj(y) / (2 if isinstance(mixer, VimMixer) else 1), y, step


def _scan(
    ssm: SelectiveSSM, u: Tensor, names, walk, align: str, *, parameters: int, idle: Tensor, moves=None
) -> Tensor:
    """One direction: walks over all tokens, stops at those that are there, and decays over others, if at all."""
    weight = ssm.x_proj.weight.unflatten(0, (ssm.directions, -1))[parameters]
    dt, B, C = (torch.cat([u, idle[None]]) @ weight.T).split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
    step = F.softplus(dt @ ssm.dt_weight[parameters].T + ssm.step_bias[parameters])
    rest = {"decay": F.softplus(ssm.step_bias[parameters]), "idle": step[-1]}.get(align)
    A = -ssm.A_log[parameters].exp()
    place = {token: i for i, token in enumerate(names)}
    state = torch.zeros_like(A)
    y = torch.zeros_like(u)
    visited = 0
    for at, token in enumerate(walk):
        if token not in place:
            state = state if rest is None else torch.exp(rest[:, None] * A) * state
            continue
        i = place[token]
        row = i if moves is None else visited  # PlainMamba reads the parameters in raster order
        B_s = B[row] if moves is None else B[row] + ssm.move_B[moves[at]]
        state = torch.exp(step[row][:, None] * A) * state + step[row][:, None] * B_s * u[i][:, None]
        y[i] = (state * C[row]).sum(-1) + ssm.D[parameters] * u[i]
        visited += 1
    return y
