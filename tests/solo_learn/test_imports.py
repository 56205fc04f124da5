"""Who imports this project alone gets EMP and a solo-learn that runs, and nothing else changes."""

import pytest

from emp_plugin.solo_learn import API, VERSION
from support import run_python

HIDE_SOLO = """
from importlib.machinery import PathFinder
original = PathFinder.find_spec
def find_spec(cls, name, *rest):
    return None if name == "solo" else original(name, *rest)
PathFinder.find_spec = classmethod(find_spec)
"""
# trains one of solo-learn's own methods for ten steps; weights of all that it has
TEN_STEPS = """
import hashlib, logging, sys, warnings
warnings.simplefilter("ignore")
from omegaconf import OmegaConf
import torch, lightning.pytorch as pl
from solo.methods import METHODS
torch.set_num_threads(1)
logging.disable(logging.WARNING)
own = {
    "simclr": {"temperature": 0.2},
    "byol": {"pred_hidden_dim": 8},
    "swav": {"num_prototypes": 6, "queue_size": 8, "epoch_queue_starts": 1, "temperature": 0.1},
}
for name, kwargs in own.items():
    cfg = OmegaConf.create({
        "method": name, "max_epochs": 2, "backbone": {"name": "resnet18"},
        "method_kwargs": {"proj_hidden_dim": 8, "proj_output_dim": 4, **kwargs},
        "momentum": {"base_tau": 0.9, "final_tau": 1.0},
        "data": {"dataset": "cifar10", "num_classes": 5, "num_large_crops": 2,
                 "num_small_crops": 0},
        "optimizer": {"name": "lars", "batch_size": 4, "lr": 0.4, "classifier_lr": 0.1,
                      "weight_decay": 1e-4, "kwargs": {"eta": 0.02}},
        "scheduler": {"name": "warmup_cosine", "warmup_epochs": 1, "interval": "step"},
    })
    torch.manual_seed(0)
    method = METHODS[name](cfg)
    data = [(i, [torch.randn(3, 8, 8) for _ in range(2)], i % 5) for i in range(20)]
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(method, torch.utils.data.DataLoader(data, 4))
    assert trainer.global_step == 10
    state = b"".join(value.numpy().tobytes() for value in method.state_dict().values())
    print(name, hashlib.sha256(state).hexdigest())
"""


def test_importing_this_package_imports_no_other():
    heavy = "{'torch', 'numpy', 'solo', 'lightning', 'pytorch_lightning', 'hydra', 'omegaconf'}"
    run_python(f"import sys, emp_plugin; assert not {heavy} & set(sys.modules)")


@pytest.fixture
def importable(tmp_path):
    """Folders that make solo-learn importable by itself: 1.0.2 needs an old pl_bolts."""
    if API == "1.0.6":
        return ()
    package = tmp_path / "pl_bolts" / "optimizers"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "lr_scheduler.py").write_text("class LinearWarmupCosineAnnealingLR: pass")
    (tmp_path / "distutils.py").write_text("class util: strtobool = int")
    return (tmp_path,)


@pytest.mark.parametrize(
    "order",
    [
        "import solo.methods, emp_plugin",
        "import emp_plugin, solo",
        "import emp_plugin; from solo.methods.base import BaseMethod; import solo",
        "import emp_plugin.solo_learn, solo",
        "import emp_plugin; emp_plugin.EMP; import solo",
    ],
)
def test_emp_is_a_method_whatever_is_imported_first(order, importable):
    path = importable if order.startswith("import solo") else ()
    code = f"""
{order}
import sys
from solo.methods import METHODS
from solo.utils.knn import WeightedKNNClassifier
assert METHODS["emp"] is emp_plugin.EMP
WeightedKNNClassifier()  # repaired
assert solo.losses and solo.args and solo.__loader__.get_source("solo")
assert not [name for name in sys.modules if name.startswith("pl_bolts")] or {bool(path)}
"""
    run_python(code, path=path)


def test_without_solo_learn_its_absence_is_named():
    code = """
import emp_plugin, emp_plugin.losses
for ask in ("from emp_plugin.solo_learn import METHODS", "emp_plugin.EMP", "import solo"):
    try:
        exec(ask)
    except ImportError as error:
        print(error)
"""
    *ours, theirs = run_python(HIDE_SOLO + code).stdout.splitlines()
    assert len(ours) == 2
    assert all("pip install --no-deps solo-learn==1.0.2" in line for line in ours)
    assert theirs == "No module named 'solo'"


def test_another_package_of_this_name_is_left_alone(tmp_path):
    (tmp_path / "solo").mkdir()
    (tmp_path / "solo" / "__init__.py").write_text("answer = 42")
    code = "import emp_plugin, solo; print(solo.answer)"
    done = run_python(code, path=(tmp_path,))
    assert done.stdout == "42\n"
    assert "left as it is, without EMP: emp_plugin does not know solo-learn" in done.stderr


@pytest.mark.skipif(API != "1.0.6", reason=f"solo-learn {VERSION} does not train by itself")
def test_solo_learns_own_methods_train_as_they_do_without_us():
    ours, theirs = (run_python(first + TEN_STEPS).stdout for first in ("import emp_plugin\n", ""))
    assert len(theirs.splitlines()) == 3
    assert ours == theirs
