"""That something learns: the one test that looks at accuracies of a training."""

import json

import pytest

from support.runs import pretrain, the_run


@pytest.mark.slow
def test_emp_learns_digits(tmp_path):
    """k-NN of dense features, beside the same network untrained: 95.6 and 92.2 when written."""
    settings = ["limit_val_batches=0", "evaluation.probes=[knn]"]
    assert pretrain(tmp_path, *settings, "evaluation.views=[dense]") == 0
    rows = json.loads((the_run(tmp_path) / "summary.json").read_text())["evaluation"]
    top1 = {row["model"]: row["top1"] for row in rows if row["features"] != "embedding"}
    assert top1["emp"] > top1["untrained"] + 2
    assert top1["emp"] > 94
