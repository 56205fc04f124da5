"""The linear probe, 100 epochs on 50,000 features, beside SGD on raw features by a DataLoader.

Ours takes its batches by indices from memory; the published program has a DataLoader, here with 2
workers and with none. Whole probes of ours are timed. Of the reference one epoch is, and multiplied
by 100 in the table. Both see batches of 100; the accuracies come from whole runs of each.
"""

import torch
import torch.nn.functional as F
from common import DEVICE, arguments, case, report, seconds
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from emp_plugin.evaluation import linear_probe
from emp_plugin.evaluation.probes import top_k

CLASSES, BATCH = 10, 100


def made_up(count: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (count, width) like a network's: positive, of one scale, classes overlap."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(0))
    y = torch.randint(CLASSES, (count,), generator=draws)
    return (0.1 * centres[y] + torch.randn(count, width, generator=draws)).relu(), y


class Reference:
    """A linear layer, autograd and torch.optim.SGD behind a DataLoader, one epoch a call."""

    def __init__(self, x: Tensor, y: Tensor, epochs: int, num_workers: int):
        self.layer = nn.Linear(x.shape[1], CLASSES).to(DEVICE)
        self.optimizer = torch.optim.SGD(
            self.layer.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-5
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.loader = DataLoader(
            TensorDataset(x, y), BATCH, shuffle=True, drop_last=True, num_workers=num_workers
        )

    def __call__(self) -> None:
        for x, y in self.loader:
            self.optimizer.zero_grad()
            F.cross_entropy(self.layer(x.to(DEVICE)), y.to(DEVICE)).backward()
            self.optimizer.step()
        self.schedule.step()


def main() -> None:
    args = arguments(__doc__.splitlines()[0], trials=3)
    count, epochs = (1000, 3) if args.small else (50_000, 100)
    cases = {}
    for width in (32,) if args.small else (512, 4096):
        (x, y), (u, v) = made_up(count, width, 1), made_up(count // 5, width, 2)
        reference = Reference(x, y, epochs, num_workers=0)
        (
            linear_probe(x, y, u, v, CLASSES, epochs=1, device=DEVICE),
            Reference(x, y, 1, num_workers=0)(),
        )  # warm-ups
        times = {"ours": [], 0: [], 2: []}
        for _ in range(args.trials):
            times["ours"].append(
                seconds(lambda: linear_probe(x, y, u, v, CLASSES, epochs=epochs, device=DEVICE))
            )
            for workers in (0, 2):
                times[workers].append(epochs * seconds(Reference(x, y, epochs, workers)))
        for _ in range(epochs):
            reference()
        with torch.no_grad():
            accuracy = {
                "ours": linear_probe(x, y, u, v, CLASSES, epochs=epochs, device=DEVICE).top1,
                "reference": top_k(reference.layer(u.to(DEVICE)).cpu(), v).top1,
            }
        for workers in (2, 0):
            name = f"{count} x {width}, {epochs} epochs; DataLoader with {workers} workers"
            cases[f"{name} (100 x one epoch)"] = case(times["ours"], times[workers]) | {
                "top1": accuracy
            }
        print(f"{width} wide: top-1 {accuracy}")
    report("linear probe", cases, args)


if __name__ == "__main__":
    main()
