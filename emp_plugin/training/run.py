"""One pretraining run, from configuration to summary."""

import json
import multiprocessing
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch

from emp_plugin.config import Run, augmentations, to_dict, trainer_arguments, uses_gpu
from emp_plugin.data import ImageData, ImageFiles, make_views
from emp_plugin.data.batches import Step
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import pl
from emp_plugin.training import pictures
from emp_plugin.training.callbacks import (
    AtomicCheckpointIO,
    Checkpoints,
    Progress,
    StopOnBrokenLoss,
)
from emp_plugin.training.compiled import Compiled
from emp_plugin.training.data import PretrainData
from emp_plugin.training.flops import training_flops
from emp_plugin.training.folder import (
    SUMMARY,
    check_data,
    checkpoints_in,
    claim,
    describe_data,
    identity,
    new_folder,
    unfinished_folder,
    versions,
    write_text,
)
from emp_plugin.training.gauge import CollapseGauge
from emp_plugin.training.lightning import batches_trained, callbacks_of
from emp_plugin.training.metrics import MetricsCSV
from emp_plugin.training.probing import (
    evaluate_run,
    fresh_method,
    load_data,
    load_method,
    print_table,
)
from emp_plugin.transforms import BatchMultiPatch

MEMORY_ADVICE = (
    "set method_kwargs.patch_chunk (patches per image at a time, for emp), or take fewer patches "
    "or a smaller optimizer.batch_size"
)


def pretrain(cfg: Run) -> Path:
    """Train, evaluate and describe one run; returns its folder.

    Raises:
        UserError: for data, settings or hardware that cannot work; see also :func:`fit`.
    """
    train, test = load_data(cfg.data)
    resuming = cfg.auto_resume.enabled and not cfg.resume_from_checkpoint
    folder = unfinished_folder(cfg) if resuming else None
    checkpoint = newest_readable(folder, cfg) if folder else cfg.resume_from_checkpoint
    data = describe_data(train, test)
    if checkpoint:
        check_data(Path(checkpoint), data)
    resumed_step = load_method(checkpoint, like=cfg)[2]["global_step"] if checkpoint else 0
    folder = folder or new_folder(cfg)
    # before the method: solo-learn 1.0.6 counts the devices, and the setting may make no sense
    trainer = build_trainer(cfg, folder)
    model = fresh_method(cfg)
    global_batch = cfg.optimizer.batch_size * trainer.world_size
    if len(train) < global_batch:
        each = f" on each of {trainer.world_size} devices" if trainer.world_size > 1 else ""
        raise UserError(
            f"{len(train)} training images are fewer than a batch: "
            f"optimizer.batch_size={cfg.optimizer.batch_size}{each}"
        )
    if not trainer.is_global_zero:  # the first process alone writes and evaluates
        fit(cfg, trainer, model, train, test, folder, checkpoint)
        return folder
    with claim(folder, cfg, checkpoint_bytes(cfg, model, len(train) // global_batch), data):
        origin = f", continued from {checkpoint} (step {resumed_step})" if checkpoint else ""
        print(f"run folder: {folder}{origin}")
        trainer.loggers = build_loggers(cfg, folder, resumed_step)
        draw_first_patches(cfg, train, folder)
        trained = fit(cfg, trainer, model, train, test, folder, checkpoint)
        summarise(cfg, trainer, model, train, test, folder, trained)
    print(f"results: {folder}")
    return folder


def fit(
    cfg: Run,
    trainer: pl.Trainer,
    model: pl.LightningModule,
    train: ImageData | ImageFiles,
    test: ImageData | ImageFiles | None,
    folder: Path,
    checkpoint: str | Path | None,
) -> float:
    """Train the model, from the checkpoint if there is one.

    Returns:
        The seconds of training, those before the checkpoint included.

    Raises:
        UserError: after a signal, for a loss that is not finite, and when memory runs out or a data
            worker dies.
    """
    data = PretrainData(
        train,
        test,
        device_views(cfg),
        cfg.optimizer.batch_size,
        cfg.seed,
        cfg.data.num_workers,
        stacked=cfg.method == "emp",
        on_device=cfg.data.views == "device",
    )
    timer = pl.callbacks.Timer()
    callbacks = callbacks_of(trainer)
    callbacks += [timer, StopOnBrokenLoss(), CollapseGauge()]
    if cfg.performance.compile != "off":
        callbacks.append(Compiled(cfg.performance.compile))
    if cfg.checkpoint.enabled:
        callbacks.append(
            Checkpoints(
                folder,
                cfg.checkpoint.every_n_steps,
                cfg.checkpoint.min_seconds,
                cfg.checkpoint.frequency,
                cfg.checkpoint.keep_prev,
                to_dict(cfg),
                cfg.checkpoint.keep_every_n_steps,
                max_seconds(cfg),
            )
        )
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:
        # Lightning's answer to a signal before the first step, or to a second Ctrl-C
        raise KeyboardInterrupt from stop
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: {MEMORY_ADVICE}. {error}") from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        if "DefaultCPUAllocator" in str(error):
            raise UserError(f"out of memory: {MEMORY_ADVICE}. {error}") from error
        # the latter two when a worker dies while it hands something over
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        files = [images for images in (train, test) if isinstance(images, ImageFiles)]
        paths = ", ".join(path for images in files for path in images.died_on())
        reading = f", reading {paths}" if paths else ""
        said = (str(error) or type(error).__name__).splitlines()[0]
        for worker in multiprocessing.active_children():
            worker.kill()  # they ignore the SIGTERM that Python would end them with, and wait for
        raise UserError(
            f"a data worker died after step {trainer.global_step}{reading} ({said}): "
            "out of memory, perhaps; data.num_workers=0 fetches images in the main process"
        ) from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # the first process evaluates alone
    return timer.time_elapsed("train")


def max_seconds(cfg: Run) -> float | None:
    """``max_time``, "DD:HH:MM:SS" or a mapping as timedelta takes it, in seconds.

    Raises:
        UserError: for anything else.
    """
    limit = cfg.trainer.get("max_time")
    if limit is None:
        return None
    try:
        names = "days", "hours", "minutes", "seconds"
        given = dict(zip(names, map(int, limit.split(":")))) if isinstance(limit, str) else limit
        return timedelta(**given).total_seconds()
    except (TypeError, ValueError) as error:
        raise UserError(f"max_time must be DD:HH:MM:SS, got {limit}") from error


def summarise(
    cfg: Run,
    trainer: pl.Trainer,
    model: pl.LightningModule,
    train: ImageData | ImageFiles,
    test: ImageData | ImageFiles | None,
    folder: Path,
    trained: float,
) -> None:
    """Evaluate a trained model and leave evaluation.csv, curves.png and summary.json.

    The last is the sign that a run is finished.
    """
    images = batches_trained(trainer) * cfg.optimizer.batch_size * trainer.world_size
    patches = images * views_per_image(cfg)
    per_image = training_flops(cfg)
    flops = None if per_image is None else images * per_image
    began = time.perf_counter()
    rows = []
    if cfg.evaluation.enabled and test is not None:
        device, out = trainer.strategy.root_device, folder / "evaluation.csv"
        rows = evaluate_run(cfg, cfg.evaluation, model, train, test, device, out, flops=flops)
    elif cfg.evaluation.enabled:
        print(
            "these images have no labels: no probes; "
            "evaluate the checkpoint on a dataset that has them with `emp probe`"
        )
    evaluated = time.perf_counter() - began
    gauge = next(watch for watch in callbacks_of(trainer) if isinstance(watch, CollapseGauge))
    summary = {
        "method": cfg.method,
        "name": cfg.name,
        "dataset": cfg.data.dataset,
        "holdout": cfg.data.holdout,
        "seed": cfg.seed,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "images": images,
        "patches": patches,
        "flops": flops,
        "collapsed": gauge.collapsed_at is not None,
        "compiled": any(isinstance(c, Compiled) and c.compiled for c in callbacks_of(trainer)),
        "identity": identity(cfg),
        "batch_norm_group": batch_norm_group(cfg),
        "train_seconds": round(trained, 1),
        "evaluation_seconds": round(evaluated, 1),
        "patches_per_second": round(patches / trained, 1),
        "command": " ".join(sys.argv),
        "versions": versions(),
        "evaluation": rows,
    }
    if rows:
        length = f"{trainer.current_epoch} epochs, {trainer.global_step} steps"
        print_table(rows, f"{cfg.name}: {length}, {trained / 60:.1f} minutes of training")
    if (folder / "metrics.csv").exists():  # a run shorter than log_every_n_steps has none
        pictures.draw_curves(pd.read_csv(folder / "metrics.csv"), folder / "curves.png")
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def device_views(cfg: Run) -> list[BatchMultiPatch]:
    """The run's augmentations, made where the model is."""
    return [BatchMultiPatch.from_augmentation(augmentation) for augmentation in augmentations(cfg)]


def views_per_image(cfg: Run) -> int:
    """Patches (views) of an image in a step."""
    return sum(augmentation.num_patches for augmentation in augmentations(cfg))


def batch_norm_group(cfg: Run) -> int:
    """Patches that pass the backbone together in a process and share BatchNorm's statistics.

    They are EMP's n x b, or those of a chunk, and one view's batch of other methods.
    """
    if cfg.method != "emp":
        return cfg.optimizer.batch_size
    patches = views_per_image(cfg)
    return cfg.optimizer.batch_size * min(patches, cfg.method_kwargs.get("patch_chunk") or patches)


def newest_readable(folder: Path, cfg: Run) -> Path | None:
    """The newest checkpoint of an unfinished run that can be read, None if none was written.

    Broken ones are named on standard output.

    Raises:
        UserError: if all of them are broken.
    """
    checkpoints = checkpoints_in(folder)
    for path in checkpoints:
        try:
            load_method(path, like=cfg)
            return path
        except UserError as error:
            print(f"skipped: {error}")
    if checkpoints:
        raise UserError(
            f"no checkpoint of {folder} can be read; "
            "remove that folder, or start anew with auto_resume.enabled=False"
        )
    return None


def checkpoint_bytes(cfg: Run, model: pl.LightningModule, steps_per_epoch: int) -> int:
    """Bytes that the checkpoints of a run take at least.

    A file holds the weights and one moment of the optimiser. There are ``last.ckpt``,
    ``previous.ckpt``, the one being written, and those that are kept.
    """
    if not cfg.checkpoint.enabled:
        return 0
    tensors = [value for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    kept = cfg.max_epochs // cfg.checkpoint.frequency if cfg.checkpoint.keep_prev else 1
    if cfg.checkpoint.keep_every_n_steps:
        limit = cfg.limit_train_batches or 1.0
        share = limit * steps_per_epoch if isinstance(limit, float) else limit
        steps = min(int(share), steps_per_epoch)
        kept += cfg.max_epochs * steps // cfg.checkpoint.keep_every_n_steps
    return 2 * weights * (3 + kept)


def build_trainer(cfg: Run, folder: Path) -> pl.Trainer:
    """Lightning's Trainer as configured, without loggers and checkpoints.

    With GPUs BatchNorm takes its statistics over all of them, as if the batch were on one; torch
    cannot do that without GPUs.

    Raises:
        UserError: for what this machine cannot do.
    """
    # images are in memory, and StepSampler continues from the trainer's count
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    callbacks: list[pl.Callback] = []
    if cfg.trainer.get("enable_progress_bar", True):
        callbacks.append(Progress(cfg.optimizer.batch_size * views_per_image(cfg)))
    arguments = trainer_arguments(cfg)
    if cfg.checkpoint.enabled:  # which then watches the time itself: a run can go on from there
        arguments.pop("max_time", None)
    defaults = {"num_sanity_val_steps": 0, "sync_batchnorm": uses_gpu(cfg)}
    try:
        trainer = pl.Trainer(
            max_epochs=cfg.max_epochs,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            **(defaults | arguments),
        )
    # RuntimeError: SLURM's tasks are not as many as the devices, for instance
    except (
        pl.utilities.exceptions.MisconfigurationException,
        RuntimeError,
        ValueError,
        TypeError,
    ) as error:
        raise UserError(f"Trainer: {error}") from error
    if trainer.world_size > 1 and cfg.performance.compile != "off":
        raise UserError(
            "performance.compile is for one device: with several, leave it off "
            "(what their BatchNorm exchanges has not been tried with it)"
        )
    return trainer


def build_loggers(cfg: Run, folder: Path, resumed_step: int) -> list[pl.loggers.Logger]:
    """metrics.csv always, TensorBoard and W&B by setting.

    A continued run keeps the rows of metrics.csv before ``resumed_step``.

    Raises:
        UserError: for a logger that is not installed.
    """
    try:
        return [
            MetricsCSV(folder / "metrics.csv", resumed_step),
            *_optional_loggers(cfg, folder, resumed_step),
        ]
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; install it, or switch that logger off") from error


def _optional_loggers(cfg: Run, folder: Path, resumed_step: int) -> list[pl.loggers.Logger]:
    loggers: list[pl.loggers.Logger] = []
    if cfg.tensorboard.enabled:
        loggers.append(
            pl.loggers.TensorBoardLogger(
                folder, name="tensorboard", version="", purge_step=resumed_step or None
            )
        )
    if cfg.wandb.enabled:
        loggers.append(
            pl.loggers.WandbLogger(
                name=cfg.name,
                id=folder.name,  # so that a continued run is the same one there
                resume="allow",
                project=cfg.wandb.project,
                entity=cfg.wandb.entity,
                offline=cfg.wandb.offline,
                save_dir=folder,
                config=to_dict(cfg),
            )
        )
    return loggers


def draw_first_patches(cfg: Run, train: ImageData | ImageFiles, folder: Path) -> None:
    """Draw patches.png: the first training image under the run's augmentations."""
    views, first = device_views(cfg), torch.tensor([0])
    image = train.fetch(first)
    made = make_views(views, image, Step(0, 0, 0, first), cfg.seed, 1)
    patches = torch.cat([view[:, 0] for view in made])
    pictures.draw_patches(image[0], patches, views[0].augmentation, folder / "patches.png")
