"""Tables and figures from rows alone."""

import statistics

import pandas as pd
import pytest
from PIL import Image

from emp_plugin.errors import UserError
from emp_plugin.studies.figures import STYLES
from emp_plugin.studies.report import write_report
from emp_plugin.studies.rows import COLUMNS, read_rows

EMP = "EMP-SSL 20 patches"
PUBLISHED = {"view": "bag", "view_patches": 128, "augmented": True, "probe": "published"}
PAPERS_CELL = "published, bag of 128 augmented"


def row(
    method,
    seed,
    top1,
    epoch=1.0,
    minutes=10.0,
    schedule="fitted",
    features="backbone",
    view="whole",
    probe="linear",
    paper="",
    **more,
):
    given = {
        "dataset": "cifar10",
        "holdout": 0.0,
        "method": method,
        "seed": seed,
        "schedule": schedule,
        "budget": "epochs",
        "length": epoch,
        "epoch": epoch,
        "patches": 1000,
        "flops": 2.5e15 * epoch,
        "train_seconds": 60 * minutes,
        "protocol": "standard",
        "features": features,
        "view": view,
        "augmented": False,
        "scale": 1.0,
        "probe": probe,
        "labels": 1.0,
        "precision": "32",
        "collapsed": False,
        "machine": "a computer",
        "top1": top1,
        "paper": paper,
    }
    return dict.fromkeys(COLUMNS) | given | more


def failed(method, seed, error):
    evaluated = ("view", "probe", "features", "augmented", "scale", "labels", "collapsed")
    return row(method, seed, None, error=error) | dict.fromkeys((*evaluated, "protocol", "machine"))


def reference(method, features, top1, **more):
    given = {"epoch": 0, "minutes": 0, "schedule": "", "features": features}
    return row(method, 0, top1, **(given | more))


def report(tmp_path, rows, thresholds=(50, 90)):
    pd.DataFrame(rows, columns=COLUMNS).to_csv(tmp_path / "results.csv", index=False)
    write_report(tmp_path / "results.csv", tmp_path, list(thresholds))
    return (tmp_path / "table.md").read_text(), (tmp_path / "time_to_accuracy.md").read_text()


def cells(text, start):
    """The cells of the first line that begins with these, by the header above it."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {start}"))
    header = max(i for i in range(at) if lines[i].startswith("| method"))
    names, values = (
        [cell.strip() for cell in lines[i].strip("|").split("|")] for i in (header, at)
    )
    return list(zip(names, values))


@pytest.fixture
def drawn(monkeypatch):
    """Figures by file name, not written."""
    figures = {}
    monkeypatch.setattr(
        "emp_plugin.studies.figures.save_figure",
        lambda figure, path: figures.update({path.name: figure}),
    )
    return figures


@pytest.fixture
def two_seeds():
    byol = [row("byol", seed, value, paper="BYOL") for seed, value in ((0, 25.0), (1, 31.0))]
    emp = [
        row("emp", seed, value, minutes=20, features=features, paper=EMP, **view)
        for seed, value in ((0, 70.0), (1, 73.0))
        for features in ("backbone", "embedding")
        for view in ({"view": "whole"}, PUBLISHED)
    ]
    references = [
        reference("raw pixels", "pixels", 38.0),
        reference("untrained", "backbone", 40.0),
    ]
    return byol + emp + references


def test_table_has_means_and_the_paper_beside_its_own_cell_only(tmp_path, two_seeds):
    table, _ = report(tmp_path, two_seeds)
    mean, deviation = statistics.mean([25, 31]), statistics.stdev([25, 31])
    byol = cells(table, "BYOL")
    embedding = cells(table, "EMP-SSL | embedding")
    backbone = cells(table, "EMP-SSL | backbone")
    assert byol[2:] == [
        ("epochs", "1"),
        ("minutes", "10.0 ± 0.0"),
        ("PFLOP", "2.5"),
        ("patches seen", "1,000"),
        ("linear, whole", f"{mean:.2f} ± {deviation:.2f}"),
        ("paper", "24.9\\*"),
        (PAPERS_CELL, ""),
        ("paper", ""),
        ("seeds", "2"),
    ]
    assert embedding[7] == ("paper", "")
    assert embedding[9] == ("paper", "84.2\\*\\*")
    assert backbone[7] == backbone[9] == ("paper", "")
    assert cells(table, "raw pixels")[6][1] == "38.00"
    assert cells(table, "untrained")[6][1] == "40.00"
    assert "last epoch, protocol standard; mean and standard deviation over 2 seeds" in table
    assert "without evaluation, on: a computer." in table
    assert "not evaluated" not in table


def test_a_figure_of_the_paper_without_its_cell_is_in_a_line_of_its_own(tmp_path):
    rows = [
        row("emp", 0, 79.0, features=features, paper=EMP, **(PUBLISHED | other))
        for features in ("backbone", "embedding")
        for other in ({"view_patches": 16}, {"augmented": False}, {"probe": "linear"})
    ]
    table, _ = report(tmp_path, rows)
    embedding = cells(table, "EMP-SSL | embedding")
    assert [name for name, _ in embedding[6:-1]] == [
        "linear, bag of 128 augmented",
        "published, bag of 16 augmented",
        "published, bag of 128 plain",
    ]
    line = f"EMP-SSL: the paper has 84.2\\*\\* (embedding, {PAPERS_CELL}); not evaluated."
    assert table.count(line) == 1


def test_references_say_which_methods_they_are_for(tmp_path, drawn):
    rows = [
        row("emp", 0, 70.0, inputs="emp"),
        *(row(method, 0, 45.0, inputs="simclr") for method in ("simclr", "byol")),
        reference("untrained", "backbone", 43.0, inputs="emp"),
        reference("untrained", "backbone", 42.0, inputs="simclr"),
    ]
    table, _ = report(tmp_path, rows)
    assert cells(table, "untrained, for EMP-SSL |")[6][1] == "43.00"
    assert cells(table, "untrained, for SimCLR, BYOL |")[6][1] == "42.00"
    axis = drawn["convergence.png"].axes[1]
    lines = [line for line in axis.lines if line.get_label() == "untrained"]
    assert [line.get_ydata()[0] for line in lines] == [43.0, 42.0]
    assert {text.get_text(): text.get_position()[1] for text in axis.texts} == {
        "for EMP-SSL": 43.0,
        "for SimCLR, BYOL": 42.0,
    }


@pytest.fixture
def dense():
    """A function of EMP's scale: rows of a dense view beside whole images; SimCLR's scale is 1.5.

    Each has an untrained network of its own.
    """

    def make(scale):
        return [
            row(method, 0, top1 + more, view=view, scale=of_view, inputs=inputs)
            | ({"epoch": 0, "train_seconds": 0, "schedule": ""} if method == "untrained" else {})
            for method, inputs, top1, of_method in (
                ("emp", "emp", 60.0, scale),
                ("simclr", "simclr", 50.0, 1.5),
                ("untrained", "emp", 40.0, scale),
                ("untrained", "simclr", 30.0, 1.5),
            )
            for view, of_view, more in (("whole", 1.0, 0), ("dense", of_method, 5))
        ]

    return make


def test_a_scale_of_all_methods_is_in_the_name_of_the_column(tmp_path, dense, drawn):
    table, minutes = report(tmp_path, dense(1.5))
    for start, whole, of_dense in (
        ("EMP-SSL", "60.00", "65.00"),
        ("SimCLR", "50.00", "55.00"),
        ("untrained, for EMP-SSL", "40.00", "45.00"),
        ("untrained, for SimCLR", "30.00", "35.00"),
    ):
        line = cells(table, f"{start} |")
        assert line[6:-1] == [("linear, whole", whole), ("linear, dense at 1.5", of_dense)]
    assert "## linear, dense at 1.5\n" in minutes
    assert "| EMP-SSL | backbone |" in minutes
    axes = drawn["convergence.png"].axes
    assert captions(axes[::2]) == ["linear, whole images", "linear, dense at 1.5"]


def test_several_scales_have_a_column(tmp_path, dense, drawn):
    table, minutes = report(tmp_path, dense(2.0))
    for start, scale, whole, of_dense in (
        ("EMP-SSL", "2", "60.00", "65.00"),
        ("SimCLR", "1.5", "50.00", "55.00"),
        ("untrained, for EMP-SSL", "2", "40.00", "45.00"),
        ("untrained, for SimCLR", "1.5", "30.00", "35.00"),
    ):
        line = cells(table, f"{start} |")
        figures = [("linear, whole", whole), ("linear, dense", of_dense)]
        assert line[6:-1] == [("scale", scale), *figures]
    whole, of_dense = minutes.split("## ")[1:]
    assert cells(whole, "EMP-SSL |")[2] == ("50 %", "10.0")
    assert cells(of_dense, "EMP-SSL, at 2 |")[-1] == ("best seen, %", "65.00")
    assert cells(of_dense, "SimCLR, at 1.5 |")[2] == ("50 %", "10.0")
    axes = drawn["convergence.png"].axes
    assert captions(axes[::2])[1] == "linear, dense, each method at its scale"
    heights = [bars.lines[0].get_ydata().tolist() for bars in axes[2].containers]
    assert heights == [[65.0], [55.0]]


def test_probes_have_an_order_and_names(tmp_path):
    probes = ["mlp", "knn10", "knn", "online linear", "published", "linear"]
    rows = [row("byol", 0, 50.0 + n, probe=probe) for n, probe in enumerate(probes)]
    line = cells(report(tmp_path, rows)[0], "BYOL")
    assert line[6:-1] == [
        ("linear, whole", "55.00"),
        ("published, whole", "54.00"),
        ("online linear, whole", "53.00"),
        ("k-NN, whole", "52.00"),
        ("k-NN, k 10, whole", "51.00"),
        ("MLP, whole", "50.00"),
    ]


def test_a_collapsed_run_is_marked(tmp_path):
    rows = [
        row("emp", 0, 20.0, collapsed=True),
        row("byol", 0, 30.0, collapsed=True),
        row("byol", 1, 60.0),
        row("swav", 0, 50.0),
    ]
    for text in report(tmp_path, rows):
        assert "| EMP-SSL, collapsed |" in text
        assert "| BYOL, 1 of 2 seeds collapsed |" in text
        assert "| SwAV |" in text
    assert "Collapsed: the rank" in (tmp_path / "table.md").read_text()
    assert "ollapsed" not in report(tmp_path, rows[2:])[0]


def test_quick_evaluations_are_for_figures(tmp_path, drawn):
    rows = [
        *(
            row("byol", 0, top1, epoch, 10 * epoch, "course", length=1.0, protocol="quick", run="a")
            for epoch, top1 in ((0.25, 25.0), (0.5, 52.0))
        ),
        row("byol", 0, 60.0, run="a"),
        row("swav", 0, 50.0, protocol="quick"),
    ]
    table, minutes = report(tmp_path, rows)
    for text in (table, minutes):
        assert "| BYOL |" in text
        assert "| SwAV |" not in text
        assert "protocol standard; " in text
        assert "quick" not in text
    curves = {bars.get_label(): bars for bars in drawn["convergence.png"].axes[0].containers}
    assert "SwAV" in curves
    # the end, of another protocol, is no point of the curve
    course = curves["BYOL, in the course of 1 epoch (quick)"]
    assert course.lines[0].get_xdata().tolist() == [0.25, 0.5]
    title = drawn["convergence.png"].get_suptitle()
    assert "protocols quick and standard" in title
    alone = report(tmp_path, [*rows[:2], rows[3]])
    assert alone[0] == alone[1] == "There are rows of the protocol quick alone, for figures.\n"


def test_minutes_of_several_machines_are_not_in_one_figure(tmp_path, drawn):
    rows = [row("byol", 0, 60.0), row("emp", 0, 70.0, epoch=2.0, machine="another")]
    table, _ = report(tmp_path, rows)
    assert "on: a computer; another." in table
    axis = drawn["convergence.png"].axes[1]
    assert axis.get_xlabel() == "PFLOP of training"
    places = {bars.get_label(): bars.lines[0].get_xdata().tolist() for bars in axis.containers}
    assert places == {"BYOL": [2.5], "EMP-SSL": [5.0]}


def test_texts_that_look_like_numbers_stay(tmp_path):
    """Twelve digits of a hash may all be decimal, or have an e among them."""
    path = tmp_path / "results.csv"
    made = row("byol", 0, 60.0, identity="123456789012", commit="12345e9", torch="2.10")
    pd.DataFrame([made], columns=COLUMNS).to_csv(path, index=False)
    (read,) = read_rows(path).itertuples()
    texts = read.identity, read.commit, read.torch, read.precision
    assert texts == ("123456789012", "12345e9", "2.10", "32")


def test_parts_of_the_labels_have_tables_of_their_own(tmp_path):
    rows = [
        row("byol", 0, top1, labels=labels, paper="BYOL", probe=probe)
        for labels, probe, top1 in (
            (0.01, "linear", 91.0),
            (1.0, "linear", 20.0),
            (1.0, "mlp", 22.0),
            (1.0, "online linear", 18.0),
        )
    ]
    table, minutes = report(tmp_path, rows + [reference("raw pixels", "pixels", 38.0)])
    whole, few = table.split("## ")[1:]
    assert cells(whole, "BYOL")[6:10] == [
        ("linear, whole", "20.00"),
        ("paper", "24.9\\*"),
        ("online linear, whole", "18.00"),
        ("MLP, whole", "22.00"),
    ]
    assert few.startswith("1 epoch, schedule fitted, 1 % of the labels\n")
    assert cells(few, "BYOL")[6:] == [("linear, whole", "91.00"), ("seeds", "1 (seed 0)")]
    assert "raw pixels |" in whole
    assert "raw pixels |" not in few
    assert cells(minutes, "BYOL")[-1] == ("best seen, %", "20.00")


def test_a_single_seed_is_printed_as_such(tmp_path):
    table, minutes = report(tmp_path, [row("byol", 3, 25.0)])
    assert cells(table, "BYOL")[-1][1] == "1 (seed 3)"
    assert cells(table, "BYOL")[6][1] == "25.00"
    assert "a single seed (3)" in table
    assert "a single seed (3)" in minutes
    assert "±" not in table


@pytest.mark.parametrize(("minutes", "written"), [(9.0, "9.0"), (1.04, "1.0"), (0.358, "0.36")])
def test_minutes_of_a_gpu_are_not_rounded_away(tmp_path, minutes, written):
    table, until = report(tmp_path, [row("byol", 0, 60.0, minutes=minutes)])
    assert cells(table, "BYOL")[3] == ("minutes", written)
    assert cells(until, "BYOL")[2] == ("50 %", written)


def test_a_logarithmic_axis_has_few_labels_without_powers(tmp_path, drawn):
    report(tmp_path, [row("emp", 0, 50.0 + t, epoch=t, minutes=t) for t in (0.3, 3.0, 20.0)])
    figure = drawn["convergence.png"]
    figure.canvas.draw()
    for axis in figure.axes:
        low, high = axis.get_xlim()
        labels = [
            label.get_text()
            for which in ("major", "minor")
            for label in axis.get_xticklabels(which=which)
            if low <= label.get_position()[0] <= high
        ]
        assert axis.get_xscale() == "log"
        assert [label for label in labels if label] == ["0.5", "1", "2", "5", "10", "20"]


@pytest.mark.parametrize(
    ("patches", "epoch", "schedule", "figure"),
    [
        (200, 1.0, "fitted", "85.1"),
        (200, 1.0, "snapshot", "82.6"),
        (20, 1.0, "fitted", "84.2\\*\\*"),
        (20, 2.0, "fitted", "84.2\\*\\*"),
        (20, 1.0, "snapshot", "80.6"),
        (20, 2.0, "snapshot", ""),
        (20, 10.0, "fitted", "90.7\\*"),
    ],
)
def test_readings_of_the_epochs_are_not_mixed(tmp_path, patches, epoch, schedule, figure):
    papers = PUBLISHED | {"features": "embedding", "paper": f"EMP-SSL {patches} patches"}
    table, _ = report(tmp_path, [row("emp", 0, 80.0, epoch=epoch, schedule=schedule, **papers)])
    assert f"## {epoch:g} epoch{'' if epoch == 1 else 's'}, schedule {schedule}" in table
    assert dict(cells(table, "EMP-SSL")).get("paper", "") == figure


def test_the_end_of_a_run_of_snapshots_is_fitted(tmp_path):
    papers = PUBLISHED | {"features": "embedding", "paper": EMP, "schedule": "snapshot"}
    one, two = (row("emp", 0, 80.0, epoch=epoch, run="a", **papers) for epoch in (1.0, 2.0))
    assert dict(cells(report(tmp_path, [one])[0], "EMP-SSL"))["paper"] == "84.2\\*\\*"
    first, last = report(tmp_path, [one, two])[0].split("## ")[1:]
    assert dict(cells(first, "EMP-SSL"))["paper"] == "80.6"
    assert dict(cells(last, "EMP-SSL"))["paper"] == "84.2\\*\\*"


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "digits"},
        {"epoch": 2.0},
        {"paper": ""},
        {"features": "embedding"},
        {"probe": "knn"},
    ],
)
def test_no_figure_where_the_paper_has_none(tmp_path, change):
    table, _ = report(tmp_path, [row("byol", 0, 25.0, **({"paper": "BYOL"} | change))])
    assert "24.9" not in "".join(line for line in table.splitlines() if line.startswith("|"))


def test_a_failed_run_has_a_row_that_says_why(tmp_path, two_seeds):
    table, _ = report(tmp_path, [*two_seeds, failed("swav", 1, "out of memory")])
    assert "SwAV, seed 1: failed: out of memory" in table
    assert "| SwAV" not in table


def test_first_time_at_a_threshold(tmp_path):
    rows = [
        row("byol", seed, value, epoch=epoch, minutes=epoch * 10 + seed, paper="BYOL")
        for seed, values in ((0, (40, 55, 91)), (1, (52, 60, 70)))
        for epoch, value in zip((1, 2, 5), values)
    ]
    _, text = report(tmp_path, rows)
    assert cells(text, "BYOL | backbone")[2:] == [
        ("50 %", f"{statistics.mean([20, 11]):.1f} ± {statistics.stdev([20, 11]):.1f}"),
        ("90 %", "50.0 (1 of 2 seeds)"),
        ("paper, two A100", "142"),
        ("best seen, %", "91.00"),
    ]
    assert cells(report(tmp_path, rows, [95])[1], "BYOL")[2] == ("95 %", "not reached")
    _, text = report(tmp_path, [*rows, failed("byol", 2, "out of memory")])
    assert cells(text, "BYOL")[2][1].endswith("(2 of 3 seeds)")


def test_the_papers_minutes_stand_beside_its_own_cell_only(tmp_path):
    """Of EMP-SSL that is the published probe on the embedding of a bag."""
    rows = [
        row(method, 0, 91.0, features=features, paper=paper, **view)
        for method, paper in (("emp", EMP), ("byol", "BYOL"))
        for features in ("backbone", "embedding")
        for view in ({"view": "whole"}, PUBLISHED)
        if features == "backbone" or method == "emp"
    ]
    _, text = report(tmp_path, rows, [90])
    minutes = {
        (view, name): dict(cells(part, name))["paper, two A100"]
        for view, part in zip(("whole", "bag"), text.split("## ")[1:])
        for name in ("EMP-SSL | backbone", "EMP-SSL | embedding", "BYOL | backbone")
    }
    assert {key: value for key, value in minutes.items() if value} == {
        ("bag", "EMP-SSL | embedding"): "35",
        ("whole", "BYOL | backbone"): "142",
    }


def test_a_part_of_the_images_is_in_the_title(tmp_path):
    def title(*rows):
        return report(tmp_path, rows)[0].splitlines()[0]

    assert title(row("byol", 0, 25.0, fraction=0.2)) == "# CIFAR-10, 20 % of the training images"
    assert title(row("byol", 0, 25.0, fraction=-1)) == "# CIFAR-10"
    several = [
        row("emp", 0, 25.0, fraction=value, setting="data.fraction", value=value)
        for value in (0.1, 0.2)
    ]
    assert title(*several) == "# CIFAR-10"  # each row says it


def test_a_thousand_epochs_are_written_out(tmp_path):
    table, _ = report(tmp_path, [row("byol", 0, 92.0, epoch=1000.0)])
    assert dict(cells(table, "BYOL"))["epochs"] == "1000"


def test_figure(tmp_path, two_seeds):
    report(tmp_path, two_seeds)
    with Image.open(tmp_path / "convergence.png") as picture:
        assert min(picture.size) > 500
        found = picture.convert("RGB").getcolors(picture.width * picture.height)
    colours = {colour for _, colour in found}
    assert {tuple(bytes.fromhex(STYLES[name][0][1:])) for name in ("emp", "byol")} <= colours


@pytest.fixture
def course():
    """Two runs of one epoch, each looked at three times, by two probes."""
    return [
        row(
            "emp",
            seed,
            top1 + seed + (5 if probe == "knn" else 0),
            epoch=epoch,
            minutes=minutes + seed,
            probe=probe,
            run=f"runs/{seed}",
            length=1.0,
            schedule="fitted" if epoch == 1 else "course",
        )
        for seed in (0, 1)
        for epoch, minutes, top1 in ((0.25, 5, 30), (0.5, 10, 55), (1.0, 20, 70))
        for probe in ("linear", "knn")
    ]


def test_points_in_the_course_of_runs_are_not_runs_of_that_length(tmp_path, course):
    table, minutes = report(tmp_path, course)
    assert table.count("## ") == 1
    assert "## 1 epoch, schedule fitted" in table
    end = f"70.50 ± {statistics.stdev([70, 71]):.2f}"
    assert dict(cells(table, "EMP-SSL"))["linear, whole"] == end
    # the end alone would say 20.5
    first = f"10.5 ± {statistics.stdev([10, 11]):.1f}"
    assert cells(minutes, "EMP-SSL")[2] == ("50 %", first)


def test_convergence_has_a_line_through_the_course_for_linear_and_knn(tmp_path, course, drawn):
    report(tmp_path, course)
    axes = drawn["convergence.png"].axes
    assert captions(axes[::2]) == ["linear, whole images", "k-NN, whole images"]
    for axis, x, y in (
        (axes[0], [0.25, 0.5, 1], [30.5, 55.5, 70.5]),
        (axes[1], [5.5, 10.5, 20.5], [30.5, 55.5, 70.5]),
        (axes[2], [0.25, 0.5, 1], [35.5, 60.5, 75.5]),
    ):
        lines = {bars.get_label(): bars.lines[0] for bars in axis.containers}
        assert set(lines) == {"EMP-SSL", "EMP-SSL, in the course of 1 epoch"}
        line = lines["EMP-SSL, in the course of 1 epoch"]
        assert line.get_xdata().tolist() == pytest.approx(x)
        assert line.get_ydata().tolist() == pytest.approx(y)
        assert lines["EMP-SSL"].get_xdata().tolist() == pytest.approx(x[-1:])


def captions(axes):
    return [axis.get_ylabel().split("\n")[1] for axis in axes]


def test_an_epoch_and_a_minute_are_points_of_their_own(tmp_path, drawn):
    minute = row("emp", 0, 30.0, epoch=0.2, minutes=1, budget="minutes", length=1.0)
    table, _ = report(tmp_path, [row("emp", 0, 70.0), minute])
    assert "## 1 epoch, schedule" in table
    assert "## 1 minute of training, schedule" in table
    (bars,) = drawn["convergence.png"].axes[0].containers
    assert bars.lines[0].get_xdata().tolist() == [0.2, 1.0]
    assert bars.lines[0].get_ydata().tolist() == [30.0, 70.0]


def test_an_ablation_has_a_row_and_a_point_for_each_value(tmp_path, drawn):
    rows = [
        row("emp_native", seed, top1 + seed, setting="data.num_patches", value=n, probe=probe)
        for n, top1 in ((2, 50), (5, 60), (20, 64))
        for seed in (0, 1)
        for probe in ("linear", "knn")
    ]
    in_no_figure = [
        {"schedule": "course", "top1": 10.0},
        {"labels": 0.1},
        {"probe": "online linear"},
        {"probe": "mlp"},
        {"features": "embedding"},
    ]
    rows += [rows[0] | {"top1": 5.0} | other for other in in_no_figure]
    rows.append(reference("untrained", "backbone", 40.0))
    table, minutes = report(tmp_path, rows, thresholds=[60])
    name = "EMP-SSL, native patches, num_patches"
    for n, top1 in ((2, "50.50"), (5, "60.50"), (20, "64.50")):
        assert cells(table, f"{name} {n} | backbone")[6][1].startswith(top1)
    assert cells(minutes, f"{name} 2 |")[2][1] == "not reached"
    assert set(drawn) == {"ablation.png"}
    axes = drawn["ablation.png"].axes
    assert captions(axes) == ["linear, whole images", "k-NN, whole images"]
    for axis in axes:
        (bars,) = axis.containers
        assert bars.lines[0].get_xdata().tolist() == [2, 5, 20]
        assert bars.lines[0].get_ydata().tolist() == [50.5, 60.5, 64.5]
        assert bars.lines[0].get_color() == STYLES["emp_native"][0]
    drawn.clear()
    report(tmp_path, [row("byol", 0, 25.0)])
    assert set(drawn) == {"convergence.png"}


def test_methods_have_colours_of_their_own():
    colours, markers = zip(*STYLES.values())
    assert len(set(colours)) == len(set(markers)) == len(STYLES)


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="without report_only"):
        write_report(tmp_path / "results.csv", tmp_path, [])
