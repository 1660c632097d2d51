"""Policies: which tokens a cut drops, and into which of the others it merges them.

A score says how important each token is to the block that a cut follows; a policy turns what the block did into a
`Reduction`. Both only look: they run without gradients, in float32. A policy must drop the same number of tokens in
every sample and must not drop a pinned one, such as the class token.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vssm.layers.ssm import SelectiveSSM
from vssm.pruning.token_map import Reduction, TokenMap, take


class BlockTrace(NamedTuple):
    """What a block did to the t tokens of its stream.

    Args:
        x_in: Input of the block, (b, t, c).
        x_out: Its output, (b, t, c).
        u: Input of its scan, (b, t, d), or (b, t, k, d) with one map for each direction.
        y: What its mixer's out_proj reads: the directions' sum, gated and normed where the mixer does so, (b, t, d).
        z: Gate inside the scan, (b, t, d); None where there is none.
        order: Scan order (k, t) or (b, k, t) that the scan was given; None for raster order.
        ssm: Its state-space model; ``ssm.step(u)`` are the step sizes (b, t, k, d).
    """

    x_in: Tensor
    x_out: Tensor
    u: Tensor
    y: Tensor
    z: Tensor | None
    order: Tensor | None
    ssm: SelectiveSSM

    @property
    def hidden(self) -> Tensor:
        """What the block added to the residual stream, (b, t, c)."""
        return self.x_out - self.x_in

    def gather(self, token_map: TokenMap) -> "BlockTrace":
        """The trace of a map's tokens, of one of all tokens. There is no scan order of these."""
        x_in, x_out, u, y = (token_map.gather(each) for each in (self.x_in, self.x_out, self.u, self.y))
        return BlockTrace(x_in, x_out, u, y, None if self.z is None else token_map.gather(self.z), None, self.ssm)


Score = Callable[[BlockTrace], Tensor]


class Policy(Protocol):
    """Decides about a cut."""

    def __call__(self, trace: BlockTrace, score: Score, *, count: int, pinned: Tensor) -> Reduction:
        """Chooses the tokens that stay.

        Args:
            trace: What the block before the cut did to t tokens.
            score: Importance (b, t) of the tokens; larger is more important.
            count: Tokens to keep, fewer than t.
            pinned: Places (b, p) of tokens that must stay, p = 0 if there are none.
        """
        ...


def clipped_output(trace: BlockTrace) -> Tensor:
    """Sum over channels of what is positive in the merged output of the scan, Σ_d max(0, y), (b, t).

    Reference:
        Zhan et al., "Exploring Token Pruning in Vision State Space Models", NeurIPS 2024,
        https://arxiv.org/abs/2409.18962. The released code reads the backward direction only.
    """
    return trace.y.float().clamp(min=0).sum(-1)


def clipped_backward(trace: BlockTrace) -> Tensor:
    """As `clipped_output`, of the last direction alone, (b, t); the scan runs once more."""
    y = trace.ssm.forward(trace.u, trace.order, merge=False)[:, :, -1].float()
    return (y if trace.z is None else y * F.silu(trace.z.float())).clamp(min=0).sum(-1)


def clipped_backward_flipped(trace: BlockTrace) -> Tensor:
    """As `clipped_backward`, in reversed order: what the code released with arXiv:2409.18962 computes, (b, t).

    It does not turn the backward direction's output round, so that each token gets the score of its mirror image.
    """
    return clipped_backward(trace).flip(1)


def step_size(trace: BlockTrace) -> Tensor:
    """Mean over channels of the step, summed over directions, (b, t).

    Reference:
        "MTR", 2025, https://arxiv.org/abs/2507.14042
    """
    return trace.ssm.step(trace.u).float().mean(-1).sum(-1)


SCORES: dict[str, Score] = {
    "clipped_output": clipped_output,
    "clipped_backward": clipped_backward,
    "clipped_backward_flipped": clipped_backward_flipped,
    "step_size": step_size,
}


def top_tokens(trace: BlockTrace, score: Score, *, count: int, pinned: Tensor) -> Reduction:
    """Keeps the tokens of the highest scores and drops the others.

    Reference:
        Zhan et al., 2024, section 4, https://arxiv.org/abs/2409.18962
    """
    ranked = score(trace).scatter(1, pinned, float("inf"))
    return Reduction(*_split(ranked.topk(count, dim=1).indices, ranked.shape[1]))


def merge_pairs(trace: BlockTrace, score: Score, *, count: int, pinned: Tensor) -> Reduction:
    """Merges the tokens of even rank that are most like one of odd rank into that one; uses no score.

    Ranks leave pinned tokens out. Likeness is the cosine between what the block added to the two tokens.

    Raises:
        ValueError: If more tokens are to go than have even rank.

    Reference:
        Shi et al., "R-MeeTo", 2024, https://arxiv.org/abs/2412.12496
    """
    batch, tokens = trace.x_out.shape[:2]
    level = torch.zeros(batch, tokens, device=trace.x_out.device)
    free = _ascending(level, pinned)
    even, odd = free[:, ::2], free[:, 1::2]
    sources, target, _ = _closest_pairs(trace, even, odd, tokens - count)
    return _merged(sources, target, tokens)


def merge_unimportant(trace: BlockTrace, score: Score, *, count: int, pinned: Tensor) -> Reduction:
    """Merges the tokens of the lowest scores, each into the most similar of those whose scores come next.

    As many tokens may take others in as are merged, or all that stay if they are fewer; the paper's share of them is
    not known to us.

    Reference:
        "MTR", 2025, https://arxiv.org/abs/2507.14042
    """
    tokens = trace.x_out.shape[1]
    free, gone = _ascending(score(trace), pinned), tokens - count
    sources, target, _ = _closest_pairs(trace, free[:, :gone], free[:, gone : 2 * gone], gone)
    return _merged(sources, target, tokens)


def prune_and_merge(
    trace: BlockTrace, score: Score, *, count: int, pinned: Tensor, pruned_share: float = 0.5
) -> Reduction:
    """Merges the less important half's tokens that are most like one of the more important half into that one.

    Of the residual stream all of them are merged; what the block added to it is merged for some and left out for the
    ``pruned_share`` of most similar pairs, whose more important token says nearly the same.

    Raises:
        ValueError: If more tokens are to go than are in the less important half.

    Reference:
        Zhan et al., "Rethinking Token Reduction for State Space Models", EMNLP 2024, https://arxiv.org/abs/2410.14725
    """
    tokens = trace.x_out.shape[1]
    free = _ascending(score(trace), pinned)
    half = free.shape[1] // 2
    sources, target, likeness = _closest_pairs(trace, free[:, :half], free[:, half:], tokens - count)
    rank = likeness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return _merged(sources, target, tokens, hidden=rank >= round(pruned_share * (tokens - count)))


class Method(NamedTuple):
    """A published way to reduce tokens.

    Args:
        policy: Decides about each cut.
        score: The score that it is published with; None where it uses none.
    """

    policy: Policy
    score: Score | None


METHODS: dict[str, Method] = {
    "top": Method(top_tokens, clipped_output),
    "merge": Method(merge_pairs, None),
    "mtr": Method(merge_unimportant, step_size),
    "utr": Method(prune_and_merge, clipped_output),
}


def _ascending(score: Tensor, pinned: Tensor) -> Tensor:
    """Places (b, t − p) of all but pinned tokens, by ascending score, and in their order where scores are equal."""
    tokens = score.shape[1]
    return score.scatter(1, pinned, float("inf")).argsort(dim=1, stable=True)[:, : tokens - pinned.shape[1]]


def _closest_pairs(trace: BlockTrace, sources: Tensor, targets: Tensor, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sources that are most like one of the targets, and that one.

    Args:
        trace: What the block did; likeness is the cosine between what it added to two tokens.
        sources: Places (b, m).
        targets: Places (b, n), others than the sources.
        pairs: Number of sources to choose.

    Returns:
        Places of sources and of the target of each, (b, pairs), sources ascending, and their likeness.
    """
    if pairs > sources.shape[1] or targets.shape[1] == 0:
        raise ValueError(
            f"TokenReducer: expected a cut that merges at most {sources.shape[1]} tokens, which this policy can "
            f"merge into {targets.shape[1]} others, got {pairs}; raise keep"
        )
    directions = F.normalize(trace.hidden.float(), dim=-1)
    best = (take(directions, sources) @ take(directions, targets).transpose(1, 2)).max(-1)
    chosen = best.values.topk(pairs, dim=1).indices
    chosen = chosen.gather(1, take(sources, chosen).argsort(dim=1))
    return take(sources, chosen), take(targets, take(best.indices, chosen)), take(best.values, chosen)


def _merged(sources: Tensor, target: Tensor, tokens: int, *, hidden: Tensor | None = None) -> Reduction:
    """The reduction that merges places ``sources`` (b, m), ascending, into places ``target`` (b, m)."""
    dropped, kept = _split(sources, tokens)
    rank = torch.zeros(len(kept), tokens, dtype=torch.long, device=kept.device)
    rank = rank.scatter(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    return Reduction(kept, dropped, take(rank, target), hidden)


def _split(chosen: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Chosen places (b, t) of so many and the others (b, tokens − t), both ascending."""
    member = torch.zeros(len(chosen), tokens, device=chosen.device).scatter(1, chosen, 1.0)
    order = member.argsort(dim=1, descending=True, stable=True)
    return order[:, : chosen.shape[1]], order[:, chosen.shape[1] :]
