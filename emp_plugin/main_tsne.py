"""t-SNE of the test images under several checkpoints.

``python -m emp_plugin.main_tsne CHECKPOINT [CHECKPOINT ...] [--out FILES]``
"""

import argparse
import sys
from pathlib import Path

from emp_plugin.command import user_command
from emp_plugin.studies.tsne import FEATURES, write_tsne


@user_command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="of runs on the same dataset, a panel each",
    )
    parser.add_argument(
        "--features",
        choices=FEATURES,
        default="backbone",
        help="of whole images; default: backbone",
    )
    parser.add_argument(
        "--images", type=int, default=2000, help="test images, as many of each class; default: 2000"
    )
    parser.add_argument(
        "--classes", type=int, default=10, help="the first so many classes; default: 10"
    )
    parser.add_argument(
        "--train-path", help="folder of the dataset; default: the checkpoint's data.train_path"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/tsne"),
        help="path without ending of the .png and the .csv; default: results/tsne",
    )
    args = parser.parse_args(argv)
    write_tsne(
        args.checkpoints,
        args.features,
        args.images,
        args.classes,
        args.train_path,
        args.out.expanduser(),
    )
    print(f"results: {args.out}.png, {args.out}.csv")


if __name__ == "__main__":
    sys.exit(main())
