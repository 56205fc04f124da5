"""The version is said in emp_plugin/__init__.py; what else shows one agrees with it."""

import configparser
import re

import emp_plugin
from support import ROOT


def test_the_version_has_one_source():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["metadata"]["version"] == "attr: emp_plugin.__version__"
    [cited] = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited == emp_plugin.__version__
