"""Features of frozen networks, the probes that score them, and the protocols of both."""

from emp_plugin.evaluation.probes import Accuracy, knn_probe, labelled_part, linear_probe
from emp_plugin.evaluation.protocol import PROTOCOLS, Evaluation, Network, Protocol, evaluate
from emp_plugin.evaluation.views import Features, View, extract_features, pixel_features

__all__ = [
    "PROTOCOLS",
    "Accuracy",
    "Evaluation",
    "Features",
    "Network",
    "Protocol",
    "View",
    "evaluate",
    "extract_features",
    "knn_probe",
    "labelled_part",
    "linear_probe",
    "pixel_features",
]
