"""Features of frozen networks and the probes that score them."""

from emp_plugin.evaluation.evaluate import evaluate
from emp_plugin.evaluation.features import Features, extract_features, pixel_features
from emp_plugin.evaluation.probes import Accuracy, knn_probe, labelled_part, linear_probe

__all__ = [
    "Accuracy",
    "Features",
    "evaluate",
    "extract_features",
    "knn_probe",
    "labelled_part",
    "linear_probe",
    "pixel_features",
]
