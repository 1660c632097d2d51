"""Which images form which batch: of training, a function of seed, epoch and step; of evaluation, all in their order."""

from collections.abc import Iterator
from typing import NamedTuple

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

from vssm.data.randomness import Purpose, seed_for


class Share(NamedTuple):
    """Which part of every batch a process takes: each ``ranks``-th image, from the ``rank``-th on."""

    rank: int = 0
    ranks: int = 1


ALONE = Share()


class Draw(NamedTuple):
    """One image of a training epoch.

    Args:
        image: Place in the data set.
        epoch: Number of the epoch.
        place: Place in the epoch's order.
    """

    image: int
    epoch: int
    place: int


class TrainingBatches(Sampler[list[Draw]]):
    """Batches of an epoch, from any step of it on; the images after the last full batch are left out.

    Copies of an image stand beside each other in the order, so that they go to different processes, as in the
    official training of DeiT.

    Args:
        images: Number of images in the data set.
        batch_size: Images of a batch, of all processes together; no more than an epoch has.
        seed: Of the order.
        repeats: Copies of an image in an epoch, which then sees as many times fewer images.
        share: Part of the batches that is wanted.
    """

    def __init__(self, images: int, *, batch_size: int, seed: int, repeats: int = 1, share: Share = ALONE) -> None:
        every = range(images)
        self._order: RepeatAugSampler | DistributedSampler = (
            RepeatAugSampler(every, num_replicas=1, rank=0, num_repeats=repeats)
            if repeats > 1
            else DistributedSampler(every, num_replicas=1, rank=0)  # type: ignore[arg-type]  it asks for the length only
        )
        self.batch_size = min(batch_size, len(self._order))
        self.seed = seed
        self.share = share
        self._epoch = self._step = 0

    def begin(self, epoch: int, step: int = 0) -> None:
        """Chooses the epoch, and the number of its batches to pass over, for the next iteration."""
        self._epoch, self._step = epoch, step

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._order) // self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self._epoch
        self._order.set_epoch(seed_for(Purpose.ORDER, self.seed, epoch))
        order = list(self._order)
        for step in range(self._step, len(self)):
            batch = range(step * self.batch_size, (step + 1) * self.batch_size)
            yield [Draw(order[place], epoch, place) for place in batch[self.share.rank :: self.share.ranks]]


class EvaluationBatches(Sampler[list[int]]):
    """Every image once, shared out over processes; each gets as many batches, of which the last may be empty.

    Args:
        images: Number of images in the data set.
        batch_size: Images of a batch of one process.
        share: Part of the images that is wanted.
    """

    def __init__(self, images: int, *, batch_size: int, share: Share = ALONE) -> None:
        self.mine = range(images)[share.rank :: share.ranks]
        self.batch_size = batch_size
        largest_share = -(-images // share.ranks)
        self._batches = -(-largest_share // batch_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, self._batches * self.batch_size, self.batch_size):
            yield list(self.mine[first : first + self.batch_size])
