"""The lines of README.md run as they stand."""

import re

import pytest

from support import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
# tests/test_export.py runs these, which need a run's files
NEED_FILES = ("backbone.safetensors",)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_a_block_of_python_runs(block):
    code = BLOCKS[block]
    if any(name in code for name in NEED_FILES):
        pytest.skip("needs the files of a run")
    exec(compile(code, f"README.md, block {block}", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
