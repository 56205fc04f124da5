"""README.md and docs/: code runs, links lead somewhere, figures are those of results/."""

import dataclasses
import re
import runpy
import shlex

import pandas as pd
import pytest

from emp_plugin.config import Run
from emp_plugin.training.flops import training_flops
from support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
BLOCKS = {
    f"{page.name}, block {i}": code
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S))
}
# of `emp pretrain`, without it; METHOD stands for several
COMMANDS = {
    line: shlex.split(line, comments=True)
    for page in PAGES
    for line in re.findall(
        r"^emp pretrain ([a-z].*)$", page.read_text().replace("\\\n", " "), flags=re.M
    )
    if "METHOD" not in line
}
# tests/test_export.py runs these, which need a run's files
NEED_FILES = ("backbone.safetensors",)
# rows of README's first table: features, view, probe
PROBES = {
    "linear probe, whole image": ("backbone", "whole", "linear"),
    "linear probe, bag of 16 patches": ("backbone", "bag of 16 plain", "linear"),
    "k-NN, whole image": ("backbone", "whole", "knn"),
}
MODELS = {"untrained": "untrained", "pixels": "raw pixels", "EMP-SSL": "emp"}
# rows of its second table: file, length in epochs, view, and whom the published figure is of
CELLS = [
    ("compare-cifar10-emp-h100/results.csv", 1, "bag of 128 augmented", "fitted to 1 or 2"),
    ("compare-cifar10-emp-h100/results.csv", 10, "bag of 128 augmented", "not stated"),
    ("cifar10-emp-1epoch-h200/evaluation.csv", None, "dense", None),
    ("views-cifar10-50000/standard.csv", None, "dense", None),
]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_python_runs(name):
    if any(file in BLOCKS[name] for file in NEED_FILES):
        pytest.skip("needs the files of a run")
    exec(compile(BLOCKS[name], name, "exec"), {})


def test_there_are_blocks():
    assert len([name for name in BLOCKS if name.startswith("README")]) >= 2


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_names_a_recipe_and_its_settings(line, config):
    config(*COMMANDS[line])


def test_readme_is_short():
    assert len(README.split()) <= 2000
    assert README.count("\n") <= 170


def tables() -> list[list[dict[str, str]]]:
    """README's tables, a dict per row; marks of bold and code are left out."""
    lines = [
        [cell.strip(" *`") for cell in line.strip("|").split("|")] if line.startswith("|") else None
        for line in README.splitlines()
    ]
    starts = [i + 2 for i, line in enumerate(lines[1:], 1) if line and not lines[i - 1]]
    found = []
    for start in starts:
        rows = lines[start : lines.index(None, start)]
        found.append([dict(zip(lines[start - 2], row, strict=True)) for row in rows])
    return found


def only(rows: pd.DataFrame, column: str = "top1", **wanted) -> float | None:
    """The value of the rows that are wanted, which are to have one; None without rows."""
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    values = set(rows[column])
    assert len(values) <= 1, values
    return values.pop() if values else None


def same(cell: str, figure: float | None) -> bool:
    """Whether a cell has this figure, rounded to the digits it shows."""
    if figure is None or cell == "":
        return figure is None and cell == ""
    digits = len(cell.partition(".")[2])
    return abs(float(cell) - figure) <= 0.5 * 10**-digits + 1e-9


def test_the_first_table_is_that_of_the_comparison():
    rows = pd.read_csv(ROOT / "results/compare-cifar10-1epoch-h100/results.csv")
    assert len(tables()[0]) == 5
    for line in tables()[0]:
        what = line.pop("CIFAR-10, one epoch")
        for name, cell in line.items():
            method = MODELS.get(name, name.lower())
            own = rows[rows.method == method]
            if what in PROBES:
                features, view, probe = PROBES[what]
                features = "pixels" if name == "pixels" else features
                own = own[own.inputs == "emp"] if name in ("untrained", "pixels") else own
                figure = only(own, features=features, view=view, probe=probe)
            else:
                column, unit = {
                    "patches seen, thousands": ("patches", 1000),
                    "training, seconds": ("train_seconds", 1),
                }[what]
                figure = only(own, column) / unit or None  # untrained and pixels: 0, empty
            assert same(cell, figure), (what, name, cell, figure)


def test_the_second_table_has_its_rows_and_the_published_figures():
    paper = pd.read_csv(ROOT / "emp_plugin/studies/paper.csv")
    assert len(tables()[1]) == len(CELLS)
    for line, (file, length, view, of) in zip(tables()[1], CELLS, strict=True):
        rows = pd.read_csv(ROOT / "results" / file)
        rows = rows[(rows["method" if length else "model"] == "emp") & (rows.probe == "linear")]
        rows = rows[rows.length == length] if length else rows
        figure = only(rows, features="embedding", view=view)
        assert same(line["top-1"], figure), (line, figure)
        if length:
            assert f"{only(rows, 'train_seconds')} s" in line["hardware"]
            published = only(
                paper, dataset="cifar10", method="EMP-SSL 20 patches", epochs=length, schedule=of
            )
            assert same(line["published"], published)
        else:
            assert line["published"] == ""
            assert set(rows.protocol) == {"standard"}


OTHERS = [ROOT / "results/README.md", ROOT / "benchmarks/README.md"]


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_what_a_page_names_is_there(page):
    """Relative links, and files that are named with one of the repository's folders."""
    text = page.read_text()
    links = re.findall(r"\]\(([^):#]+)[)#]", text)
    folders = "emp_plugin|scripts|tests|results|benchmarks|docs"
    named = re.findall(rf"`(?:\w+ )?((?:{folders})/[\w./-]*\w)/?`", text)
    absent = [link for link in links if not (page.parent / link).exists()]
    places = (ROOT, page.parent)
    absent += [name for name in named if not any((place / name).exists() for place in places)]
    assert not absent


def test_troubleshooting_quotes_messages_of_the_program():
    files = [*(ROOT / "emp_plugin").rglob("*.py"), *(ROOT / "scripts").glob("env.*")]
    source = re.sub(r'"\s*f?"', "", "".join(file.read_text() for file in files))
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.*?)` \|", page, flags=re.M)
    assert len(messages) > 10
    parts = [part.strip() for message in messages for part in message.split("…")]
    assert not [part for part in parts if part not in source]


def test_the_page_of_settings_has_every_setting_of_a_run():
    path = ROOT / "docs/settings.py"
    page = runpy.run_path(str(path))["page"]()
    assert path.with_suffix(".md").read_text() == page, "run python docs/settings.py"

    def names(schema: type, prefix: str = "") -> set[str]:
        return {
            name
            for field in dataclasses.fields(schema)
            for name in (
                names(field.type, f"{prefix}{field.name}.")
                if dataclasses.is_dataclass(field.type)
                else {prefix + field.name}
            )
        }

    documented = re.findall(r"^\| `([\w.]+)` \|", page.partition("## All")[2], flags=re.M)
    assert set(documented) == names(Run)


PARTS = (ROOT / "docs/results.md").read_text().split("\n## ")[1:]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.partition("\n")[0])
def test_figures_of_the_page_of_results_are_in_the_files_it_links(part):
    files = [ROOT / "docs" / link for link in re.findall(r"\]\(([^)]+\.(?:csv|md))\)", part)]
    files += [file.with_name("results.csv") for file in files if file.name == "table.md"]
    files += [ROOT / "emp_plugin/studies/paper.csv"]
    there = [float(n) for file in files for n in re.findall(r"\d+\.\d+", file.read_text())]
    assert len(there) > 100
    cells = [
        cell for line in part.splitlines() if line.startswith("| ") for cell in line.split("|")
    ]
    figures = set(re.findall(r"\b[1-9]\d*\.\d+", " ".join(cells)))
    assert not [figure for figure in figures if not any(same(figure, value) for value in there)]


@pytest.mark.slow
def test_flops_of_an_image_are_those_of_the_page_of_comparisons(config):
    page = (ROOT / "docs/comparison.md").read_text()
    names = re.search(r"^\| \|( EMP-SSL .*)\|$", page, flags=re.M)[1].replace("EMP-SSL", "emp")
    figures = re.search(r"^\| GFLOP an image \|(.*)\|$", page, flags=re.M)[1].split("|")
    for name, figure in zip(names.split("|"), figures, strict=True):
        recipe = config(f"cifar/{name.strip(' `').lower()}")
        assert same(figure.strip(), training_flops(recipe) / 1e9), name
