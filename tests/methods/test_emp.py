"""EMP as a method: its step, its settings, and steps in chunks of patches."""

import copy
import importlib
import math

import pytest
import torch
import torch.nn.functional as F

import emp_plugin
from emp_plugin.errors import UserError
from emp_plugin.losses import emp_ssl_loss
from emp_plugin.methods import EMP, EMPSettings
from emp_plugin.solo_learn import METHODS, backbone_of
from emp_plugin.training.probing import fresh_method

CHUNKS_OF_2 = (
    "method_kwargs.patch_chunk=2",
    "method_kwargs.embedding_dim=32",
    "method_kwargs.proj_hidden_dim=32",
    "method_kwargs.proj_output_dim=16",
)


@pytest.fixture
def method(config):
    """Builds EMP for digits; what it logs is in ``model.logged``."""

    def build(*overrides):
        model = fresh_method(config("digits/emp", *overrides))
        logged = model.__dict__["logged"] = {}
        model.log_dict = lambda values, **_: logged.update({k: float(v) for k, v in values.items()})
        return model

    return build


def widths(module):
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    return [(layer.in_features, layer.out_features) for layer in layers]


def test_importing_registers_the_method_and_twice_is_harmless():
    assert METHODS["emp"] is EMP
    assert emp_plugin.EMP is EMP
    before = dict(METHODS)
    importlib.reload(emp_plugin)
    assert before == METHODS


def test_sizes_of_the_presets(method):
    code, paper = method(), method("method_kwargs.preset=paper")
    assert widths(code.embedder) == [(512, 4096)]
    assert widths(code.projector) == [(4096, 4096), (4096, 1024)]
    assert widths(paper.embedder) == []
    assert widths(paper.projector) == [(512, 4096), (4096, 512)]
    x = torch.randn(2, 3, 32, 32)
    of_code = {name: f.shape[1] for name, f in code.features(x).items()}
    of_paper = {name: f.shape[1] for name, f in paper.features(x).items()}
    assert of_code == {"backbone": 512, "embedding": 4096}
    assert of_paper == {"backbone": 512}


def test_the_head_has_the_names_of_older_checkpoints(method):
    dense = ["0.weight", "0.bias", *(f"1.{name}" for name in torch.nn.BatchNorm1d(1).state_dict())]
    names = {name for name in method().state_dict() if "embed" in name or "proj" in name}
    assert names == {
        *(f"{part}.{name}" for part in ("embedder", "projector") for name in dense),
        "projector.3.weight",
        "projector.3.bias",
    }


def test_a_step_is_the_objective_on_one_batch_of_all_patches(method):
    """It equals the loss on projections made by hand, with BatchNorm over all n x b patches."""
    model = method().train()
    patches = torch.randn(3, 4, 3, 16, 16)
    targets = torch.tensor([1, 2, 3, -1])
    state = copy.deepcopy(model.state_dict())
    loss = model.training_step([torch.arange(4), patches, targets], 0)

    model.load_state_dict(state)
    h = backbone_of(model)(patches.reshape(12, 3, 16, 16))
    z = F.normalize(model.projector(model.embedder(h)), dim=1).reshape(3, 4, -1)
    expected = emp_ssl_loss(z, 200.0, 0.2)
    logits = model.classifier(h.reshape(3, 4, -1).mean(0))
    class_loss = F.cross_entropy(logits[:3], targets[:3])
    torch.testing.assert_close(loss, expected.loss + class_loss)
    assert model.logged["train_coding_rate"] == pytest.approx(expected.coding_rate.item(), rel=1e-4)
    # of the three that have a label, in percent
    right = (logits[:3].argmax(1) == targets[:3]).sum().item()
    assert model.logged["train_acc1"] == pytest.approx(100 * right / 3)

    # solo-learn's list of views
    model.load_state_dict(state)
    of_list = model.training_step([torch.arange(4), list(patches), targets], 0)
    torch.testing.assert_close(of_list, loss)


@pytest.mark.parametrize(
    ("targets", "percent"),
    [
        ([3, 3, 3, 3], 100),
        ([3, 3, 3, 2], 75),
        ([3, -1, -1, 2], 50),
        ([-1, -1, -1, 3], 100),
        ([-1, 0, 0, 0], 0),
        ([-1, -1, -1, -1], None),
    ],
)
def test_accuracy_is_of_the_images_with_labels(method, targets, percent):
    """A classifier that always says 3. Without any label there is no accuracy, but a loss."""
    model = method()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()[3] = 1
    batch = [torch.arange(4), torch.randn(2, 4, 3, 16, 16), torch.tensor(targets)]
    loss = model.training_step(batch, 0)
    assert torch.isfinite(loss)
    if percent is None:
        assert math.isnan(model.logged["train_acc1"])
        assert model.logged["train_class_loss"] == 0
    else:
        assert model.logged["train_acc1"] == pytest.approx(percent)


def test_the_online_classifier_does_not_train_the_backbone(method):
    model = method("method_kwargs.invariance_weight=0")
    # no objective left: whatever moves the backbone comes from the classifier
    model.settings.eps = 1e30
    batch = [torch.arange(4), torch.randn(2, 4, 3, 16, 16), torch.arange(4)]
    model.training_step(batch, 0).backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    assert max(p.grad.abs().max() for p in backbone_of(model).parameters()) < 1e-6


def test_online_knn_remembers_the_labelled_images(method):
    """Each once, as the mean of its patches' backbone features; unlabelled ones stay out."""
    model = method("knn_eval.enabled=True").train()
    patches, targets = torch.randn(3, 4, 3, 16, 16), torch.tensor([1, -1, 3, 0])
    state = copy.deepcopy(model.state_dict())
    model.training_step([torch.arange(4), patches, targets], 0)
    bank, labels = torch.cat(model.knn.train_features), torch.cat(model.knn.train_targets)
    model.load_state_dict(state)
    expected = backbone_of(model)(patches.flatten(0, 1)).unflatten(0, (3, 4)).mean(0)[[0, 2, 3]]
    torch.testing.assert_close(bank, expected.detach())
    assert labels.tolist() == [1, 3, 0]


def test_everything_is_optimised_once(method):
    model = method()
    groups = model.learnable_params
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}


def test_learning_rate_is_not_rescaled(method):
    assert method("optimizer.batch_size=100").lr == method("optimizer.batch_size=50").lr == 0.3


def test_channels_last_and_stem(method):
    model = method("backbone.stem_padding=1")
    assert backbone_of(model).conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert backbone_of(model).conv1.padding == (1, 1)
    assert backbone_of(method("backbone.stem_padding=null")).conv1.padding == (2, 2)  # solo-learn's


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_kwargs.preset=best", "preset must be one of code, paper"),
        ("method_kwargs.eps=0", "eps must be positive"),
        ("method_kwargs.eps=0.01", "eps must be at least 0.01024"),
        ("method_kwargs.invariance_weight=-1", "invariance_weight"),
        ("method_kwargs.proj_output_dim=0", "proj_output_dim"),
        ("method_kwargs.lambda=200", "lambda"),
        ("method_kwargs.proj_hidden_dim=wide", "proj_hidden_dim has the wrong type: 'wide'"),
        ("method_kwargs.patch_chunk=0", "patch_chunk"),
        ("backbone.name=resnet19", "resnet19"),
    ],
)
def test_impossible_settings_are_named(config, override, message):
    with pytest.raises(UserError, match=message):
        fresh_method(config("digits/emp", override))


def test_settings_keep_what_is_set():
    assert EMPSettings(preset="paper", proj_output_dim=64).proj_output_dim == 64
    assert EMPSettings().embedding_dim == 4096
    assert EMPSettings(preset="paper").embedding_dim == 0


def grouped_reference(model, patches, chunk):
    """z (n, b, d) of chunks that each are a BatchNorm group, with the whole graph kept."""
    parts = []
    for part in patches.split(chunk):
        h = backbone_of(model)(part.flatten(0, 1))
        z = F.normalize(model.projector(model.embedder(h)), dim=1)
        parts.append(z.unflatten(0, part.shape[:2]))
    return torch.cat(parts)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(made, expected, tolerance):
    """Equal within ``tolerance`` of the largest of them."""
    atol = tolerance * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(made[name], gradient, rtol=tolerance, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "synchronised"),
    [(torch.float64, 1e-10, False), (torch.float32, 1e-5, False), (torch.float64, 1e-10, True)],
)
def test_chunks_give_the_gradients_of_the_whole(method, dtype, tolerance, synchronised):
    """5 patches in chunks of 2, 2 and 1, against the kept graph.

    Gradients, running statistics and counters are the same; also with the layers of several GPUs
    (SyncBatchNorm, which in a single process is BatchNorm).
    """
    model = method(*CHUNKS_OF_2).to(dtype).train()
    if synchronised:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    state = copy.deepcopy(model.state_dict())
    patches, targets = torch.randn(5, 8, 3, 16, 16, dtype=dtype), torch.full((8,), -1)
    model.training_step([torch.arange(8), patches, targets], 0).backward()
    gradients = gradients_of(model)
    after = {name: value.clone() for name, value in model.named_buffers()}

    model.zero_grad()
    model.load_state_dict(state)
    z = grouped_reference(model, patches, 2)
    emp_ssl_loss(z if dtype == torch.float64 else z.float()).loss.backward()
    check_gradients(gradients, gradients_of(model), tolerance)
    for name, value in model.named_buffers():
        torch.testing.assert_close(after[name], value, rtol=tolerance, atol=tolerance)
        assert "num_batches" not in name or value == 3  # three chunks, each counted once


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_chunks_draw_their_random_numbers_once(method, bf16, tolerance):
    """With dropout, and also under autocast.

    The second pass over a chunk drops what the first one dropped, and the generator has moved once.
    """
    model = method(*CHUNKS_OF_2).train()
    model.embedder.append(torch.nn.Dropout(0.5))
    patches = torch.randn(4, 8, 3, 16, 16)
    results = []
    for project in (
        lambda: model.project_chunks(patches)[1],
        lambda: grouped_reference(model, patches, 2),
    ):
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z = project()
        emp_ssl_loss(z.float()).loss.backward()
        results.append((gradients_of(model), torch.get_rng_state()))
    (gradients, state), (expected, expected_state) = results
    assert torch.equal(state, expected_state)
    check_gradients(gradients, expected, tolerance)


def test_chunks_work_with_loss_scaling_and_accumulated_gradients(method):
    """Two batches before one step, their losses scaled as for float16.

    Once unscaled, the gradients are those of the kept graphs. One that overflows is seen.
    """
    model = method(*CHUNKS_OF_2).train()
    state = copy.deepcopy(model.state_dict())
    batches, targets = torch.randn(2, 5, 8, 3, 16, 16), torch.full((8,), -1)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for patches in batches:
        scaler.scale(model.training_step([torch.arange(8), patches, targets], 0) / 2).backward()
    scaler.unscale_(optimizer)
    gradients = gradients_of(model)

    model.zero_grad()
    model.load_state_dict(state)
    for patches in batches:
        (emp_ssl_loss(grouped_reference(model, patches, 2)).loss / 2).backward()
    check_gradients(gradients, gradients_of(model), 1e-5)

    before = copy.deepcopy(weights)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaler.scale(model.training_step([torch.arange(8), batches[0], targets], 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(weights, before))
    assert scaler.get_scale() == 2.0**126


def test_chunks_leave_a_weight_alone_that_the_loss_does_not_depend_on(method):
    """Without a gradient, as without chunks, so that weight decay does not touch it either."""
    batch = [torch.arange(4), torch.randn(3, 4, 3, 16, 16), torch.full((4,), -1)]
    for settings in (CHUNKS_OF_2, CHUNKS_OF_2[1:]):
        model = method(*settings).train()
        model.embedder.spare = torch.nn.Parameter(torch.ones(3))
        model.training_step(batch, 0).backward()
        assert model.embedder.spare.grad is None
        assert model.embedder[0].weight.grad.abs().sum() > 0


class Watched(torch.autograd.Function):
    """Notes whether autocast is on, in the forward and in the backward pass."""

    on = []

    @staticmethod
    def forward(ctx, x):
        Watched.on.append(torch.is_autocast_enabled("cpu"))
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        Watched.on.append(torch.is_autocast_enabled("cpu"))
        return upstream


def test_chunks_are_passed_under_autocast_but_not_their_gradients(method):
    """As without chunks, and as torch wants it."""
    model = method(*CHUNKS_OF_2).train()
    model.embedder.register_forward_hook(lambda module, inputs, out: Watched.apply(out))
    Watched.on.clear()
    batch = [torch.arange(4), torch.randn(4, 4, 3, 16, 16), torch.full((4,), -1)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(batch, 0)
    loss.backward()
    # two chunks without a graph, then each with its gradients
    assert Watched.on == [True, True, True, False, True, False]


def test_chunks_need_not_keep_the_activations(method):
    """Between forward and backward only the patches and the projections are kept."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    model = method("method_kwargs.patch_chunk=1").train()
    patches = torch.randn(3, 4, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.training_step([torch.arange(4), patches, torch.full((4,), -1)], 0)
    # an activation of the first stage alone has 3 * 4 * 64 * 16 * 16 numbers
    assert max(kept) <= patches.numel() * 4
