"""Features of a dense view, beside a bag of 16 plain patches of the same images."""

from common import DEVICE, arguments, report, side_by_side
from step import SCRIPTS

from emp_plugin.config import augmentations, read_config
from emp_plugin.data import load_dataset
from emp_plugin.evaluation import View, extract_features
from emp_plugin.evaluation.views import dense_scale
from emp_plugin.training.probing import encoder, fresh_method


def main() -> None:
    args = arguments(__doc__, trials=3)
    images, bag = (8, 2) if args.small else (400, 16)
    data = load_dataset("digits", None, image_size=32)[0].subset(range(images))
    bf16 = not args.small
    cases = {}
    for name in ("emp", "emp_native"):
        cfg = read_config(str(SCRIPTS), f"cifar/{name}", ["data.dataset=digits"])
        crops = augmentations(cfg)
        method = fresh_method(cfg).to(DEVICE)
        views = {
            "whole": View("whole"),
            "dense": View("dense", crops[0], scale=dense_scale(crops, 32)),
        }
        patches = View("bag", crops[0], num_patches=bag)

        def take(view: View) -> None:
            extract_features(encoder(method), data, view, bf16=bf16)

        for label, view in views.items():
            cases[f"{name}, {images} images: {label}; a bag of {bag} plain patches"] = side_by_side(
                lambda: take(view), lambda: take(patches), args.trials
            )
    report("views", cases, args)


if __name__ == "__main__":
    main()
