"""A run's training steps beside its bare network, eager and compiled, as a GPU has them.

Bare is forward and backward of a method's networks on ready views, and a teacher's forward pass; it
is never compiled. Blocks of steps are timed in turn inside one run of Lightning's Trainer. The
device is waited for at the end of a block alone. The first block is a warm-up; a compiler is at
work in it. Images are scikit-learn's digits, 32x32: the time does not depend on what they show.
"""

from collections.abc import Callable

import torch
from common import DEVICE, arguments, case, report
from step import SCRIPTS, bare, train

from emp_plugin.config import Run, augmentations, read_config
from emp_plugin.training.probing import fresh_method

BLOCK = 25  # steps
EAGER = ("emp", "emp_native", "simclr", "byol", "vicreg", "swav", "ressl")
COMPILED = ("emp", "emp_native", "simclr")


def bare_baseline(cfg: Run) -> Callable[[], None]:
    """Forward and backward of a baseline's networks, and the forward pass of its teacher's."""
    network = fresh_method(cfg).to(DEVICE)
    views = [
        torch.randn(cfg.optimizer.batch_size, side, side, 3, device=DEVICE).movedim(-1, 1)
        for view in augmentations(cfg)
        for side in [view.output_size] * view.num_patches
    ]
    teacher = getattr(network, "momentum_encoder", getattr(network, "momentum_backbone", None))
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(cfg.precision)

    def step() -> None:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            made = [network(view) for view in views]
            if teacher is not None:
                with torch.no_grad():
                    for view in views:
                        network.momentum_projector(teacher(view))
        # the prediction, or the projection, which ReSSL calls q
        last = [next(out[key] for key in "pzq" if key in out).float().sum() for out in made]
        torch.stack(last).sum().backward()
        network.zero_grad()

    return step


def main() -> None:
    args = arguments(__doc__.splitlines()[0], trials=3)
    block = 2 if args.small else BLOCK
    cases = {}
    for name, mode in [
        *((name, "off") for name in EAGER),
        *((name, "default") for name in COMPILED),
    ]:
        overrides = [
            "data.dataset=digits",
            "max_epochs=1",
            "++data.normalisation.digits={mean:[0.5,0.5,0.5],std:[0.5,0.5,0.5]}",
            f"performance.compile={mode}",
            f"limit_train_batches={block * (args.trials + 1)}",
            "enable_model_summary=False",
            "enable_progress_bar=False",
        ]
        if args.small:
            overrides += ["optimizer.batch_size=4"]
            overrides += ["data.num_patches=2"] if name.startswith("emp") else []
            overrides += ["method_kwargs.queue_size=8"] if name in ("swav", "ressl") else []
        cfg = read_config(SCRIPTS, f"cifar/{name}", overrides)
        reference = (bare if cfg.method == "emp" else bare_baseline)(cfg)
        times = {who: spent[1:] for who, spent in train(cfg, {"bare": reference}, block).items()}
        label = f"{name}, {'compiled' if mode != 'off' else 'eager'}; bare network, eager"
        cases[label] = case(times["ours"], times["bare"])
        views = cfg.optimizer.batch_size * sum(view.num_patches for view in augmentations(cfg))
        cases[label]["views_per_second"] = round(views / cases[label]["ours"]["median"])
        report("throughput", cases, args)  # after every case: what is cut off leaves the others


if __name__ == "__main__":
    main()
