"""The objective, forward and backward, against the published algorithm (one d x d logdet per patch) and lightly's EMPSSLLoss."""

import torch
import torch.nn.functional as F
from common import DEVICE, arguments, report, side_by_side

from emp_plugin.losses import emp_ssl_loss


def published(z: torch.Tensor, weight: float = 200.0, eps: float = 0.2) -> torch.Tensor:
    """The loss as the authors' program computes it: a loop over patches, each with a d x d determinant."""
    n, b, d = z.shape
    eye, centre, rate, similarity = torch.eye(d, device=z.device), z.mean(0), 0.0, 0.0
    for patch in z:
        rate = rate + torch.logdet(eye + d / (b * eps) * patch.T @ patch) / 2
        similarity = similarity + F.cosine_similarity(patch, centre, dim=1).mean()
    return -(rate + weight * similarity) / n


def main() -> None:
    args = arguments(__doc__, trials=5)
    n, b = (4, 10) if args.small else (200, 100)
    cases = {}
    for d in (16, 32) if args.small else (512, 1024):
        z = F.normalize(torch.randn(n, b, d, device=DEVICE), dim=-1).requires_grad_()

        def backward(loss):
            z.grad = None
            loss.backward()

        ours = lambda: backward(emp_ssl_loss(z).loss)  # noqa: E731
        size = f"n {n}, b {b}, d {d}"
        cases[f"loop of d x d logdets, {size}"] = side_by_side(
            ours, lambda: backward(published(z)), args.trials
        )
        cases[f"loop of d x d logdets, {size}"]["values"] = [
            emp_ssl_loss(z).loss.item(),
            published(z).item(),
        ]
        try:
            from lightly.loss.emp_ssl_loss import EMPSSLLoss
        except ImportError:
            print("lightly is not installed (pip install lightly): its case is left out")
            continue
        theirs = EMPSSLLoss()
        cases[f"lightly, {size}"] = side_by_side(
            ours, lambda: backward(theirs(list(z))), args.trials
        )
        cases[f"lightly, {size}"]["values"] = [emp_ssl_loss(z).loss.item(), theirs(list(z)).item()]
    report("emp_ssl_loss", cases, args)


if __name__ == "__main__":
    main()
