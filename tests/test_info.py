"""Counts of ``vssm info`` against formulas written out here."""

import json
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import vssm
from vssm.cli import main
from vssm.engine.info import Counts, count_parts, describe
from vssm.models.a2mamba import ChannelAffine


def vim_counts(*, height: int, width: int, batch: int = 1) -> Counts:
    """Vim-Ti by hand: 24 blocks of width 192, two directions, one class token, patches of 16 pixels."""
    depth, c, d, n, r, taps, k, classes = 24, 192, 384, 16, 12, 4, 2, 1000
    patches = (height // 16) * (width // 16)
    tokens = patches + 1
    patch_weights = 3 * 16 * 16 * c
    block_params = (
        c  # norm
        + c * 2 * d  # in_proj
        + k * (d * taps + d)  # convolutions
        + k * d * (r + 2 * n)  # x_proj
        + k * (r * d + d)  # dt_proj
        + k * (d * n + d)  # A_log, D
        + d * c  # out_proj
    )
    block_macs_per_token = c * 2 * d + k * d * (r + 2 * n) + k * r * d + d * c
    return Counts(
        params=patch_weights + c + c + tokens * c + depth * block_params + c + c * classes + classes,
        matmul_macs=batch * (depth * tokens * block_macs_per_token + c * classes),
        conv_macs=batch * (patches * patch_weights + depth * k * tokens * d * taps),
        scan_ops=batch * depth * 9 * k * d * tokens * n,
        activations=batch * (patches * c + depth * tokens * (2 * d + k * d + k * (r + 2 * n) + d + c) + classes),
    )


def vmamba_stem(c: int, cells: int, *, first: bool) -> Counts:
    """One convolution of 4×4 in the first version; two of 3×3 since then, through half the channels."""
    if first:
        return Counts(params=48 * c + 3 * c, conv_macs=cells * 48 * c, activations=cells * c)
    half = c // 2
    return Counts(
        params=27 * half + 3 * half + 9 * half * c + 3 * c,
        conv_macs=4 * cells * 27 * half + cells * 9 * half * c,
        activations=4 * cells * half + cells * c,
    )


def vmamba_downsample(c: int, cells: int, *, first: bool) -> Counts:
    """To width c: a linear layer after a norm, on 4·c/2 channels; a 3×3 convolution before a norm since then."""
    if first:
        return Counts(params=2 * c * c + 2 * 2 * c, matmul_macs=cells * 2 * c * c, activations=cells * c)
    weights = 9 * (c // 2) * c
    return Counts(params=weights + 3 * c, conv_macs=cells * weights, activations=cells * c)


def vmamba_block(c: int, tokens: int, *, expand: int, n: int, first: bool) -> Counts:
    """With a gate and a bias in the convolution in the first version, with an MLP since then."""
    k, d, r = 4, expand * c, math.ceil(c / 16)
    into = 2 * d if first else d
    weights = c * into + d * c + k * d * (r + 2 * n) + k * r * d
    vectors = 2 * c + 9 * d + k * d + k * (d * n + d) + 2 * d  # norm1, convolution, dt_bias, A_log and D, out_norm
    activations = into + d + k * (r + 2 * n) + d + c
    if first:
        vectors += d
    else:
        weights += 2 * 4 * c * c
        vectors += 2 * c + 4 * c + c
        activations += 4 * c + c
    return Counts(weights + vectors, tokens * weights, tokens * 9 * d, tokens * 9 * k * d * n, tokens * activations)


def pyramid_counts(
    width: int, depths: tuple[int, ...], block: Callable[[int, int], Counts], *, first: bool
) -> dict[str, Counts]:
    """Parts by hand, at 224 × 224, of a model with VMamba's stem and downsampling and a block of width and tokens."""
    side = 56
    parts = {"stem": vmamba_stem(width, side**2, first=first)}
    for i, depth in enumerate(depths):
        if i > 0:
            width, side = 2 * width, side // 2
        parts[f"stages.{i}"] = vmamba_downsample(width, side**2, first=first) if i > 0 else Counts()
        for _ in range(depth):
            parts[f"stages.{i}"] = parts[f"stages.{i}"].plus(block(width, side**2))
    head = Counts(params=width * 1000 + 1000, matmul_macs=width * 1000, activations=1000)
    return parts | {"norm": Counts(params=2 * width), "head": head}


def vmamba_counts(
    width: int, depths: tuple[int, ...], *, expand: int = 2, n: int = 1, first: bool = False
) -> dict[str, Counts]:
    return pyramid_counts(width, depths, partial(vmamba_block, expand=expand, n=n, first=first), first=first)


def half_resolution(tokens: int) -> int:
    return math.ceil(math.sqrt(tokens) / 2) ** 2


def msvmamba_block(c: int, tokens: int, *, v3: bool) -> Counts:
    """One scan at full and three at half resolution, each resolution with a parameter set of its own; one state."""
    half, d, r = half_resolution(tokens), c if v3 else 2 * c, math.ceil(c / 16)
    into, hidden, squeezed = d if v3 else 2 * d, (4 if v3 else 2) * c, d // 8
    projections = d * (r + 2) + r * d  # of one token of either resolution
    per_token = c * into + projections + d * c + 2 * c * hidden
    vectors = (
        4 * c + 2 * (3 * d) + 2 * d + hidden + c
    )  # norm1 and norm2; dt_bias, A_log, D; out_norm; biases of the MLP
    convolutions = (9 + 1) * d + (49 + 1) * d + (9 + 1) * hidden
    written_per_token = into + d + (r + 2) + d + c + 2 * hidden + c
    return Counts(
        params=per_token + projections + 2 * d * squeezed + vectors + convolutions,
        matmul_macs=tokens * per_token + half * projections + 2 * d * squeezed,
        conv_macs=tokens * 9 * (d + hidden) + half * 49 * d,
        scan_ops=9 * d * (tokens + 3 * half),
        activations=tokens * written_per_token + half * (d + r + 2 + (d if v3 else 3 * d)) + squeezed + d,
    )


def msvmamba_counts(width: int, depths: tuple[int, ...], *, v3: bool = False) -> dict[str, Counts]:
    return pyramid_counts(width, depths, partial(msvmamba_block, v3=v3), first=not v3)


def evss_block(c: int, tokens: int) -> Counts:
    """A scan in which each token belongs to one of four directions, beside a convolution; one gate, used on both."""
    k, d, n, r, squeezed = 4, 2 * c, 16, math.ceil(c / 16), c // 8
    of_directions = d * (r + 2 * n) + r * d
    gate = 2 * c * squeezed
    vectors = 2 * c + k * d + k * (d * n + d) + 2 * d + 2 * c + 2 * c + squeezed + c  # norms, dt_bias, A_log, D, gate
    convolutions = (9 + 1) * d + (9 + 1) * c + c * c + c
    written_per_token = 2 * d + d + (r + 2 * n) + d + c + c + c
    return Counts(
        params=c * 2 * d + k * of_directions + d * c + gate + vectors + convolutions,
        matmul_macs=tokens * (c * 2 * d + of_directions + d * c) + 2 * gate,
        conv_macs=tokens * (9 * d + 9 * c + c * c),
        scan_ops=tokens * 9 * d * n,
        activations=tokens * written_per_token + 2 * (squeezed + c),
    )


def inverted_residual(c: int, tokens: int) -> Counts:
    h = 4 * c
    weights, squeeze = 2 * c * h + 9 * h, 2 * h * (h // 8)
    return Counts(
        params=weights + squeeze + 2 * h + 2 * h + 2 * c + h // 8 + h,
        conv_macs=tokens * weights + squeeze,
        activations=tokens * (2 * h + c) + h // 8 + h,
    )


def efficientvmamba_counts(width: int, depths: tuple[int, ...]) -> dict[str, Counts]:
    def block(c: int, tokens: int) -> Counts:
        return evss_block(c, tokens) if c < 4 * width else inverted_residual(c, tokens)

    return pyramid_counts(width, depths, block, first=True)


def vim2_channel_mixer(c: int, tokens: int, *, expand: int) -> Counts:
    """Linear layers of each token; along the channels in between, two directions of a convolution and a scan."""
    k, n, d, taps = 2, 16, expand * c, 4
    weights = c * 2 * d + d * c
    of_channels = k * (taps + 1) + k * (1 + 2 * n) + k + k + k * (n + 1)  # convolution, x_proj, dt, A_log and D
    return Counts(
        params=weights + of_channels + 2 * c,
        matmul_macs=tokens * weights,
        conv_macs=tokens * k * d * taps,
        scan_ops=tokens * 9 * k * d * n,
        activations=tokens * (2 * d + k * d + k * d + c),
    )


def vim2_counts(width: int, depths: tuple[int, ...]) -> dict[str, Counts]:
    """VMamba's first version with two of its blocks before each channel mixer, and weights of averages."""
    parts = pyramid_counts(width, (0, 0, 0, 0), vmamba_block_v0, first=True)
    for i, depth in enumerate(depths):
        c, tokens, mixers = width << i, (56 >> i) ** 2, 3 * depth
        channel = vim2_channel_mixer(c, tokens, expand=1 if i == 3 else 2)
        averages = Counts(params=sum(2 + earlier for earlier in range(mixers + 1)))
        block = total(vmamba_block_v0(c, tokens), vmamba_block_v0(c, tokens), channel)
        parts[f"stages.{i}"] = total(parts[f"stages.{i}"], averages, *[block] * depth)
    return parts


vmamba_block_v0 = partial(vmamba_block, expand=2, n=16, first=True)


class Windows:
    """A product of queries or weights with the tokens of a window, as it is done in tiles along both axes."""

    def __init__(self, side: int, window: int, dilation: int) -> None:
        tile, longest = window // 2 + 1, math.ceil(side / dilation)
        slots = dilation * math.ceil(longest / tile) * tile
        self.queries = slots**2
        self.pairs = (slots * min(longest, tile + window - 1)) ** 2  # of which side²·window² are neighbours

    def scores(self, heads: int, c: int) -> Counts:
        return Counts(matmul_macs=self.pairs * c, activations=self.pairs * heads)

    def sums(self, c: int) -> Counts:
        return Counts(matmul_macs=self.pairs * c, activations=self.queries * c)


def total(*counts: Counts) -> Counts:
    return Counts(*map(sum, zip(*counts, strict=True)))


def a2mamba_windows(side: int, window: int) -> tuple[Windows, Windows]:
    return Windows(side, window, 1), Windows(side, window, min(side // window, window))


def a2mamba_block(c: int, side: int, *, heads: int, window: int, h: int, scale: bool, last: bool) -> Counts:
    """Half of the heads attend to each of two windows; a scan mixed by them, or attention to all in the last stage."""
    tokens, r = side**2, math.ceil(c / 16)
    weights = 5 * c * c + 2 * c * h  # gate, in_proj and out_proj; the MLP
    convolutions = 2 * 9 * c + 25 * c + 9 * h  # cpe1 and cpe2, lepe, that of the MLP
    vectors = 9 * c + 2 * h + 4 * c * scale + 5 * 2 * c  # biases, scales, norms
    params = weights + convolutions + vectors + heads // 2 * (2 * window - 1) ** 2
    activations = c + 3 * c + c + c + 2 * c + h + h + c
    attention = total(
        *(part for win in a2mamba_windows(side, window) for part in (win.scores(heads // 2, c // 2), win.sums(c // 2)))
    )
    if last:
        every = Counts(
            params=heads * tokens**2, matmul_macs=2 * tokens**2 * c, activations=tokens**2 * heads + tokens * c
        )
        return total(Counts(params, tokens * weights, tokens * convolutions, 0, tokens * activations), attention, every)
    projections = c * (r + 2) + r * c
    params += projections + 26 * c + 3 * c + heads**2 + heads  # convolution; dt_bias, A_log, D; state_fusion
    again = total(*(win.sums(c // 2) for win in a2mamba_windows(side, window)))
    macs = tokens * (weights + projections)
    conv_macs = tokens * (convolutions + 25 * c + heads * c)
    activations += c + r + 2 + c + c
    return total(Counts(params, macs, conv_macs, tokens * 9 * c, tokens * activations), attention, again)


def a2mamba_counts(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    *,
    heads: tuple[int, ...],
    ratios: tuple[float, ...] = (4, 4, 3, 3),
    scaled: tuple[int, ...] = (),
) -> dict[str, Counts]:
    half, c = dims[0] // 2, dims[0]
    at_112, at_56 = 112**2 * half, 56**2 * c
    parts = {
        "stem": Counts(
            params=27 * half + 9 * half * (half + c) + 9 * c * c + 4 * (half + c),
            conv_macs=at_112 * (27 + 9 * half) + at_56 * (9 * half + 9 * c),
            activations=2 * at_112 + 2 * at_56,
        )
    }
    for i, (c, depth) in enumerate(zip(dims, depths, strict=True)):
        side = 56 >> i
        block = a2mamba_block(
            c, side, heads=heads[i], window=(11, 9, 7, 7)[i], h=int(c * ratios[i]), scale=i in scaled, last=i == 3
        )
        down = Counts()
        if i:
            taps = 9 * dims[i - 1] * c
            down = Counts(params=taps + 2 * c, conv_macs=side**2 * taps, activations=side**2 * c)
        parts[f"stages.{i}"] = total(down, *[block] * depth)
    parts["head"] = Counts(
        params=c * 1024 + 3 * 1024 + 1024 * 1000 + 1000,
        matmul_macs=49 * c * 1024 + 1024 * 1000,
        activations=49 * 1024 + 1000,
    )
    return parts


def groupmamba_stem(s: int, c: int) -> Counts:
    """A convolution of 7×7 and two of 3×3, without biases and through s channels, and a downsampling."""
    weights, outer = 147 * s + 2 * 9 * s * s, 112**2
    down = conv_downsample(s, c, 56**2)
    return Counts(params=weights + 3 * 2 * s, conv_macs=outer * weights, activations=3 * outer * s).plus(down)


def conv_downsample(before: int, c: int, tokens: int, *, norm: bool = True) -> Counts:
    weights = 9 * before * c
    vectors = 3 * c if norm else 0  # bias and norm
    return Counts(params=weights + vectors, conv_macs=tokens * weights, activations=tokens * c)


def groupmamba_block(c: int, tokens: int, ratio: int, *, conv: bool = True) -> Counts:
    """Four groups of a quarter of the channels, one direction and one parameter set each; one state."""
    d, hidden, squeezed, k = c // 4, ratio * c, c // 16, 4
    r = math.ceil(d / 16)
    per_token = k * (d * 2 * d + d * (r + 2) + r * d + d * d) + c * c + 2 * c * hidden
    gate = 2 * c * squeezed
    kernels = 9 * c + (9 * hidden if conv else 0)
    biases = c + squeezed + c + c + hidden + c + (hidden if conv else 0)  # of the convolutions, gate, proj and MLP
    vectors = 2 * c + 2 * c + 2 * c + 3 * c + 1  # norm, out_norm, norm2; dt_bias, A_log and D; skip_scale
    written_per_token = 2 * c + c + k * (r + 2) + c + c + c + hidden + (hidden if conv else 0) + c
    return Counts(
        params=per_token + gate + kernels + biases + vectors,
        matmul_macs=tokens * per_token + gate,
        conv_macs=tokens * kernels,
        scan_ops=tokens * 9 * c,
        activations=tokens * written_per_token + squeezed + c,
    )


def groupmamba_counts(stem: int, dims: tuple[int, ...], depths: tuple[int, ...]) -> dict[str, Counts]:
    parts = {"stem": groupmamba_stem(stem, dims[0])}
    for i, (c, depth, ratio) in enumerate(zip(dims, depths, (8, 8, 4, 4), strict=True)):
        tokens = (56 >> i) ** 2
        stage = conv_downsample(dims[i - 1], c, tokens) if i > 0 else Counts()
        for _ in range(depth):
            stage = stage.plus(groupmamba_block(c, tokens, ratio))
        parts[f"stages.{i}"] = stage.plus(Counts(params=2 * c if i < 3 else 0))
    c = dims[-1]
    head = Counts(params=2 * (c + 1) * 1000, matmul_macs=2 * c * 1000, activations=2 * 1000)
    class_stage = groupmamba_block(c, 1, 4, conv=False).plus(Counts(params=2 * c))
    return parts | {"norm": Counts(params=2 * c), "head": head, "class_stage": class_stage}


def mambavision_stem(s: int, c: int) -> Counts:
    first, second = 27 * s, 9 * s * c
    return Counts(
        params=first + 2 * s + second + 2 * c,
        conv_macs=112**2 * first + 56**2 * second,
        activations=112**2 * s + 56**2 * c,
    )


def conv_block(c: int, tokens: int) -> Counts:
    weights = 2 * 9 * c * c
    return Counts(params=weights + 2 * 3 * c, conv_macs=tokens * weights, activations=tokens * 2 * c)


def mamba_in_windows(c: int, tokens: int) -> Counts:
    """Half of the channels pass the scan; eight states."""
    d, n, r = c // 2, 8, math.ceil(c / 16)
    weights = 2 * c * c + d * (r + 2 * n) + r * d
    return Counts(
        params=weights + 3 * c + d + d * n + d,
        matmul_macs=tokens * weights,
        conv_macs=tokens * 3 * c,
        scan_ops=tokens * 9 * d * n,
        activations=tokens * (c + c + r + 2 * n + d + c),
    )


def attention_in_windows(c: int, tokens: int, *, window: int, heads: int) -> Counts:
    weights, keys = 4 * c * c, window**2
    return Counts(
        params=weights + 4 * c,
        matmul_macs=tokens * (weights + 2 * keys * c),
        activations=tokens * (3 * c + heads * keys + c + c),
    )


def mambavision_counts(
    stem: int, width: int, depths: tuple[int, ...], *, heads: tuple[int, int] = (8, 16), scales: bool = False
) -> dict[str, Counts]:
    parts = {"stem": mambavision_stem(stem, width)}
    for i, depth in enumerate(depths):
        c, tokens = width * 2**i, (56 >> i) ** 2
        stage = conv_downsample(c // 2, c, tokens, norm=False) if i > 0 else Counts()
        around = Counts(  # the MLP, norms and scales
            params=8 * c * c + 5 * c + 4 * c + (2 * c if scales else 0),
            matmul_macs=tokens * 8 * c * c,
            activations=tokens * 5 * c,
        )
        for j in range(depth):
            if i < 2:
                block = conv_block(c, tokens)
            elif j < (depth + 1) // 2:
                block = mamba_in_windows(c, tokens).plus(around)
            else:
                block = attention_in_windows(c, tokens, window=28 >> (i - 1), heads=heads[i - 2]).plus(around)
            stage = stage.plus(block)
        parts[f"stages.{i}"] = stage
    c = 8 * width
    head = Counts(params=(c + 1) * 1000, matmul_macs=c * 1000, activations=1000)
    return parts | {"norm": Counts(params=2 * c), "head": head}


VMAMBA = {
    "vmamba_tiny_s1l8": vmamba_counts(96, (2, 2, 8, 2), expand=1),
    "vmamba_tiny_s2l5": vmamba_counts(96, (2, 2, 5, 2)),
    "vmamba_small_s2l15": vmamba_counts(96, (2, 2, 15, 2)),
    "vmamba_small_s1l20": vmamba_counts(96, (2, 2, 20, 2), expand=1),
    "vmamba_base_s2l15": vmamba_counts(128, (2, 2, 15, 2)),
    "vmamba_base_s1l20": vmamba_counts(128, (2, 2, 20, 2), expand=1),
    "vmamba_tiny_v0": vmamba_counts(96, (2, 2, 9, 2), n=16, first=True),
    "vmamba_small_v0": vmamba_counts(96, (2, 2, 27, 2), n=16, first=True),
    "vmamba_base_v0": vmamba_counts(128, (2, 2, 27, 2), n=16, first=True),
}
# What the authors' rule gives, in G: the same products and convolutions, and for a scan of N states 9·L·D·N + L·D.
VMAMBA_GFLOPS = {
    "vmamba_tiny_s1l8": 4.88,
    "vmamba_tiny_s2l5": 4.82,
    "vmamba_small_s2l15": 8.67,
    "vmamba_small_s1l20": 8.57,
    "vmamba_base_s2l15": 15.29,
    "vmamba_base_s1l20": 15.16,
    "vmamba_tiny_v0": 5.60,
    "vmamba_small_v0": 11.18,
    "vmamba_base_v0": 17.95,
}


MSVMAMBA = {
    "msvmamba_nano": msvmamba_counts(48, (1, 2, 5, 2)),
    "msvmamba_micro": msvmamba_counts(64, (1, 2, 5, 2)),
    "msvmamba_tiny": msvmamba_counts(96, (1, 2, 9, 2)),
    "msvmamba_tiny_v3": msvmamba_counts(96, (2, 2, 9, 2), v3=True),
    "msvmamba_small_v3": msvmamba_counts(96, (2, 3, 20, 2), v3=True),
}
EFFICIENTVMAMBA = {
    "efficientvmamba_tiny": efficientvmamba_counts(48, (2, 2, 4, 2)),
    "efficientvmamba_small": efficientvmamba_counts(64, (2, 2, 4, 2)),
    "efficientvmamba_base": efficientvmamba_counts(96, (2, 2, 9, 2)),
}
A2MAMBA = {
    "a2mamba_nano": a2mamba_counts((32, 64, 128, 192), (2, 2, 8, 2), heads=(2, 2, 4, 8)),
    "a2mamba_tiny": a2mamba_counts((48, 96, 256, 448), (2, 2, 10, 2), heads=(2, 4, 8, 16)),
    "a2mamba_small": a2mamba_counts((64, 128, 320, 512), (2, 4, 12, 4), heads=(2, 4, 10, 16), scaled=(2, 3)),
    "a2mamba_base": a2mamba_counts(
        (96, 192, 384, 512), (4, 6, 12, 6), heads=(4, 8, 12, 16), ratios=(4, 4, 3.75, 3.75), scaled=(0, 1, 2, 3)
    ),
    "a2mamba_large": a2mamba_counts(
        (96, 192, 448, 672), (4, 6, 18, 6), heads=(4, 8, 16, 24), ratios=(4, 4, 4, 4), scaled=(0, 1, 2, 3)
    ),
}
VIM2 = {
    "vim2_tiny": vim2_counts(96, (1, 1, 3, 1)),
    "vim2_small": vim2_counts(96, (1, 1, 9, 1)),
    "vim2_base": vim2_counts(128, (1, 1, 9, 1)),
}
# Multiply-adds of the official models, in G, counted on them.
A2MAMBA_GMACS = {"a2mamba_nano": 0.81, "a2mamba_tiny": 2.68, "a2mamba_small": 5.34, "a2mamba_base": 11.35}
GROUPMAMBA = {
    "groupmamba_tiny": groupmamba_counts(32, (64, 128, 348, 448), (3, 4, 9, 3)),
    "groupmamba_small": groupmamba_counts(64, (64, 128, 348, 512), (3, 4, 16, 3)),
    "groupmamba_base": groupmamba_counts(64, (96, 192, 424, 512), (3, 6, 21, 3)),
}
MAMBAVISION = {
    "mambavision_tiny": mambavision_counts(32, 80, (1, 3, 8, 4)),
    "mambavision_tiny2": mambavision_counts(32, 80, (1, 3, 11, 4)),
    "mambavision_small": mambavision_counts(64, 96, (3, 3, 7, 5)),
    "mambavision_base": mambavision_counts(64, 128, (3, 3, 10, 5), scales=True),
    "mambavision_large": mambavision_counts(64, 196, (3, 3, 10, 5), heads=(16, 32), scales=True),
    "mambavision_large2": mambavision_counts(64, 196, (3, 3, 12, 5), heads=(16, 32), scales=True),
}
# Products and convolutions of official models, in G, counted on them; of MambaVision without those inside attention.
OFFICIAL_GMACS = {
    "groupmamba_tiny": 4.65,
    "groupmamba_small": 7.21,
    "groupmamba_base": 14.07,
    "mambavision_tiny": 4.46,
    "mambavision_small": 7.48,
}
# What the same rule gives of the official models, in G, counted on them.
OFFICIAL_GFLOPS = {
    "msvmamba_nano": 0.8609,
    "msvmamba_tiny": 4.5576,
    "msvmamba_tiny_v3": 5.0997,
    "efficientvmamba_tiny": 0.7879,
}


@pytest.mark.parametrize(
    ("size", "batch"), [(None, 1), ((160, 256), 1), (None, 3)], ids=["default", "other size", "batch"]
)
def test_vim_tiny_equals_the_hand_formula(size, batch):
    record = describe("vim_tiny_patch16_224", img_size=size, batch_size=batch)
    height, width = size or (224, 224)
    expected = vim_counts(height=height, width=width, batch=batch)
    assert Counts(*(record[name] for name in Counts._fields)) == expected
    macs = expected.matmul_macs + expected.conv_macs
    assert record["gmacs"] == macs / 1e9
    assert record["scan_gops"] == expected.scan_ops / 1e9
    assert record["total_gflops"] == (macs + expected.scan_ops) / 1e9


@pytest.mark.parametrize("name", VMAMBA)
def test_vmamba_equals_the_hand_formula_and_the_published_figures(name):
    record = describe(name)
    counted = {part.pop("part"): Counts(**part) for part in record["parts"]}
    assert counted == VMAMBA[name]
    states = 16 if name.endswith("v0") else 1
    authors = record["total_gflops"] + record["scan_gops"] / (9 * states)
    assert round(authors, 2) == VMAMBA_GFLOPS[name]
    assert authors == pytest.approx(record["published_gflops"], rel=0.016)  # two are printed up to 1.6 % higher
    assert record["params_m"] == pytest.approx(record["published_params_m"], abs=0.5)


@pytest.mark.parametrize("name", MSVMAMBA)
def test_msvmamba_equals_the_hand_formula_and_the_published_figures(name):
    record = describe(name)
    assert {part.pop("part"): Counts(**part) for part in record["parts"]} == MSVMAMBA[name]
    model = vssm.create_model(name)
    again = 0  # the official code projects each of the three sequences at half resolution, not the map once
    for stage, side in zip(model.stages, (56, 28, 14, 7), strict=True):
        ssm = stage.blocks[0].mixer.ssm_half
        again += 2 * len(stage.blocks) * half_resolution(side**2) * (ssm.x_proj.weight.numel() + ssm.dt_weight.numel())
    authors = record["total_gflops"] + record["scan_gops"] / 9 + again / 1e9
    if name in OFFICIAL_GFLOPS:
        assert round(authors, 4) == OFFICIAL_GFLOPS[name]
    assert authors == pytest.approx(record["published_gflops"], rel=0.045)  # one digit of 0.9
    assert record["params_m"] == pytest.approx(record["published_params_m"], abs=0.5)


@pytest.mark.parametrize("name", EFFICIENTVMAMBA)
def test_efficientvmamba_equals_the_hand_formula_and_the_published_figures(name):
    record = describe(name)
    assert {part.pop("part"): Counts(**part) for part in record["parts"]} == EFFICIENTVMAMBA[name]
    authors = record["total_gflops"] + record["scan_gops"] / (9 * 16)
    if name in OFFICIAL_GFLOPS:
        assert round(authors, 4) == OFFICIAL_GFLOPS[name]
    assert round(authors, 1) == record["published_gflops"]
    assert record["params_m"] == pytest.approx(record["published_params_m"], abs=0.75)


@pytest.mark.parametrize("name", A2MAMBA)
def test_a2mamba_equals_the_hand_formula_and_the_published_figures(name):
    record = describe(name)
    assert {part.pop("part"): Counts(**part) for part in record["parts"]} == A2MAMBA[name]
    with torch.device("meta"):
        model = vssm.create_model(name)
    only_here = scales = 0  # what tiles multiply and mask; the scales, which are convolutions in the official code
    for stage, side in zip(model.stages, (56, 28, 14, 7), strict=True):
        mixer, depth = stage.blocks[0].mixer, len(stage.blocks)
        c, products = mixer.out_proj.out_features, 3 if hasattr(mixer, "ssm") else 2
        for windows in a2mamba_windows(side, mixer.window):
            only_here += depth * products * (windows.pairs - side**2 * mixer.window**2) * c // 2
        scales += sum(isinstance(each, ChannelAffine) for each in stage.modules()) * side**2 * c
    official = record["gmacs"] + (scales - only_here) / 1e9
    if name in A2MAMBA_GMACS:
        assert round(official, 2) == A2MAMBA_GMACS[name]
    assert official == pytest.approx(record["published_gflops"], rel=0.07)  # that of base is printed 6 % lower
    assert record["params_m"] == pytest.approx(record["published_params_m"], abs=1.3)  # large is printed as 95


@pytest.mark.parametrize("name", GROUPMAMBA)
def test_groupmamba_equals_the_hand_formula_and_the_published_figures(name):
    record = describe(name)
    assert {part.pop("part"): Counts(**part) for part in record["parts"]} == GROUPMAMBA[name]
    assert round(record["gmacs"], 2) == OFFICIAL_GMACS[name]
    assert record["gmacs"] == pytest.approx(record["published_gflops"], rel=0.035)  # printed lower than counted
    assert record["params_m"] == pytest.approx(record["published_params_m"], abs=0.8)


@pytest.mark.parametrize("name", MAMBAVISION)
def test_mambavision_equals_the_hand_formula_and_the_published_figures(name):
    record = describe(name)
    assert {part.pop("part"): Counts(**part) for part in record["parts"]} == MAMBAVISION[name]
    with torch.device("meta"):
        model = vssm.create_model(name)
    attention = 0
    for stage, tokens in zip(model.stages[2:], (14**2, 7**2), strict=True):
        channels = [block.norm1.weight.numel() for block in stage.blocks if hasattr(block.mixer, "qkv")]
        attention += 2 * tokens**2 * sum(channels)  # one window at this size
    authors = record["gmacs"] - attention / 1e9
    if name in OFFICIAL_GMACS:
        assert round(authors, 2) == OFFICIAL_GMACS[name]
    assert authors == pytest.approx(record["published_gflops"], rel=0.015)
    assert record["params_m"] == pytest.approx(record["published_params_m"], abs=0.1)


@pytest.mark.parametrize("name", VIM2)
def test_vim2_equals_the_hand_formula_and_the_published_sizes(name):
    record = describe(name)
    assert {part.pop("part"): Counts(**part) for part in record["parts"]} == VIM2[name]
    with torch.device("meta"):
        model = vssm.create_model(name, gate=name != "vim2_tiny")  # which has the printed size without a gate
    params_m = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert params_m == pytest.approx(record["published_params_m"], rel=0.022)


def test_parameters_are_those_of_the_official_model():
    assert describe("vim_tiny_patch16_224")["params"] == 7_148_008


def test_parts_add_up():
    record = describe("vim_tiny_patch16_224")
    parts = {part["part"]: part for part in record["parts"]}
    assert list(parts) == ["stem", "blocks", "norm", "head", "(other)"]
    for name in Counts._fields:
        assert sum(part[name] for part in parts.values()) == record[name]
    assert parts["stem"]["conv_macs"] == 196 * 768 * 192
    assert parts["head"] == {
        "part": "head",
        "params": 193_000,
        "matmul_macs": 192_000,
        "conv_macs": 0,
        "scan_ops": 0,
        "activations": 1000,
    }
    assert parts["(other)"]["params"] == 192 + 197 * 192


def test_stages_are_counted_one_by_one():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([nn.Conv2d(3, 4, 3, groups=1), nn.ModuleList([nn.Linear(4, 5)])])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stages[0](x).mean((2, 3))
            return self.stages[1][0](x) @ torch.ones(5, 7)

    assert count_parts(Model(), torch.ones(2, 3, 5, 5)) == {
        "stages.0": Counts(params=3 * 4 * 9 + 4, conv_macs=2 * 9 * 3 * 4 * 9, activations=2 * 4 * 9),
        "stages.1": Counts(params=25, matmul_macs=2 * 4 * 5, activations=2 * 5),
        "(other)": Counts(matmul_macs=2 * 5 * 7, activations=2 * 7),
    }


def test_published_figures_stand_beside_the_default_input_only():
    assert describe("vim_tiny_patch16_224")["published_gflops"] == 1.5
    assert describe("vim_small_patch16_224.in1k")["published_gflops"] == 5.1
    assert describe("vim_tiny_patch16_224", img_size=(448, 448))["published_gflops"] is None
    assert describe("test_vim")["published_params_m"] is None


def test_a_peer_of_timm_is_counted():
    assert describe("resnet18")["params"] == 11_689_512
    assert describe("resnet18")["gmacs"] == pytest.approx(1.814, abs=1e-3)


def test_command_prints_counts_and_writes_the_record(capsys, tmp_path):
    target = tmp_path / "info.json"
    assert main(["info", "vim_tiny_patch16_224", "--results", str(target)]) == 0
    output = capsys.readouterr().out
    total = next(line for line in output.splitlines() if line.startswith("total"))
    assert total.split() == ["total", "7148008", "1249291776", "43425792", "522878976", "10440232"]
    assert "published FLOPs: 1.5 G" in output
    [record] = json.loads(target.read_text())
    assert (record["params"], record["scan_ops"], record["img_size"]) == (7_148_008, 522_878_976, [224, 224])
    assert record["torch"]


def test_command_prints_the_record_as_json(capsys):
    assert main(["info", "test_vmamba", "--json", "--img-size", "64x96"]) == 0
    assert json.loads(capsys.readouterr().out) == describe("test_vmamba", img_size=(64, 96))


def test_command_shows_a_dash_where_nothing_is_published(capsys):
    assert main(["info", "test_vim", "--img-size", "64x96"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("test_vim, 1 x 64x96\n")
    assert "(published: -)" in output


def test_impossible_sizes_are_one_line(capsys):
    assert main(["info", "test_vim", "--img-size", "224x"]) == 2
    assert main(["info", "test_vim", "--img-size", "8"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "expected a size in pixels such as 224 or 160x256" in lines[0]
