"""scripts/test.sh: which solo-learn it takes."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "test.sh"


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    done = subprocess.run(
        ["bash", SCRIPT],
        env=os.environ | {"SOLO_LEARN": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and f"SOLO_LEARN={tmp_path} is no checkout of solo-learn" in done.stderr
    )
