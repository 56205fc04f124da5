"""Runs of the command line, made tiny."""

from emp_plugin import cli
from emp_plugin.training.callbacks import Checkpoints

# any method's
TINY = (
    "precision=32",
    "accelerator=cpu",
    "enable_progress_bar=False",
    "enable_model_summary=False",
)
# EMP's own
TINY_EMP = (
    "data.num_patches=2",
    "method_kwargs.embedding_dim=16",
    "method_kwargs.proj_hidden_dim=16",
    "method_kwargs.proj_output_dim=8",
)


def pretrain(folder, *settings, recipe="digits/emp"):
    """Train a recipe, made tiny, into a folder; returns the exit status."""
    return cli.main(["pretrain", recipe, *TINY, f"checkpoint.dir={folder}", *settings])


def the_run(folder):
    """The one run in a ``checkpoint.dir``."""
    (config,) = folder.glob("*/*/config.yaml")
    return config.parent


def at_step(monkeypatch, step, act):
    """Do ``act(trainer)`` at the end of a step."""
    original = Checkpoints.on_train_batch_end

    def hook(self, trainer, *args):
        original(self, trainer, *args)
        if trainer.global_step == step:
            act(trainer)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", hook)
