"""How methods, datasets and probes are called in tables and figures."""

METHODS = {
    "emp": "EMP-SSL",
    "emp_native": "EMP-SSL, native patches",
    "emp_crop_grey": "EMP-SSL, crop and grey alone",
    "simclr": "SimCLR",
    "byol": "BYOL",
    "vicreg": "VICReg",
    "swav": "SwAV",
    "ressl": "ReSSL",
}
DATASETS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "tiny-imagenet": "Tiny ImageNet",
    "imagenet100": "ImageNet-100",
}
# in the order of the columns
PROBES = {
    "linear": "linear",
    "published": "published",
    "online linear": "online linear",
    "knn": "k-NN",
    "knn10": "k-NN, k 10",
    "mlp": "MLP",
}


def method_title(name: str) -> str:
    """A user's own recipe is called as its file is."""
    return METHODS.get(name, name)


def dataset_title(name: str) -> str:
    """A dataset without a title is called as in its settings."""
    return DATASETS.get(name, name)
