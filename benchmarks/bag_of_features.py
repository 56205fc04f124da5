"""A bag of 128 patches for each image, beside the bare forward pass of the same network on ready patches."""

import torch
from common import DEVICE, arguments, report, side_by_side
from step import SCRIPTS

from emp_plugin.config import augmentations, read_config
from emp_plugin.data import load_dataset
from emp_plugin.evaluation import extract_features
from emp_plugin.evaluation.features import FORWARD_PIXELS
from emp_plugin.training.probing import fresh_method


def main() -> None:
    args = arguments(__doc__, trials=3)
    images, bag = (8, 4) if args.small else (50, 128)
    data = load_dataset("digits", None)[0].subset(range(images))
    cases = {}
    for name in ("emp", "emp_native"):
        cfg = read_config(SCRIPTS, f"cifar/{name}", ["data.dataset=digits"])
        [augmentation] = augmentations(cfg)
        method = fresh_method(cfg).to(DEVICE).eval()
        side = augmentation.output_size
        at_once = FORWARD_PIXELS[DEVICE.type] // side**2
        patches = torch.randn(at_once, side, side, 3, device=DEVICE).movedim(-1, 1)

        def bare() -> None:
            with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):
                left = images * bag
                while left > 0:
                    method.features(patches[:left])
                    left -= at_once

        for augmented in (True, False):
            label = "augmented" if augmented else "plain"
            cases[f"{name}, {images} images x {bag} {label} patches"] = side_by_side(
                lambda: extract_features(
                    method, data, augmentation, "bag", bag, augmented, bf16=True
                ),
                bare,
                args.trials,
            )
    report("bag of features", cases, args)


if __name__ == "__main__":
    main()
