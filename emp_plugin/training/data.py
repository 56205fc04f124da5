"""Batches for Lightning: uint8 images travel, views are made where the model is."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emp_plugin.data import ImageData, ImageFiles, StepSampler, generator, make_views, normalise
from emp_plugin.data.batches import (
    LAYERS,
    Batch,
    EvaluationDataset,
    StepDataset,
    as_it_is,
    ignore_signals,
)
from emp_plugin.data.image_views import ViewDataset
from emp_plugin.solo_learn import pl
from emp_plugin.solo_learn.transforms import solo_transform
from emp_plugin.training.lightning import batches_trained
from emp_plugin.transforms import BatchMultiPatch, MultiPatchTransform, PatchAugmentation


def image_transform(augmentation: PatchAugmentation) -> Callable[[Image.Image], list[Tensor]]:
    """solo-learn's own transforms; for patches, which it does not know, our reference pipeline."""
    return solo_transform(augmentation) or MultiPatchTransform.from_augmentation(augmentation)


def fit_on(device: torch.device, images: Tensor) -> bool:
    """Whether a GPU holds all images for good, so that no step sends any: in a tenth of its memory.

    It is the free memory that counts.
    """
    return device.type == "cuda" and 10 * images.nbytes <= torch.cuda.mem_get_info(device)[0]


class PretrainData(pl.LightningDataModule):
    """Batches for pretraining and validation, with views made on the device.

    Training batches reach the method in solo-learn's form ``[indices, X, targets]``. X is a list of
    views (b, 3, s, s), or, ``stacked``, the tensor (n, b, 3, s, s) of the first augmentation's n
    patches. Validation batches are ``(X, targets)``.

    Args:
        train, validation: images; ``validation`` may be None.
        views: one on-device transform per augmentation.
        batch_size: images per step of one process.
        seed: of the order and of the augmentations.
        num_workers: DataLoader processes. They decode images on disk; images in memory need none.
        stacked: hand over one tensor, for a method that takes it (EMP).
        on_device: make the views where the model is; otherwise from PIL images, where the batch is
            fetched.
    """

    def __init__(
        self,
        train: ImageData | ImageFiles,
        validation: ImageData | ImageFiles | None,
        views: list[BatchMultiPatch],
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        stacked: bool = False,
        on_device: bool = True,
    ):
        super().__init__()
        self.trainer: pl.Trainer  # from when it is asked for batches
        self.train, self.validation = train, validation
        self.views, self.stacked, self.on_device = views, stacked, on_device
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.resumed_batches = 0
        self.images: Tensor | None = None  # all of the training set, if the GPU holds them

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._batches()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # Lightning restores its own count only after the loader's workers have begun to fetch
        self.resumed_batches = state["batches"]

    def _batches(self) -> int:
        return max(self.resumed_batches, batches_trained(self.trainer))

    def _position(self) -> tuple[int, int]:
        """(epoch, step) of the next batch."""
        steps = len(self.sampler)
        limit = self.trainer.limit_train_batches
        steps = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        return divmod(self._batches(), steps)

    def train_dataloader(self) -> DataLoader:
        self.sampler = StepSampler(
            len(self.train),
            self.batch_size,
            self.seed,
            self._position,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        if self.on_device:
            device = self.trainer.strategy.root_device
            self.images = None
            if isinstance(self.train, ImageData) and fit_on(device, self.train.images):
                self.images = self.train.images.to(device)
            dataset: Dataset[Any] = StepDataset(self.train, self.images is not None)
        else:
            transforms = [image_transform(view.augmentation) for view in self.views]
            dataset = ViewDataset(self.train, transforms, self.seed)
        return self._loader(dataset, batch_sampler=self.sampler)

    def teardown(self, stage: str) -> None:
        self.images = None  # the evaluation may need the memory

    def val_dataloader(self):
        if self.validation is None:
            return []
        data, processes = self.validation, self.trainer.world_size
        if processes > 1:  # every image in one process
            data = data.subset(torch.arange(self.trainer.global_rank, len(data), processes))
        return self._loader(EvaluationDataset(data), batch_size=256)

    def _loader(self, dataset: Dataset, **kwargs) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )

    def on_after_batch_transfer(self, batch, dataloader_idx: int):
        if not isinstance(batch, Batch):
            images, targets = batch
            augmentation = self.views[0].augmentation
            return normalise(images, augmentation.mean, augmentation.std), targets
        step, images, targets = batch
        # what layers draw (dropout, stochastic depth, WMSE's groups) is the same after a resume too
        place = step.epoch, step.step, self.trainer.global_rank
        _seed(generator(self.seed, LAYERS, *place).initial_seed(), targets.device)
        if images is None and self.images is not None:
            images = self.images[step.indices]
        if not self.on_device:
            views = images[0] if self.stacked else [view for some in images for view in some]
            return [step.indices, views, targets]
        global_batch = self.batch_size * self.trainer.world_size
        made = make_views(self.views, images, step, self.seed, global_batch)
        views = made[0] if self.stacked else [view for patches in made for view in patches]
        return [step.indices, views, targets]


def _seed(seed: int, device: torch.device) -> None:
    """``torch.manual_seed`` for the CPU and one device.

    That one also notes a traceback for every kind of device that is not in use.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
