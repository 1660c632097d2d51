"""Trains a detector for a few steps on four scenes, alone or started by torchrun: ``detector_steps.py LOSSES.json``.

In float64, with as many sampled anchors and regions in every image, the first of those that might be drawn: so the mean
over processes is the mean over images, and what processes compute must be what one computes.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from vssm.data.scenes import DigitScenes
from vssm.detection import fasterrcnn

STEPS, IMAGES = 2, 4


def main() -> None:
    """Writes the losses of all steps, each the mean over processes."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.randperm = lambda count, **_: torch.arange(count)
    torch.manual_seed(0)
    sampled = {"rpn_batch_size_per_image": 16, "box_batch_size_per_image": 16}
    detector = fasterrcnn("test_vmamba", num_classes=11, min_size=64, max_size=96, **sampled).double()
    network = detector
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
        network = DistributedDataParallel(detector)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.005)
    scenes = DigitScenes("train", IMAGES, size=(64, 96))
    mine = [scenes[index] for index in range(rank, IMAGES, ranks)]
    images = [image.double() for image, _ in mine]
    targets = [{"boxes": target["boxes"].double(), "labels": target["labels"]} for _, target in mine]
    losses = []
    for _ in range(STEPS):
        loss = sum(network(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        if ranks > 1:
            torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(losses))
    if ranks > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
