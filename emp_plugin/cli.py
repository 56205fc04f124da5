"""The command ``emp``. Each subcommand imports what it needs when it runs: help comes at once."""

import argparse
import errno
import inspect
import os
import signal
import sys
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

from emp_plugin.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
EXAMPLES = """examples:
  emp pretrain digits/emp                     the main job in miniature: minutes, no download
  emp pretrain cifar/emp max_epochs=10        any setting of a recipe: key=value
  emp probe outputs/emp/RUN/last.ckpt         evaluate a checkpoint again
  emp compare cifar10 "methods=[emp,byol]"    methods side by side
  emp config cifar/byol                       all settings of a recipe, and their origins

emp COMMAND --help says more.
"""


def pretrain(args: Namespace, items: list[str]) -> None:
    """Train a method and evaluate it.

    RECIPE is a name of `emp list`, such as cifar/emp, or the path of a YAML file.

    emp pretrain cifar/emp data.dataset=cifar100 data.num_patches=200 method_kwargs.patch_chunk=20
    emp pretrain cifar/byol max_epochs=10 optimizer.lr=0.5
    emp pretrain --config-path my/recipes --config-name vicreg wandb.enabled=False
    """
    from emp_plugin.config import read_config
    from emp_plugin.training.run import pretrain

    pretrain(read_config(*_recipe(args, items)))


def probe(args: Namespace, items: list[str]) -> None:
    """Evaluate checkpoints of any method again; rows are left beside them.

    Dataset, views and probes are the checkpoint's and the standard ones, unless told otherwise.

    emp probe outputs/emp/RUN/last.ckpt
    emp probe outputs/emp/RUN/last.ckpt data.dataset=cifar100 "evaluation.probes=[knn,knn10]"
    emp probe outputs/emp/RUN/last.ckpt evaluation.protocol=published
    """
    from emp_plugin.config import Probe, read_config, recipes_root
    from emp_plugin.training.probing import probe_checkpoint

    folder = args.config_path or recipes_root()
    checkpoints, overrides = _checkpoints(items)
    each = [[f"pretrained_feature_extractor={path}"] for path in checkpoints] or [[]]
    for given in each:
        probe_checkpoint(read_config(folder, args.config_name, [*given, *overrides], Probe))


def compare(args: Namespace, items: list[str]) -> None:
    """Train and evaluate methods side by side; skips what is done.

    STUDY is a name of `emp list`, such as cifar10, or the path of a YAML file. Keys of a study are
    methods, seeds, epochs, minutes, budget, schedule, evaluate_every, thresholds, at_once, ablate,
    values, results_dir and report_only. All others are of the recipes, of one method's if they
    begin with its name.

    emp compare cifar10 "methods=[emp,byol]" "epochs=[1,10]" "seeds=[0,1,2]"
    emp compare digits budget=minutes "minutes=[5]" byol.optimizer.lr=0.1
    emp compare cifar10 report_only=True
    """
    from emp_plugin.config import recipes_root
    from emp_plugin.studies.run import compare
    from emp_plugin.studies.settings import read_comparison

    recipes = recipes_root()
    study, items = _named(args, items, "emp compare cifar10")
    if args.config_path:
        folder = Path(args.config_path).expanduser().resolve()
        study = str(folder / f"{study.removesuffix('.yaml')}.yaml")
        beside = folder.parent / "pretrain"
        recipes = beside if beside.is_dir() else recipes
    settings, overrides = read_comparison(study, items)
    compare(settings, recipes, overrides)


def study(args: Namespace, items: list[str]) -> None:
    """Make what a study lacks: DIR/study.yaml says what to compare, and DIR takes the results.

    Keys are those of `emp compare`.

    emp study results/my-question
    """
    from emp_plugin.config import recipes_root
    from emp_plugin.studies.run import compare
    from emp_plugin.studies.settings import read_comparison

    folder, items = _named(args, items, "emp study results/my-question")
    settings, overrides = read_comparison(f"{folder}/study.yaml", [f"results_dir={folder}", *items])
    compare(settings, recipes_root(), overrides)


def ablate(args: Namespace, items: list[str]) -> None:
    """Let one setting of EMP-SSL take several values, and change nothing else.

    On a fifth of CIFAR-10, one epoch each; keys are those of `emp compare`.

    emp ablate data.num_patches 2 5 10 20 "budget=[epochs,minutes]"
    emp ablate method_kwargs.invariance_weight 50 100 200 400
    """
    from emp_plugin.config import recipes_root
    from emp_plugin.studies.run import compare
    from emp_plugin.studies.settings import read_comparison

    words = [item for item in items if "=" not in item]
    overrides = [item for item in items if "=" in item]
    if words:
        overrides = [f"ablate={words[0]}", f"values=[{','.join(words[1:])}]", *overrides]
    settings, overrides = read_comparison("ablation", overrides)
    if not settings.ablate:
        raise UserError("name a setting and its values: emp ablate data.num_patches 2 5 10 20")
    compare(settings, recipes_root(), overrides)


def transfer(args: Namespace, items: list[str]) -> None:
    """Probe checkpoints on CIFAR-10 and on CIFAR-100.

    Keys are those of `emp probe`; results_dir=DIR is where the table goes (outputs/transfer-cifar).

    emp transfer outputs/emp/RUN/last.ckpt outputs/byol/RUN/last.ckpt
    emp transfer outputs/emp/RUN/last.ckpt 'data.train_path=DIR/${data.dataset}'
    """
    from emp_plugin.studies.transfer import transfer

    checkpoints, settings = _checkpoints(items)
    results, overrides = "outputs/transfer-cifar", []
    for item in settings:
        key, _, value = item.partition("=")
        if key == "results_dir":
            results = value
        else:
            overrides.append(item)
    transfer(list(dict.fromkeys(checkpoints)), Path(results).expanduser(), overrides)


def tsne(args: Namespace, items: list[str]) -> None:
    """Draw test images as t-SNE places them, under several checkpoints.

    emp tsne outputs/emp/RUN/last.ckpt outputs/simclr/RUN/last.ckpt --features projection
    """
    from emp_plugin.studies.tsne import write_tsne

    if not items:
        raise UserError("name the checkpoints, of runs on one dataset: emp tsne RUN/last.ckpt ...")
    out = args.out.expanduser()
    paths = [Path(item) for item in items]
    write_tsne(paths, args.features, args.images, args.classes, args.train_path, out)
    print(f"results: {out}.png, {out}.csv")


def export(args: Namespace, items: list[str]) -> None:
    """Write a checkpoint's backbone as safetensors: OUT, or backbone.safetensors beside it.

    emp export outputs/emp/RUN/last.ckpt
    """
    from emp_plugin.export import export_backbone

    if len(items) not in (1, 2):
        raise UserError("give a checkpoint, and perhaps a file to write: emp export RUN/last.ckpt")
    checkpoint = Path(items[0])
    out = Path(items[1]) if items[1:] else checkpoint.with_name("backbone.safetensors")
    print(f"results: {export_backbone(checkpoint, out)}")


def config(args: Namespace, items: list[str]) -> None:
    """Print all settings of a recipe as YAML, each with its origin.

    It is a file of the recipe, the command line, or the default of emp_plugin/config/models.py.

    emp config cifar/byol max_epochs=10
    """
    from emp_plugin.config import annotated, read_config, to_dict

    recipe = _recipe(args, items)
    print(annotated(to_dict(read_config(*recipe)), *recipe))


def show(args: Namespace, items: list[str]) -> None:
    """Name the recipes, studies, methods and datasets."""
    from emp_plugin.config import recipe_names, recipes_root
    from emp_plugin.data.datasets import NUM_CLASSES
    from emp_plugin.solo_learn import METHODS
    from emp_plugin.studies.settings import study_names

    by_dataset: dict[str, list[str]] = {}
    for name in recipe_names(recipes_root()):
        by_dataset.setdefault(name.partition("/")[0], []).append(name)
    print(f"recipes, in {recipes_root()}:")
    for names in by_dataset.values():
        print(f"  {' '.join(names)}")
    print(f"studies: {' '.join(study_names())}")
    print(f"methods: {' '.join(sorted(METHODS.keys() - {'base', 'linear'}))}")
    print(f"datasets: {' '.join(NUM_CLASSES)}")


def check_data(args: Namespace, items: list[str]) -> None:
    """Read every image below a folder, and name those that cannot be used.

    emp check-data photos
    emp check-data scans "data.window=[0,4095]"
    """
    import yaml

    from emp_plugin.data.datasets import IMAGE_SIZE
    from emp_plugin.data.files import list_flat

    folders = [item for item in items if not item.startswith("data.window=")]
    given = [yaml.safe_load(item.partition("=")[2]) for item in items if item not in folders]
    if len(folders) != 1:
        raise UserError("give the folder of the images: emp check-data photos")
    folder = Path(folders[0]).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if any(not isinstance(window, list) or len(window) != 2 for window in given):
        raise UserError("data.window is two numbers, such as data.window=[0,4095]")
    window = (given[-1][0], given[-1][1]) if given else None
    files = list_flat(folder, IMAGE_SIZE["custom"], window)
    faults = 0
    for fault in files.faults():
        print(fault)
        faults += 1
    if faults:
        raise UserError(f"{faults} of {len(files)} images cannot be used or are nearly empty")
    print(f"{len(files)} images, all readable")


def solo(args: Namespace, items: list[str]) -> None:
    """Run a program of solo-learn's own, with EMP and with what lets it run on today's libraries.

    emp solo CHECKOUT/main_linear.py --config-path ... --config-name ...
    """
    import runpy

    import emp_plugin.config  # noqa: F401  EMP, solo-learn's repairs, what our YAML refers to

    program = args.program[0] if args.program else "nothing"
    if not Path(program).is_file():
        raise UserError(
            f"{program} is no program; "
            "give the path of solo-learn's main_pretrain.py, main_linear.py, ..."
        )
    sys.argv = args.program
    runpy.run_path(program, run_name="__main__")


Options = dict[str, dict[str, Any]]  # and what argparse is told of each
OWN_RECIPES: Options = {
    "--config-path": {"metavar": "DIR", "help": "a folder of recipes of your own"},
    "--config-name": {"metavar": "NAME", "help": "a YAML file in it, such as cifar/emp"},
}
TSNE: Options = {
    "--features": {
        "choices": ("backbone", "embedding", "projection"),
        "default": "backbone",
        "help": "of whole images; default: backbone",
    },
    "--images": {"type": int, "default": 2000, "help": "as many of each class; default: 2000"},
    "--classes": {"type": int, "default": 10, "help": "the first so many; default: 10"},
    "--train-path": {"help": "folder of the dataset; default: the checkpoint's"},
    "--out": {
        "type": Path,
        "default": Path("outputs/tsne"),
        "help": "path without ending of the .png and the .csv; default: outputs/tsne",
    },
}
COMMANDS: dict[str, tuple[Any, str, Options]] = {
    "pretrain": (pretrain, "RECIPE [key=value ...]", OWN_RECIPES),
    "probe": (probe, "CHECKPOINT ... [key=value ...]", OWN_RECIPES),
    "compare": (compare, "STUDY [key=value ...]", OWN_RECIPES),
    "study": (study, "DIR [key=value ...]", {}),
    "ablate": (ablate, "SETTING VALUE ... [key=value ...]", {}),
    "transfer": (transfer, "CHECKPOINT ... [key=value ...]", {}),
    "tsne": (tsne, "CHECKPOINT ... [option ...]", TSNE),
    "export": (export, "CHECKPOINT [OUT]", {}),
    "config": (config, "RECIPE [key=value ...]", OWN_RECIPES),
    "check-data": (check_data, "DIR [data.window=[LOW,HIGH]]", {}),
    "list": (show, "", {}),
    "solo": (solo, "PROGRAM [argument ...]", {"program": {"nargs": argparse.REMAINDER}}),
}


def _named(args: Namespace, items: list[str], example: str) -> tuple[str, list[str]]:
    """The recipe or study that a command line names, and what else is on it."""
    if name := getattr(args, "config_name", None):
        return name, items
    if items and "=" not in items[0]:
        return items[0], items[1:]
    raise UserError(f"say which, as in `{example}`; `emp list` shows what there is")


def _recipe(args: Namespace, items: list[str]) -> tuple[Path, str, list[str]]:
    """Folder and name of the recipe that a command line names, and the overrides."""
    from emp_plugin.config import recipes_root

    name, overrides = _named(args, items, "emp pretrain cifar/emp")
    folder = Path(args.config_path) if args.config_path else recipes_root()
    if name.endswith(".yaml") and not args.config_path:
        folder, name = Path(name).parent, Path(name).stem
    return folder.expanduser().resolve(), name, overrides


def _checkpoints(items: list[str]) -> tuple[list[str], list[str]]:
    """Paths of checkpoints, which may hold an equals sign (epoch=1.ckpt), and settings."""

    def is_path(item: str) -> bool:
        key, equals, _ = item.partition("=")
        ends = item.endswith(".ckpt") and key != "pretrained_feature_extractor"
        return not equals or ends

    return [item for item in items if is_path(item)], [item for item in items if not is_path(item)]


def _parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """The options of a command line, and what else stands on it."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="emp",
        description="EMP-SSL and its peers: train, evaluate, compare.",
        epilog=EXAMPLES,
        formatter_class=layout,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, usage, options) in COMMANDS.items():
        description = inspect.cleandoc(run.__doc__).replace("\nemp ", "\n  emp ")  # examples
        command = commands.add_parser(
            name,
            usage=f"emp {name} {usage}",
            help=description.splitlines()[0],
            description=description,
            formatter_class=layout,
            allow_abbrev=False,
        )
        for option, keywords in options.items():
            command.add_argument(option, **keywords)
        command.set_defaults(run=run, parser=command)
    args, items = parser.parse_known_args(argv)
    unknown = [item for item in items if item.startswith("-")]
    if unknown:
        args.parser.error(f"unknown option {unknown[0]}; settings are written key=value")
    if getattr(args, "config_path", None) and not args.config_name:
        args.parser.error("--config-path goes with --config-name")
    return args, items


def main(argv: list[str] | None = None) -> int:
    """Run a command line. What is no bug is answered with one line on stderr and exit status 1.

    That is a :class:`UserError`, a full disk, Ctrl-C or SIGTERM. ``--debug`` shows the traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv and argv[0] != "solo"  # whose program may have one of its own
    args, items = _parse([item for item in argv if not debug or item != "--debug"])
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if in_main_thread else None
    try:
        args.run(args, items)
    except BrokenPipeError:  # of `emp list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError, KeyboardInterrupt) as error:
        if debug or (isinstance(error, OSError) and error.errno not in NO_ROOM):
            raise
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        return 1
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
