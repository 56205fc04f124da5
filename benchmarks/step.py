"""One training step through Lightning beside the bare network, and beside the published way.

Ours is a step of the recipes `cifar/emp` and `cifar/emp_native`, with logging.

Bare is forward and backward of the same backbone, embedding layer and projector on ready patches,
in the same precision and batch: the arithmetic that no program can avoid. Ours adds the loader,
the patches, the objective, LARS, the online classifier and the logs. The two are timed in turn,
inside one run of Lightning's Trainer.

Published is the same network in float32 and NCHW, on patches that PIL makes in the process itself,
with a loop over patches in the loss and without an optimiser's step:

- Always 16 -> 32, the published augmentation. So the row of `emp_native` shows what the cheaper
  augmentation saves.
- Half of the images at a time, one after the other: all of them would need more than 24 GB, and on
  two devices it is what the published program does.
- Twice: with the system's allocator as it is, and with the settings of `scripts/env.sh`, which we
  bring along and which help it too.
- Without workers. On a CPU these would take its cores from the network. Beside a GPU they would
  not, and this reference is slower there than it need be.
- In processes of its own, whose trials are paired with ours in order.

Images are scikit-learn's digits, 32x32: the time does not depend on what they show.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import DEVICE, arguments, case, report
from common import seconds as seconds_of
from loss import published as published_loss
from torchvision.transforms.functional import to_pil_image

from emp_plugin.config import Run, augmentations, read_config
from emp_plugin.data import load_dataset
from emp_plugin.solo_learn import backbone_of, pl
from emp_plugin.training.compiled import Compiled
from emp_plugin.training.data import PretrainData
from emp_plugin.training.probing import fresh_method
from emp_plugin.training.run import build_loggers, build_trainer
from emp_plugin.transforms import BatchMultiPatch, MultiPatchTransform

SCRIPTS = Path(__file__).parents[1] / "scripts" / "pretrain"
# what scripts/env.sh sets
ALLOCATOR = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


class InTurn(pl.Callback):
    """Calls the references after every block of training steps.

    Ours is the time until the next block ends. A GPU is waited for at its end alone: a run does not
    wait after a step either.

    Args:
        references: each makes one step.
        block: steps.
    """

    def __init__(self, references: dict[str, Callable[[], None]], block: int = 1):
        self.references, self.block = references, block
        self.seconds: dict[str, list[float]] = {name: [] for name in ("ours", *references)}
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, number: int
    ) -> None:
        if (number + 1) % self.block:
            return
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.seconds["ours"].append((time.perf_counter() - self.began) / self.block)
        for name, reference in self.references.items():
            spent = seconds_of(lambda: [reference() for _ in range(self.block)])
            self.seconds[name].append(spent / self.block)
        self.began = time.perf_counter()


def bare(cfg: Run) -> Callable[[], None]:
    """Forward and backward of EMP's network alone, on ready patches."""
    [augmentation] = augmentations(cfg)
    n, b, side = augmentation.num_patches, cfg.optimizer.batch_size, augmentation.output_size
    network = fresh_method(cfg).to(DEVICE)
    patches = torch.randn(n, b, side, side, 3, device=DEVICE).movedim(-1, 2)
    upstream = torch.randn(n, b, network.settings.proj_output_dim, device=DEVICE)
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(cfg.precision)

    def step() -> None:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            z = network.project(patches)[1]
        z.backward(upstream)
        network.zero_grad()

    return step


def published_step(cfg: Run, images: torch.Tensor) -> Callable[[], None]:
    """Patches, forward, loss and backward as the authors' program makes them.

    Without an optimiser's step, in its favour.
    """
    [augmentation] = augmentations(cfg)
    transform = MultiPatchTransform(**vars(augmentation))
    pictures = [to_pil_image(image) for image in images[: cfg.optimizer.batch_size]]
    network = fresh_method(cfg).to(DEVICE, memory_format=torch.contiguous_format)

    def step() -> None:
        half = len(pictures) // 2
        for part in (pictures[:half], pictures[half:]):
            patches = [torch.stack(views) for views in zip(*map(transform, part))]
            h = backbone_of(network)(torch.cat(patches).to(DEVICE))
            z = F.normalize(network.projector(network.embedder(h)), dim=-1)
            published_loss(z.unflatten(0, (augmentation.num_patches, -1))).backward()
        network.zero_grad()

    return step


def train(
    cfg: Run, references: dict[str, Callable[[], None]], block: int = 1
) -> dict[str, list[float]]:
    """Seconds of a run's training steps, and of the references in turn with blocks of them.

    The first of each is a warm-up.
    """
    images, _ = load_dataset(cfg.data.dataset, None)
    needed = cfg.limit_train_batches * cfg.optimizer.batch_size
    images = images.subset(torch.arange(needed) % len(images))
    views = [BatchMultiPatch.from_augmentation(augmentation) for augmentation in augmentations(cfg)]
    stacked = cfg.method == "emp"
    data = PretrainData(images, None, views, cfg.optimizer.batch_size, cfg.seed, stacked=stacked)
    watch = InTurn(references, block)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(cfg, Path(folder))
        if cfg.performance.compile != "off":
            trainer.callbacks.append(Compiled(cfg.performance.compile))
        trainer.loggers = build_loggers(cfg, Path(folder), resumed_step=0)
        trainer.callbacks.append(watch)
        trainer.fit(fresh_method(cfg), datamodule=data)
    return watch.seconds


def published_seconds(
    overrides: list[str], trials: int, environment: dict[str, str]
) -> list[float]:
    """Seconds of ``trials`` published steps, after one as a warm-up, in a process of their own."""
    command = [sys.executable, __file__, "--published", str(trials), *overrides]
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--published"]:
        trials, *overrides = sys.argv[2:]
        images = load_dataset("digits", None)[0].images
        step = published_step(read_config(SCRIPTS, "cifar/emp", overrides), images)
        step()
        print(json.dumps([seconds_of(step) for _ in range(int(trials))]))
        return
    args = arguments(__doc__.splitlines()[0], trials=3)
    overrides = [
        "data.dataset=digits",
        f"limit_train_batches={args.trials + 1}",
        "log_every_n_steps=1",
        "enable_model_summary=False",
    ]
    if args.small:
        overrides += ["data.num_patches=2", "optimizer.batch_size=4"]
    plain = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    published = {
        "system's allocator": published_seconds(overrides, args.trials, plain),
        "our allocator settings": published_seconds(overrides, args.trials, dict(os.environ)),
    }
    cases = {}
    for name in ("emp", "emp_native"):
        cfg = read_config(SCRIPTS, f"cifar/{name}", overrides)
        times = {who: seconds[1:] for who, seconds in train(cfg, {"bare": bare(cfg)}).items()}
        cases[f"{name}: bare forward and backward"] = case(times["ours"], times["bare"])
        for allocator, seconds in published.items():
            label = f"{name}: published way, 16 -> 32, float32, {allocator}"
            cases[label] = case(times["ours"], seconds)
    report("training step", cases, args)


if __name__ == "__main__":
    main()
