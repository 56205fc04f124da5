"""What a GPU would notice, on a machine without one: see benchmarks/pretended_gpu.py."""

from types import SimpleNamespace

import pytest
import torch

from emp_plugin.errors import UserError
from emp_plugin.training.callbacks import StopOnBrokenLoss
from emp_plugin.training.probing import fresh_method
from emp_plugin.transforms import BatchMultiPatch
from pretended_gpu import WAITING, Pretended, PretendedGPU, pretending, to_the_gpu


@pytest.fixture
def gpu():
    with pretending(PretendedGPU()) as gpu:
        yield gpu


def test_the_pretended_gpu_notices(gpu):
    x = Pretended(torch.tensor([1.0, -1.0]))
    with gpu:
        assert x.sum() == 0
        assert gpu.waits == ["aten::_local_scalar_dense"]
        gpu.waits.clear()
        assert x[x > 0].device.type == "cuda"
        assert gpu.waits == ["aten::index"]
        gpu.waits.clear()
        assert torch.zeros(2).to("cuda:0").device.type == "cuda"
        assert x.to("cpu").device.type == "cpu"
        assert gpu.waits == ["copy to cuda", "copy to cpu"]
        with pytest.raises(AssertionError, match="two devices"):
            x + torch.zeros(2)


@pytest.mark.parametrize(
    "settings",
    [
        {"output_size": 32},
        {"output_size": 16},
        {"patch_size": 30, "output_size": 70},
        {
            "patch_size": None,
            "output_size": 24,
            "scale": (0.2, 1.0),
            "ratio": (0.7, 1.4),
            "interpolation": "bicubic",
        },
    ],
)
def test_patches_are_made_without_waiting(gpu, settings):
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    view = BatchMultiPatch(num_patches=4, blur_prob=0.5, **settings)
    expected = view(images, torch.Generator().manual_seed(0))
    with gpu:
        made = view(Pretended(images.clone()), torch.Generator().manual_seed(0))
    assert not gpu.waits
    # colours are mixed in other calls than on a CPU
    torch.testing.assert_close(made.inner, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", ["null", "2"])
def test_a_step_does_not_wait(gpu, config, chunk):
    """Forward, loss, logged values and backward.

    Nor do torch's operators ask for a value inside, such as an error code: a profile of the CPU
    would show it.
    """
    cfg = config(
        "digits/emp",
        f"method_kwargs.patch_chunk={chunk}",
        "method_kwargs.embedding_dim=16",
        "method_kwargs.proj_hidden_dim=16",
        "method_kwargs.proj_output_dim=8",
    )
    batch = torch.arange(6), torch.randn(4, 6, 3, 16, 16), torch.tensor([1, 2, -1, 3, 4, 0])
    model, there = fresh_method(cfg).train(), to_the_gpu(fresh_method(cfg).train())
    model.log_dict = there.log_dict = lambda *_, **__: None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = model.training_step(batch, 0)
        loss.backward()
    assert "aten::mm" in (inside := {event.name for event in profile.events()})
    assert not inside & set(WAITING)
    with gpu:
        made = there.training_step([Pretended(part.clone()) for part in batch], 0)
        made.backward()
    assert not gpu.waits
    assert torch.equal(made.detach().inner, loss.detach())
    for p, q in zip(there.parameters(), model.parameters()):
        assert torch.equal(p.grad.inner, q.grad)


def test_a_broken_loss_is_found_without_waiting(gpu):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.3}])
    trainer = SimpleNamespace(global_step=3, optimizers=[optimizer])
    watch = StopOnBrokenLoss()
    with gpu:
        for value in (1.0, float("nan")):
            outputs = {"loss": Pretended(torch.tensor(value))}
            watch.on_train_batch_start(trainer, None, None, 0)
            watch.on_train_batch_end(trainer, None, outputs, None, 0)
        assert not gpu.waits
        with pytest.raises(UserError, match="the loss is nan at step 3"):
            watch.on_train_epoch_end(trainer, None)
