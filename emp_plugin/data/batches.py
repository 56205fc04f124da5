"""How a batch reaches the model: uint8 images travel once, views are made where the model is.

The order of the images and every augmentation depend on (seed, epoch, step) alone. Both are drawn
for the global batch and then sliced. So a resumed run, or one spread over processes, sees exactly
the images and patches of an uninterrupted single process.
"""

import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emp_plugin.data.datasets import ImageData
from emp_plugin.data.files import ImageFiles
from emp_plugin.transforms import BatchMultiPatch

T = TypeVar("T")
ORDER, VIEWS, LAYERS = 0, 1, 3  # separate random streams of one seed; 2 is the evaluation's


def generator(seed: int, stream: int, *position: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    state = np.random.SeedSequence([seed, stream, *position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class Step(NamedTuple):
    """One step's share of the global batch: where we are, and which images this process takes."""

    epoch: int
    step: int
    start: int  # position of the first of ``indices`` in the global batch
    indices: Tensor


class Batch(NamedTuple):
    """What travels to the device."""

    step: Step
    # uint8 (b, 3, H, W); or the views, if they are made already; None: they are on the device
    images: Tensor | list[Tensor] | None
    targets: Tensor  # (b,)


class StepSampler:
    """The steps of one epoch, from where ``position()`` says training stands.

    Args:
        num_images: size of the training set. An incomplete last batch is dropped, as in the
            published code.
        batch_size: images per step of one process.
        seed: seed of the order.
        position: returns (epoch, step) of the next batch; read when an iteration begins.
        rank: number of this process. Each takes its own slice of every global batch.
        world_size: number of processes.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        position: Callable[[], tuple[int, int]],
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_images, self.batch_size = num_images, batch_size
        self.seed, self.position = seed, position
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.num_images // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Step]:
        epoch, first = self.position()
        order = torch.randperm(self.num_images, generator=generator(self.seed, ORDER, epoch))
        start = self.rank * self.batch_size
        for step in range(first, len(self)):
            mine = step * self.batch_size * self.world_size + start
            yield Step(epoch, step, start, order[mine : mine + self.batch_size])


class StepDataset(Dataset):
    """Images fetched a whole :class:`Step` at a time; labels alone if images are on the device."""

    def __init__(self, data: ImageData | ImageFiles, images_on_device: bool = False):
        self.data, self.images_on_device = data, images_on_device

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, step: Step) -> Batch:
        images = None if self.images_on_device else self.data.fetch(step.indices)
        return Batch(step, images, self.data.targets[step.indices])


class EvaluationDataset(Dataset):
    """Images for validation and features: (uint8 image, label) pairs, fetched by the batch."""

    def __init__(self, data: ImageData | ImageFiles):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.data.fetch(chosen), self.data.targets[chosen]


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (b, 3, H, W) -> float32, ``(x / 255 - mean) / std``."""
    shift, scale = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images.float() / 255 - shift) / scale


def in_order(
    data: ImageData | ImageFiles, batch_size: int, num_workers: int = 0
) -> Iterator[Tensor]:
    """All images of a dataset in its order, uint8 (b, 3, H, W) at a time."""
    loader = DataLoader(
        EvaluationDataset(data),
        batch_size,
        collate_fn=as_it_is,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    return (images for images, _ in loader)


def ignore_signals(worker: int) -> None:
    """Leave a signal to all processes of a job to the main process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def as_it_is(batch: T) -> T:
    """Collate nothing: the datasets fetch whole batches."""
    return batch


def make_views(
    views: list[BatchMultiPatch], images: Tensor, step: Step, seed: int, global_batch: int
) -> list[Tensor]:
    """The views of one step's images, (n, b, 3, s, s) per augmentation.

    They are drawn for the global batch, then sliced to the images of this process.
    """
    draws = generator(seed, VIEWS, step.epoch, step.step)
    mine = slice(step.start, step.start + len(images))
    height, width = images.shape[-2:]
    made = []
    for view in views:
        drawn = view.sample(global_batch, height, width, draws)
        made.append(view.make(images, drawn.select(images=mine)))
    return made
