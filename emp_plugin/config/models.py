"""The settings of a run and of a probe: every name, its type and its default.

The schema is solo-learn 1.0.6's. ``evaluation`` and ``tensorboard`` are ours. In YAML, any argument
of Lightning's Trainer may stand beside it. Nothing is changed once it is read:
``dataclasses.replace`` makes what differs.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from emp_plugin.evaluation import Evaluation


@dataclass(frozen=True)
class Backbone:
    name: str = "resnet18"
    kwargs: dict[str, Any] = field(default_factory=dict)
    # of the 3x3 stem for small images: solo-learn's is 2, the EMP-SSL authors' 1
    stem_padding: int | None = None


@dataclass(frozen=True)
class Momentum:
    base_tau: float = 0.99
    final_tau: float = 1.0
    classifier: bool = False


@dataclass(frozen=True)
class Data:
    dataset: str = MISSING
    train_path: str | None = "./datasets"
    # custom: class folders to evaluate on; the other datasets find theirs in train_path
    val_path: str | None = None
    # custom: take all images below train_path; its folders are no classes
    no_labels: bool = False
    # grey images of more than 8 bits: the values that become black and white, (low, high)
    window: list[float] | None = None
    # digits, imagenet100, custom: side in pixels that images are resized to; None: 32, 224, 224
    image_size: int | None = None
    format: str = "image_folder"
    num_workers: int = 0
    # device: made where the model is; image: by solo-learn, of PIL images in the workers
    views: str = "device"
    fraction: float = -1
    # what the EMP recipes' augmentation refers to, as far as ratio
    num_patches: int = 20  # per image
    patch_size: int | None = 16  # side in the image's pixels; null: see scale
    output_size: int = 32  # side that patches, and the baselines' views, are resized to
    interpolation: str = "bilinear"
    # with patch_size=null: share of the image's area that a patch takes, (low, high)
    scale: list[float] | None = None
    ratio: list[float] | None = None  # width / height of a patch, (low, high); null: square
    holdout: float = 0.0  # evaluate on this part of the training set instead of the test set
    # mean and std by dataset, for the augmentations that refer to them
    normalisation: dict[str, Any] = field(default_factory=dict)
    # counted when it is read; views of the first one's size are large crops
    num_classes: int = 0
    num_large_crops: int = 0
    num_small_crops: int = 0


@dataclass(frozen=True)
class Optimizer:
    name: str = MISSING
    batch_size: int = MISSING
    lr: float = MISSING
    classifier_lr: float = 0.1
    weight_decay: float = 0.0
    exclude_bias_n_norm_wd: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scheduler:
    name: str = "warmup_cosine"
    min_lr: float = 0.0
    warmup_start_lr: float = 3e-5
    warmup_epochs: float = 10
    lr_decay_steps: list[int] | None = None
    interval: str = "step"


@dataclass(frozen=True)
class Checkpoint:
    enabled: bool = True
    dir: str = "outputs"
    frequency: int = 1  # epochs between two kept checkpoints
    keep_prev: bool = False
    every_n_steps: int = 100  # last.ckpt is written this often
    # least time between two of these writes, except at an epoch's end
    min_seconds: float = 60
    keep_every_n_steps: int | None = None  # step=N.ckpt is kept this often


@dataclass(frozen=True)
class AutoResume:
    enabled: bool = False
    max_hours: float = 36  # runs older than this are not continued


@dataclass(frozen=True)
class KnnEval:
    enabled: bool = False
    k: int = 20
    distance_func: str = "euclidean"


@dataclass(frozen=True)
class Wandb:
    enabled: bool = False
    project: str | None = "solo-learn"
    entity: str | None = None
    offline: bool = False


@dataclass(frozen=True)
class TensorBoard:
    enabled: bool = False


@dataclass(frozen=True)
class Performance:
    disable_channel_last: bool = False
    # torch.compile of backbone and head in training: off, default or reduce-overhead
    compile: str = "off"


@dataclass(frozen=True)
class Run:
    name: str = MISSING
    method: str = MISSING
    seed: int = 5
    backbone: Backbone = field(default_factory=Backbone)
    method_kwargs: dict[str, Any] = field(default_factory=dict)
    momentum: Momentum = field(default_factory=Momentum)
    data: Data = field(default_factory=Data)
    augmentations: list[Any] = MISSING
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    auto_resume: AutoResume = field(default_factory=AutoResume)
    resume_from_checkpoint: str | None = None
    knn_eval: KnnEval = field(default_factory=KnnEval)
    wandb: Wandb = field(default_factory=Wandb)
    tensorboard: TensorBoard = field(default_factory=TensorBoard)
    performance: Performance = field(default_factory=Performance)
    evaluation: Evaluation = field(default_factory=Evaluation)
    max_epochs: int = MISSING
    # the arguments of Lightning's Trainer that are read here too; None: not given
    accelerator: str | None = None
    devices: Any = None  # a number, a list of GPUs, or "auto"
    num_nodes: int | None = None
    precision: str | None = None  # not given, it becomes what the machine is fast in
    accumulate_grad_batches: int = 1
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    # all others that are given; in YAML they stand beside the rest
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeData:
    """Like ``data`` of a run; what is left at None is the checkpoint's."""

    dataset: str | None = None
    train_path: str | None = None
    val_path: str | None = None
    no_labels: bool | None = None
    window: list[float] | None = None
    image_size: int | None = None
    holdout: float | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class Probe:
    """Configuration of ``emp probe``."""

    pretrained_feature_extractor: str = MISSING
    data: ProbeData = field(default_factory=ProbeData)
    evaluation: Evaluation = field(default_factory=Evaluation)
    accelerator: str = "auto"
    precision: str | None = None
