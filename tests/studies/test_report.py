"""Tables and figures from rows alone."""

import statistics

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from emp_plugin.errors import UserError
from emp_plugin.studies.figures import STYLES
from emp_plugin.studies.report import write_report
from emp_plugin.studies.rows import COLUMNS

EMP = "EMP-SSL 20 patches"
PAPERS_BAG = "bag of 128 augmented"


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
        "train_seconds": 60 * minutes,
        "features": features,
        "view": view,
        "probe": probe,
        "top1": top1,
        "paper": paper,
    }
    return dict.fromkeys(COLUMNS) | given | more


def failed(method, seed, error):
    return row(method, seed, None, error=error, view=None, probe=None, features=None)


def reference(method, features, top1):
    return row(method, 0, top1, epoch=0, minutes=0, schedule="", features=features)


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
    yield figures
    plt.close("all")


@pytest.fixture
def two_seeds():
    byol = [row("byol", seed, value, paper="BYOL") for seed, value in ((0, 25.0), (1, 31.0))]
    emp = [
        row("emp", seed, value, minutes=20, features=features, view=view, paper=EMP)
        for seed, value in ((0, 70.0), (1, 73.0))
        for features in ("backbone", "embedding")
        for view in ("whole", PAPERS_BAG)
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
    assert byol[5:] == [
        ("linear, whole", f"{mean:.2f} ± {deviation:.2f}"),
        ("paper", "24.9\\*"),
        (f"linear, {PAPERS_BAG}", ""),
        ("paper", ""),
        ("seeds", "2"),
    ]
    assert embedding[6] == ("paper", "")
    assert embedding[8] == ("paper", "80.6\\*")
    assert backbone[6] == backbone[8] == ("paper", "")
    assert cells(table, "raw pixels")[5][1] == "38.00"
    assert cells(table, "untrained")[5][1] == "40.00"
    assert "over 2 seeds" in table
    assert "not evaluated here" not in table


def test_a_figure_of_the_paper_without_its_cell_is_in_a_line_of_its_own(tmp_path):
    rows = [
        row("emp", 0, 79.0, features=features, view="bag of 16 plain", paper=EMP)
        for features in ("backbone", "embedding")
    ]
    table, _ = report(tmp_path, rows)
    assert "paper" not in dict(cells(table, "EMP-SSL | embedding"))
    line = f"EMP-SSL: the paper has 80.6\\*, of embedding and {PAPERS_BAG}, not evaluated here."
    assert table.count(line) == 1


def test_references_say_which_methods_they_are_for(tmp_path, drawn):
    rows = [
        row("emp", 0, 70.0, inputs="emp"),
        *(row(method, 0, 45.0, inputs="simclr") for method in ("simclr", "byol")),
        reference("untrained", "backbone", 43.0) | {"inputs": "emp"},
        reference("untrained", "backbone", 42.0) | {"inputs": "simclr"},
    ]
    table, _ = report(tmp_path, rows)
    assert cells(table, "untrained, for EMP-SSL |")[5][1] == "43.00"
    assert cells(table, "untrained, for SimCLR, BYOL |")[5][1] == "42.00"
    axis = drawn["convergence.png"].axes[1]
    lines = [line for line in axis.lines if line.get_label() == "untrained"]
    assert [line.get_ydata()[0] for line in lines] == [43.0, 42.0]
    assert {text.get_text(): text.get_position()[1] for text in axis.texts} == {
        "for EMP-SSL": 43.0,
        "for SimCLR, BYOL": 42.0,
    }


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
    assert cells(whole, "BYOL")[5:9] == [
        ("linear, whole", "20.00"),
        ("paper", "24.9\\*"),
        ("online linear, whole", "18.00"),
        ("MLP, whole", "22.00"),
    ]
    assert few.startswith("1 epoch, schedule fitted, 1 % of the labels\n")
    assert cells(few, "BYOL")[5:] == [("linear, whole", "91.00"), ("seeds", "1 (seed 0)")]
    assert "raw pixels |" in whole
    assert "raw pixels |" not in few
    assert cells(minutes, "BYOL")[-1] == ("best seen, %", "20.00")


def test_a_single_seed_is_printed_as_such(tmp_path):
    table, minutes = report(tmp_path, [row("byol", 3, 25.0)])
    assert cells(table, "BYOL")[-1][1] == "1 (seed 3)"
    assert cells(table, "BYOL")[5][1] == "25.00"
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


@pytest.mark.parametrize(("schedule", "figure"), [("fitted", "85.1"), ("snapshot", "82.6\\*")])
def test_readings_of_the_epochs_are_not_mixed(tmp_path, schedule, figure):
    papers = {"features": "embedding", "view": PAPERS_BAG, "paper": "EMP-SSL 200 patches"}
    table, _ = report(tmp_path, [row("emp", 0, 80.0, schedule=schedule, **papers)])
    assert f"## 1 epoch, schedule {schedule}" in table
    assert dict(cells(table, "EMP-SSL"))["paper"] == figure


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
    """Of EMP-SSL it probes the embedding of a bag, of the others whole images' features."""
    rows = [
        row(method, 0, 91.0, features=features, view=view, paper=paper)
        for method, paper in (("emp", EMP), ("byol", "BYOL"))
        for features in ("backbone", "embedding")
        for view in ("whole", PAPERS_BAG)
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
        assert cells(table, f"{name} {n} | backbone")[5][1].startswith(top1)
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
