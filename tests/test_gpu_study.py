"""The study that waits for a GPU: what it chooses, its page, and a small run of it."""

import json
import subprocess
import sys

import gpu_study
import pandas as pd
import pytest

from support import ROOT


def rows(method, **top1):
    """Rows of a comparison: linear probes by features."""
    made = [{"method": method, "features": name, "top1": value} for name, value in top1.items()]
    return pd.DataFrame(made).assign(probe="linear", view="whole")


def test_the_best_rate_is_that_of_the_backbone_by_method():
    tried = {
        1: pd.concat([rows("simclr", backbone=40), rows("emp_native", backbone=55, embedding=9)]),
        0.1: pd.concat(
            [rows("simclr", backbone=42), rows("emp_native", backbone=51, embedding=99)]
        ),
        0.3: rows("untrained", backbone=90),
    }
    assert gpu_study.best_factors(tried) == {"simclr": 0.1, "emp_native": 1}


def test_the_page_is_of_whatever_rows_there_are(tmp_path):
    gpu_study.write_page(tmp_path)
    assert "|" not in (tmp_path / "page.md").read_text()
    case = {"ours": {"median": 0.03}, "reference": {"median": 0.02}, "ratio": 0.667}
    speed = {"cases": {"emp, eager": case | {"views_per_second": 60025}}, "hardware": "a GPU"}
    (tmp_path / "speed.json").write_text(json.dumps(speed | {"versions": {"torch": "2.11"}}))
    gpu_study.write_page(tmp_path)
    page = (tmp_path / "page.md").read_text()
    assert "| emp, eager | 30.0 | 20.0 | 1.50 | 60,025 |" in page


@pytest.mark.slow
def test_a_small_study_runs(tmp_path):
    script = str(ROOT / "benchmarks" / "gpu_study.py")
    command = [sys.executable, script, "--small", "--at-once", "2", "--out", str(tmp_path)]
    subprocess.run([*command, "--parts", "two,ten,rates,equal"], check=True)
    assert not list(tmp_path.rglob("*.tmp"))
    page = (tmp_path / "page.md").read_text()
    assert all(f"## {part}" in page for part in ("two", "ten", "rates/1", "equal"))
