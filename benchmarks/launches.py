"""How many calls a training step dispatches on an accelerator, by phase, beside its network's.

A step of the recipes of scripts/pretrain/cifar through Lightning, with the callbacks of a run, on
a pretended GPU (pretended_gpu.py), so that none is needed. Counted are calls that are neither views
nor allocations, in the third step of a run; a call is about one launch. A `_foreach_` call counts
as one: it is a launch for every few dozen tensors. In bf16, with its casts. That step is neither
logged nor looked at by the gauge of collapse, as four in five are. 32 images of fewer pixels; with
more of them the calls are the same, up to a block (`DEVICE_BLOCK_BYTES`).

The network is the backbone and the heads, the teacher's too, forward and backward.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_map_only

from emp_plugin.config import read_config
from emp_plugin.data import load_dataset
from emp_plugin.solo_learn import pl
from emp_plugin.training.data import PretrainData
from emp_plugin.training.probing import fresh_method
from emp_plugin.training.run import build_loggers, build_trainer, fit
from pretended_gpu import PretendedGPU, pretending, to_the_gpu

automatic = import_module(f"{pl.__name__}.loops.optimization.automatic")
call = import_module(f"{pl.__name__}.trainer.call")
SCRIPTS = Path(__file__).parents[1] / "scripts" / "pretrain"
RECIPES = ("emp", "emp_native", "simclr", "byol", "vicreg", "swav", "ressl")
NETWORK = ("network forward", "network backward")
PHASES = (
    "views",
    *NETWORK,
    "loss",
    "loss backward",
    "optimiser",
    "momentum update",
    "logging",
    "callbacks",
    "rest",
)
PARTS = ("encoder", "backbone", "embedder", "projector", "predictor", "prototypes")
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
NO_LAUNCH = ALLOCATIONS + ("_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "detach_")
# what a test watches: most calls for the views of one augmentation, and of all that is not network
# as a share of the network's (the goal for these is 0.5)
VIEWS = 120
MOST = {
    "emp": 1.0,
    "emp_native": 1.0,
    "simclr": 0.7,
    "byol": 0.6,
    "vicreg": 0.75,
    "swav": 0.8,
    "ressl": 0.65,
}
STEP = 2  # counted; the steps before set up the optimiser and Lightning's means


@dataclass
class Counts:
    """Calls and waits of one step by phase, and how often each operation was called."""

    calls: Counter = field(default_factory=Counter)
    operations: Counter = field(default_factory=Counter)
    waits: list[tuple[str, str]] = field(default_factory=list)

    @property
    def network(self) -> int:
        return sum(self.calls[phase] for phase in NETWORK)

    @property
    def others(self) -> int:
        return self.calls.total() - self.network


class CountingGPU(PretendedGPU):
    """Notes the calls and waits of the phase that the program is in."""

    def __init__(self):
        super().__init__()
        self.counts = Counts()
        self.phase = "rest"
        self.network_nodes: set[int] = set()

    def begin_step(self) -> Counts:
        self.counts = Counts()
        self.network_nodes.clear()
        self.casts.weights.clear()
        return self.counts

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        first = torch.autograd._get_sequence_nr()
        try:
            yield
        finally:
            self.phase = before
            if phase == "network forward":
                self.network_nodes.update(range(first, torch.autograd._get_sequence_nr()))

    def now(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self.phase
        own = node.name().endswith("AccumulateGrad") or node._sequence_nr() in self.network_nodes
        return "network backward" if own else "loss backward"

    def waited(self, name: str) -> None:
        super().waited(name)
        self.counts.waits.append((self.now(), name))

    def launched(self, func: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in NO_LAUNCH:
            phase = self.now()
            self.counts.calls[phase] += 1
            self.counts.operations[phase, name] += 1


def count(recipe: str, *overrides: str) -> Counts:
    """Counts of a step of scripts/pretrain/cifar/<recipe>.yaml, on the digits' 32x32 images."""
    settings = [
        "data.dataset=digits",
        "+data.normalisation.digits=${data.normalisation.cifar10}",
        "optimizer.batch_size=32",
        f"limit_train_batches={STEP + 2}",
        "max_epochs=1",
        "log_every_n_steps=50",
        "precision=bf16-mixed",
        "accelerator=cpu",
        "enable_progress_bar=False",
        "enable_model_summary=False",
        f"data.output_size={8 if recipe == 'emp_native' else 16}",  # fewer pixels, the same calls
        *(["data.num_patches=4", "data.patch_size=8"] if recipe.startswith("emp") else []),
        *overrides,
    ]
    cfg = read_config(str(SCRIPTS), f"cifar/{recipe}", settings)
    train, _ = load_dataset("digits", None)
    gpu, steps = CountingGPU(), []

    def begin(data: PretrainData, batch: Any, dataloader_idx: int) -> Any:
        steps.append(gpu.begin_step())
        return tree_map_only(torch.Tensor, gpu.pin, batch)  # as the loader does beside a GPU

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, pretending(gpu):

        def replace(owner: Any, name: str, by: Callable) -> None:
            stack.enter_context(mock.patch.object(owner, name, by))

        def in_phase(owner: Any, name: str, phase: str) -> None:
            replace(owner, name, gpu.within(phase)(getattr(owner, name)))

        trainer, model = build_trainer(cfg, Path(folder)), fresh_method(cfg)
        trainer.loggers = build_loggers(cfg, Path(folder), 0)
        trainer.strategy._root_device = model._device = torch.device("cuda:0")
        replace(trainer.strategy.accelerator, "setup_device", lambda device: None)
        replace(trainer.strategy, "model_to_device", lambda: to_the_gpu(model))
        replace(PretrainData, "on_before_batch_transfer", begin)
        in_phase(trainer.strategy, "batch_to_device", "views")
        for part, name in product(("", "momentum_"), PARTS):
            if isinstance(module := getattr(model, part + name, None), torch.nn.Module):
                in_phase(module, "forward", "network forward")
        in_phase(model, "training_step", "loss")
        in_phase(trainer.strategy, "optimizer_step", "optimiser")
        in_phase(automatic.Closure, "closure", "rest")
        in_phase(model, "on_train_batch_end", "momentum update")
        in_phase(model, "log", "logging")
        in_phase(trainer._logger_connector, "update_train_step_metrics", "logging")
        in_phase(call, "_call_callback_hooks", "callbacks")
        with gpu:
            fit(cfg, trainer, model, train, None, Path(folder), None)
    return steps[STEP]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--operations", action="store_true", help="name them, most frequent first")
    args = parser.parse_args()
    table = Table("recipe", *PHASES, "all others", "network", "others / network", "waits")
    for recipe in args.recipes:
        counts = count(recipe)
        numbers = [counts.calls[phase] for phase in PHASES]
        ratio = f"{counts.others / counts.network:.2f}"
        numbers += [counts.others, counts.network, ratio, len(counts.waits)]
        table.add_row(recipe, *map(str, numbers))
        if args.operations:
            for phase in PHASES:
                named = [(k, n) for (p, k), n in counts.operations.most_common() if p == phase]
                print(recipe, phase, *(f"{name}:{number}" for name, number in named))
            print(recipe, "waits", *counts.waits)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
