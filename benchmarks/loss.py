"""The objective, forward and backward, beside the published algorithm and lightly's EMPSSLLoss.

The published algorithm takes one d x d determinant per patch.
"""

import torch
import torch.nn.functional as F
from common import DEVICE, arguments, report, side_by_side

from emp_plugin.losses import emp_ssl_loss


def published(z: torch.Tensor, weight: float = 200.0, eps: float = 0.2) -> torch.Tensor:
    """The loss as the authors' program computes it, in a loop over patches."""
    n, b, d = z.shape
    eye, centre = torch.eye(d, device=z.device), z.mean(0)
    rate = similarity = 0.0
    for patch in z:
        rate = rate + torch.logdet(eye + d / (b * eps) * patch.T @ patch) / 2
        similarity = similarity + F.cosine_similarity(patch, centre, dim=1).mean()
    return -(rate + weight * similarity) / n


def ours(z: torch.Tensor) -> torch.Tensor:
    return emp_ssl_loss(z).loss


def main() -> None:
    args = arguments(__doc__.splitlines()[0], trials=5)
    n, b = (4, 10) if args.small else (200, 100)
    cases = {}
    for d in (16, 32) if args.small else (512, 1024):
        z = F.normalize(torch.randn(n, b, d, device=DEVICE), dim=-1).requires_grad_()

        def step(loss):
            z.grad = None
            loss(z).backward()

        references = {"loop of d x d logdets": published}
        try:
            from lightly.loss.emp_ssl_loss import EMPSSLLoss
        except ImportError:
            print("lightly is not installed (pip install lightly): its case is left out")
        else:
            theirs = EMPSSLLoss()
            references["lightly"] = lambda z: theirs(list(z))
        for name, reference in references.items():
            case = side_by_side(lambda: step(ours), lambda: step(reference), args.trials)
            case["values"] = [ours(z).item(), reference(z).item()]
            cases[f"{name}, n {n}, b {b}, d {d}"] = case
    report("emp_ssl_loss", cases, args)


if __name__ == "__main__":
    main()
