"""Views made of PIL images, in DataLoader workers if there are any, as solo-learn makes them."""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from emp_plugin.data.batches import VIEWS, Batch, Step, generator
from emp_plugin.data.datasets import ImageData
from emp_plugin.data.files import ImageFiles


class ViewDataset(Dataset):
    """Views of images, fetched a whole step at a time: a list of tensors (n, b, 3, s, s).

    Each is of n views of one size: a worker hands every tensor over as an open file.

    An image's views depend on the seed and on its place in the global batch of its step alone,
    whoever fetches it.

    Args:
        data: the images.
        transforms: each makes one PIL image into a list of float tensors (3, s, s).
        seed: of the views.
    """

    def __init__(
        self,
        data: ImageData | ImageFiles,
        transforms: list[Callable[[Image.Image], list[Tensor]]],
        seed: int,
    ):
        self.data, self.transforms, self.seed = data, transforms, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, step: Step) -> Batch:
        made = []
        with _restored_random_state():
            for place, image in enumerate(self.data.fetch(step.indices), start=step.start):
                draws = generator(self.seed, VIEWS, step.epoch, step.step, place)
                # solo-learn's transforms draw from both
                torch.default_generator.manual_seed(draws.initial_seed())
                random.seed(draws.initial_seed())
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                made.append([view for make in self.transforms for view in make(picture)])
        views = [torch.stack(of_all) for of_all in zip(*made)]
        of_one_size = (list(some) for _, some in itertools.groupby(views, lambda x: x.shape))
        return Batch(
            step, [torch.stack(some) for some in of_one_size], self.data.targets[step.indices]
        )


@contextmanager
def _restored_random_state() -> Iterator[None]:
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
