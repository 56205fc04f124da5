"""scripts/test.sh: which solo-learn it takes."""

import os
import subprocess

from support import SCRIPTS


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    done = subprocess.run(
        ["bash", SCRIPTS / "test.sh"],
        env=os.environ | {"SOLO_LEARN": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"SOLO_LEARN={tmp_path} is no checkout of solo-learn" in done.stderr
