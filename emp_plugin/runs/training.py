"""One pretraining run, from configuration to summary."""
import json
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from emp_plugin.configuration import recipes, trainer_arguments
from emp_plugin.data import ImageData, ImageFiles, PretrainData, make_views
from emp_plugin.data.pretrain import Step
from emp_plugin.errors import UserError
from emp_plugin.runs import pictures
from emp_plugin.runs.callbacks import AtomicCheckpointIO, Checkpoints, Progress, StopOnBrokenLoss
from emp_plugin.runs.folder import LAST, SUMMARY, new_folder, unfinished_folder, versions, write_text
from emp_plugin.runs.probing import evaluate_run, fresh_method, load_data, load_method, print_table
from emp_plugin.solo_learn import pl
from emp_plugin.transforms import BatchMultiPatch


def pretrain(cfg: DictConfig) -> Path:
    """Train, evaluate and describe one run; returns its folder.

    Raises:
        UserError: for data, settings or hardware that cannot work, and for a loss that is not finite.
    """
    train, test = load_data(cfg.data)
    views = [BatchMultiPatch.from_recipe(recipe) for recipe in recipes(cfg)]
    data = PretrainData(train, test, views, cfg.optimizer.batch_size, cfg.seed, cfg.data.num_workers, stacked=cfg.method == "emp")
    if len(train) < cfg.optimizer.batch_size:
        raise UserError(f"{len(train)} training images are fewer than optimizer.batch_size={cfg.optimizer.batch_size}")
    model = fresh_method(cfg)
    folder = unfinished_folder(cfg) if cfg.auto_resume.enabled and not cfg.resume_from_checkpoint else None
    checkpoint = folder / LAST if folder else cfg.resume_from_checkpoint
    resumed_step = load_method(checkpoint, like=cfg)[2]["global_step"] if checkpoint else 0
    trainer = build_trainer(cfg, views)
    if trainer.world_size > 1:
        raise UserError(f"{trainer.world_size} processes are not supported yet; set devices=1")
    folder = folder or new_folder(cfg)
    print(f"run folder: {folder}" + (f", continued from {checkpoint}" if checkpoint else ""))

    timer = pl.callbacks.Timer()
    trainer.callbacks += [timer, StopOnBrokenLoss()]
    if cfg.checkpoint.enabled:
        trainer.callbacks.append(Checkpoints(folder, cfg.checkpoint.every_n_steps, cfg.checkpoint.frequency, cfg.checkpoint.keep_prev,
                                             OmegaConf.to_container(cfg)))
    trainer.loggers = build_loggers(cfg, folder, resumed_step)
    draw_first_patches(cfg, train, views, folder)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to Ctrl-C
        kept = (f"the same command continues from {folder / LAST}" if cfg.auto_resume.enabled else f"continue with resume_from_checkpoint={folder / LAST}")
        raise UserError(f"interrupted; {kept}" if (folder / LAST).exists() else "interrupted before the first checkpoint") from stop
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: set method_kwargs.patch_chunk (patches per image at a time), or fewer patches. {error}") from error

    trained = timer.time_elapsed("train")
    began = time.perf_counter()
    device = trainer.strategy.root_device
    if cfg.evaluation.enabled and test is None:
        print("these images have no labels: no probes; evaluate the checkpoint on a dataset that has them with scripts/linear")
    rows = evaluate_run(cfg, cfg.evaluation, model, train, test, device, folder / "evaluation.csv") if cfg.evaluation.enabled and test is not None else []
    images = trainer.global_step * cfg.accumulate_grad_batches * cfg.optimizer.batch_size * trainer.world_size
    patches = images * sum(recipe.num_patches for recipe in recipes(cfg))
    summary = {
        "method": cfg.method, "name": cfg.name, "dataset": cfg.data.dataset, "holdout": cfg.data.holdout, "seed": cfg.seed,
        "epochs": trainer.current_epoch, "steps": trainer.global_step, "images": images, "patches": patches,
        "train_seconds": round(trained, 1), "evaluation_seconds": round(time.perf_counter() - began, 1),
        "patches_per_second": round(patches / trained, 1), "command": " ".join(sys.argv), "versions": versions(), "evaluation": rows,
    }
    if rows:
        print_table(rows, f"{cfg.name}: {trainer.current_epoch} epochs, {trainer.global_step} steps, {trained / 60:.1f} minutes of training")
    if (folder / "metrics.csv").exists():  # a run shorter than log_every_n_steps has none
        pictures.draw_curves(pd.read_csv(folder / "metrics.csv"), folder / "curves.png")
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    print(f"results: {folder}")
    return folder


def build_trainer(cfg: DictConfig, views: list[BatchMultiPatch]) -> pl.Trainer:
    """Lightning's Trainer as configured, without loggers and checkpoints. Raises UserError for what this machine cannot do."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # images are in memory
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # StepSampler continues from the trainer's count
    progress = [Progress(cfg.optimizer.batch_size * sum(view.recipe.num_patches for view in views))] if cfg.get("enable_progress_bar", True) else []
    arguments = {"num_sanity_val_steps": 0} | trainer_arguments(cfg)
    try:
        return pl.Trainer(max_epochs=cfg.max_epochs, callbacks=progress, plugins=[AtomicCheckpointIO()], logger=False,
                          enable_checkpointing=False, use_distributed_sampler=False, **arguments)
    except (pl.utilities.exceptions.MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"Trainer: {error}") from error


def build_loggers(cfg: DictConfig, folder: Path, resumed_step: int) -> list[pl.loggers.Logger]:
    """metrics.csv always (a continued run keeps the rows before ``resumed_step``), TensorBoard and W&B by setting."""
    earlier = folder / "metrics.csv"
    rows = pd.read_csv(earlier).query("step < @resumed_step").to_dict("records") if earlier.exists() else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the folder exists, and its metrics.csv is kept by what follows
        csv = pl.loggers.CSVLogger(folder.parent, name="", version=folder.name, flush_logs_every_n_steps=10)
        csv.experiment.metrics += [{key: value for key, value in row.items() if pd.notna(value)} for row in rows]
    csv.save()
    loggers = [csv]
    try:
        return loggers + _optional_loggers(cfg, folder)
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; install it, or switch that logger off") from error


def _optional_loggers(cfg: DictConfig, folder: Path) -> list[pl.loggers.Logger]:
    loggers = []
    if cfg.tensorboard.enabled:
        loggers.append(pl.loggers.TensorBoardLogger(folder, name="tensorboard", version=""))
    if cfg.wandb.enabled:
        loggers.append(pl.loggers.WandbLogger(name=cfg.name, project=cfg.wandb.project, entity=cfg.wandb.entity, offline=cfg.wandb.offline,
                                              save_dir=folder, config=OmegaConf.to_container(cfg)))
    return loggers


def draw_first_patches(cfg: DictConfig, train: ImageData | ImageFiles, views: list[BatchMultiPatch], folder: Path) -> None:
    """patches.png: the first image of the training set, cut and augmented by the run's recipes."""
    image = train.fetch(torch.tensor([0]))
    made = make_views(views, image, Step(0, 0, 0, torch.tensor([0])), cfg.seed, 1)
    patches = torch.cat([view[:, 0] for view in made])
    pictures.draw_patches(image[0], patches, views[0].recipe, folder / "patches.png")
