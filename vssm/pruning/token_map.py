"""Token maps: which tokens a stream still holds after cuts, and what stands for those that it does not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Reduction(NamedTuple):
    """What a policy decides about the t tokens of a stream: which places stay, and where the others go.

    Args:
        kept: Places (b, t') of the stream that stay, ascending.
        dropped: The other places, (b, t − t').
        target: For each dropped token the index into ``kept`` of the one it is merged into, (b, t − t'); None if
            dropped tokens are not merged.
        hidden: Whether what the block added to a merged token is merged too, boolean (b, t − t'); None if all is. What
            the token was before the block always is.
    """

    kept: Tensor
    dropped: Tensor
    target: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class TokenMap:
    """Where the l tokens of a sequence or grid are after cuts that left t of them in the stream.

    Args:
        kept: Tokens (b, t) that the stream holds, ascending, numbered as before the first cut.
        where: For each of the l tokens an index (b, l) into the stream followed by the bank of all tokens that cuts
            dropped without merging, in the order of the cuts.
        weight: Number of tokens (b, t) that each token of the stream is the mean of.
        size: Rows and columns of the grid of patches; a class token counts among the tokens, but not here.
        banked: Number of tokens in the bank.
    """

    kept: Tensor
    where: Tensor
    weight: Tensor
    size: tuple[int, int]
    banked: int = 0

    @classmethod
    def full(cls, batch: int, tokens: int, *, size: tuple[int, int], device: torch.device) -> "TokenMap":
        """The map before any cut."""
        everything = torch.arange(tokens, device=device).expand(batch, -1)
        return cls(everything, everything, torch.ones(batch, tokens, device=device), size)

    @property
    def tokens(self) -> int:
        """Tokens before the first cut, l."""
        return self.where.shape[1]

    @property
    def count(self) -> int:
        """Tokens in the stream, t."""
        return self.kept.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether the stream holds all tokens."""
        return self.count == self.tokens

    @property
    def target(self) -> Tensor:
        """For each of the l tokens, (b, l), the one that holds it: itself, what it was merged into, or −1 for none."""
        holder = self.kept.gather(1, self.where.clamp(max=self.count - 1))
        return torch.where(self.where < self.count, holder, -1)

    def cut(self, reduction: Reduction) -> "TokenMap":
        """The map after a further cut of the stream."""
        count, left = reduction.kept.shape[1], reduction.dropped.shape[1]

        def numbers(start: int, length: int) -> Tensor:
            return torch.arange(start, start + length, device=self.kept.device).expand(self.kept.shape[0], -1)

        fate = numbers(count + self.banked, left) if reduction.target is None else reduction.target
        moved = torch.zeros_like(self.kept)
        moved = moved.scatter(1, reduction.kept, numbers(0, count)).scatter(1, reduction.dropped, fate)
        weight = take(self.weight, reduction.kept)
        if reduction.target is not None:
            weight = weight.scatter_add(1, reduction.target, take(self.weight, reduction.dropped))
        return TokenMap(
            kept=take(self.kept, reduction.kept),
            where=take(torch.cat([moved, numbers(count, self.banked)], dim=1), self.where),
            weight=weight,
            size=self.size,
            banked=self.banked + (left if reduction.target is None else 0),
        )

    def gather(self, x: Tensor) -> Tensor:
        """The stream's tokens (b, t, ...) of all tokens (b, l, ...)."""
        return take(x, self.kept)

    def spread(self, x: Tensor) -> Tensor:
        """The stream (b, t, ...) at its tokens' places among zeros, (b, l, ...)."""
        return x.new_zeros(x.shape[0], self.tokens, *x.shape[2:]).scatter(1, _index(x, self.kept), x)

    def restore(self, x: Tensor, bank: Sequence[Tensor]) -> Tensor:
        """All tokens (b, l, ...): those of the stream (b, t, ...) and of the bank, and merged ones as their mean."""
        return take(torch.cat([x, *bank], dim=1), self.where)


def take(x: Tensor, places: Tensor) -> Tensor:
    """Tokens (b, t, ...) at ``places`` (b, t) of tokens (b, l, ...)."""
    return x.gather(1, _index(x, places))


def _index(x: Tensor, places: Tensor) -> Tensor:
    return places.reshape(*places.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
