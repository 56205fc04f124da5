"""The parts learn together: a small network on the digits, with the library's functions alone."""

import torch
import torch.nn.functional as F
from torch import nn

from emp_plugin.data import load_dataset
from emp_plugin.evaluation import View, extract_features, knn_probe
from emp_plugin.losses import emp_ssl_loss
from emp_plugin.transforms import BatchMultiPatch, PatchAugmentation

PATCHES, BATCH, STEPS = 8, 100, 300
CROPS = PatchAugmentation(PATCHES, patch_size=8, output_size=8).plain()


def convolution(inputs, outputs, stride):
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return layer, nn.BatchNorm2d(outputs), nn.ReLU()


def test_features_of_a_trained_network_are_better():
    """Half a minute. k-NN of dense features gained 10.3, 9.5 and 5.8 points with seeds 0, 1, 2."""
    train, test = load_dataset("digits", None, image_size=16)
    layers = convolution(3, 32, 1), convolution(32, 64, 2), convolution(64, 128, 2)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    backbone = nn.Sequential(*(part for layer in layers for part in layer), *pooled)
    hidden = nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU()
    projector = nn.Sequential(*hidden, nn.Linear(256, 64))

    def accuracy():
        view = View("dense", CROPS)
        (x, y), (u, v) = (extract_features(backbone, data, view) for data in (train, test))
        return knn_probe(x["backbone"], y, u["backbone"], v).top1

    untrained = accuracy()
    make_patches = BatchMultiPatch.from_augmentation(CROPS)
    weights = [*backbone.parameters(), *projector.parameters()]
    optimizer = torch.optim.Adam(weights, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        patches = make_patches(train.images[torch.randperm(len(train))[:BATCH]])
        z = F.normalize(projector(backbone(patches.flatten(0, 1))), dim=-1)
        optimizer.zero_grad()
        emp_ssl_loss(z.unflatten(0, (PATCHES, BATCH))).loss.backward()
        optimizer.step()
        schedule.step()
    assert accuracy() > untrained + 4
