"""What we rely on in Lightning beyond its documented interface; an epoch has five batches."""

import signal
from importlib import import_module

import pytest
import torch
from torch.utils.data import DataLoader

from emp_plugin.solo_learn import pl
from emp_plugin.training import lightning
from emp_plugin.training.metrics import MetricsCSV

BATCHES = 5


class Numbers(pl.LightningModule):
    """Logs the number of its batch, weighted by that number plus one."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        number = torch.tensor(float(BATCHES * self.current_epoch + batch_idx))
        weight = batch_idx + 1
        self.log("number", number, on_step=True, on_epoch=True, batch_size=weight)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.ones(2 * BATCHES, 1), batch_size=2)


class AtBatch(pl.Callback):
    """Calls ``act(trainer, batch_idx)`` before each batch."""

    def __init__(self, act):
        self.act = act

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.act(trainer, batch_idx)


def save_at(step, path):
    def act(trainer, batch_idx):
        if trainer.global_step == step:
            trainer.save_checkpoint(path, weights_only=False)

    return AtBatch(act)


def train(*callbacks, epochs=2, logger=False, checkpoint=None, plugins=None):
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=logger,
        plugins=plugins,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Numbers(), ckpt_path=checkpoint, weights_only=True)
    return trainer


def rows(folder, *callbacks, before=0, **kwargs):
    """metrics.csv of a run whose first rows, of an earlier process, are in the folder."""
    path = folder / "metrics.csv"
    train(*callbacks, logger=MetricsCSV(path, before), **kwargs)
    return path.read_text()


def test_batches_trained(tmp_path):
    seen = []

    def note(trainer, batch_idx):
        seen.append(lightning.batches_trained(trainer))
        assert seen[-1] == BATCHES * trainer.current_epoch + batch_idx

    train(AtBatch(note), save_at(7, tmp_path / "7.ckpt"))
    assert seen == list(range(10))
    seen.clear()
    train(AtBatch(note), checkpoint=tmp_path / "7.ckpt")
    assert seen == [7, 8, 9]


@pytest.mark.parametrize(("step", "begun"), [(3, 1), (5, 1), (6, 2)])
def test_epochs_begun(tmp_path, step, begun):
    train(save_at(step, path := tmp_path / "x.ckpt"))
    assert lightning.epochs_begun(torch.load(path, weights_only=True)) == begun


class SaveLast(pl.Callback):
    """Saves the last moment of the last epoch, when Lightning has left it."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, module):
        lightning.add_completed_epochs(trainer, -1)
        trainer.save_checkpoint(self.path, weights_only=False)
        lightning.add_completed_epochs(trainer, 1)


def test_add_completed_epochs(tmp_path):
    whole = rows(tmp_path, epochs=3)
    path = tmp_path / "last.ckpt"
    assert train(SaveLast(path)).current_epoch == 2
    assert lightning.epochs_begun(torch.load(path, weights_only=True)) == 2

    again = train(checkpoint=path)
    assert (again.global_step, again.current_epoch) == (10, 2)
    assert rows(tmp_path, epochs=3, before=10, checkpoint=path) == whole


def test_align_step_count(tmp_path):
    align = AtBatch(lambda trainer, batch_idx: lightning.align_step_count(trainer))
    whole = rows(tmp_path, save_at(5, tmp_path / "5.ckpt"))
    assert rows(tmp_path, align, before=5, checkpoint=tmp_path / "5.ckpt") == whole


class Sums(pl.Callback):
    """Takes the sums of an epoch along in a checkpoint."""

    def __init__(self):
        self.sums = {}

    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["sums"] = lightning.epoch_sums(trainer)

    def on_load_checkpoint(self, trainer, module, checkpoint):
        self.sums = checkpoint["sums"]

    def on_train_batch_end(self, trainer, *args):
        lightning.add_epoch_sums(trainer, self.sums)


def test_epoch_sums(tmp_path):
    train(Sums(), save_at(8, tmp_path / "8.ckpt"))
    sums = torch.load(tmp_path / "8.ckpt", weights_only=True)["sums"]
    # batches 5, 6 and 7 with weights 1, 2 and 3; the step's own value is not a mean of the epoch
    assert {key: [float(part) for part in parts] for key, parts in sums.items()} == {
        "training_step.number": [38, 6]
    }


def test_add_epoch_sums(tmp_path):
    whole = train(Sums(), save_at(8, tmp_path / "8.ckpt"))
    resumed = train(callback := Sums(), checkpoint=tmp_path / "8.ckpt")
    assert resumed.callback_metrics["number_epoch"] == whole.callback_metrics["number_epoch"]
    assert float(whole.callback_metrics["number_epoch"]) == pytest.approx((38 + 8 * 4 + 9 * 5) / 15)
    assert not callback.sums


@pytest.mark.parametrize("requeue", [True, False, None])
def test_requeue_signal(requeue):
    """On SLURM with and without requeueing, and elsewhere."""
    seen = []

    class Note(pl.Callback):
        def on_train_start(self, trainer, module):
            number = lightning.requeue_signal(trainer)
            seen.append((number, callable(signal.getsignal(signal.SIGUSR2))))

    slurm = import_module(f"{pl.__name__}.plugins.environments").SLURMEnvironment
    environment = None if requeue is None else slurm(requeue, requeue_signal=signal.SIGUSR2)
    train(Note(), epochs=1, plugins=environment)
    assert seen == [(signal.SIGUSR2, True) if requeue else (None, False)]
