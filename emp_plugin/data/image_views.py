"""``data.views=image``: views made of PIL images where a batch is fetched, in DataLoader workers if there are any, as solo-learn makes them."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from emp_plugin.data.datasets import ImageData
from emp_plugin.data.files import ImageFiles
from emp_plugin.solo_learn.transforms import solo_transform
from emp_plugin.transforms import MultiPatchTransform, PatchRecipe


def image_transform(recipe: PatchRecipe) -> Callable[[Image.Image], list[Tensor]]:
    """solo-learn's own transforms, and for patches, which it has none for, our reference pipeline."""
    return solo_transform(recipe) or MultiPatchTransform.from_recipe(recipe)


class ImageViews(Dataset):
    """Views of images, fetched a whole step at a time: a list of tensors (b, 3, s, s), float and normalised.

    An image's views depend on the number that ``seed_of`` gives for its place alone, whoever fetches it.

    Args:
        data: the images.
        recipes: of the views.
        seed_of: (step, place in its indices) -> seed.
    """

    def __init__(
        self, data: ImageData | ImageFiles, recipes: list[PatchRecipe], seed_of: Callable[..., int]
    ):
        self.data, self.seed_of = data, seed_of
        self.transforms = [image_transform(recipe) for recipe in recipes]

    def __len__(self) -> int:
        return len(self.data)

    def views(self, step) -> list[Tensor]:
        made = []
        with _restored_random_state():
            for place, image in enumerate(self.data.fetch(step.indices)):
                seed = self.seed_of(step, place)
                torch.default_generator.manual_seed(seed)  # solo-learn's transforms draw from both
                random.seed(seed)
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                made.append([view for transform in self.transforms for view in transform(picture)])
        return [torch.stack(views) for views in zip(*made)]


@contextmanager
def _restored_random_state() -> Iterator[None]:
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
