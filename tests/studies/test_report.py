"""Tables and plots from rows alone."""

import statistics

import pandas as pd
import pytest
from PIL import Image

from emp_plugin.errors import UserError
from emp_plugin.studies.report import COLUMNS, STYLES, write_report

EMP = "EMP-SSL 20 patches"


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
    return (
        dict.fromkeys(COLUMNS)
        | {
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
        | more
    )


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
    return list(
        zip(*([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (header, at)))
    )


@pytest.fixture
def two_seeds():
    return (
        [row("byol", seed, value, paper="BYOL") for seed, value in ((0, 25.0), (1, 31.0))]
        + [
            row("emp", seed, value, minutes=20, features=features, view=view, paper=EMP)
            for seed, value in ((0, 70.0), (1, 73.0))
            for features in ("backbone", "embedding")
            for view in ("whole", "bag of 128 augmented")
        ]
        + [reference("raw pixels", "pixels", 38.0), reference("untrained", "backbone", 40.0)]
    )


def test_table_has_means_and_the_paper_beside_its_own_cell_only(tmp_path, two_seeds):
    table, _ = report(tmp_path, two_seeds)
    mean, deviation = statistics.mean([25, 31]), statistics.stdev([25, 31])
    # columns: linear whole, paper, linear bag, paper
    byol, embedding, backbone = (
        dict(enumerate(cells(table, name)))
        for name in ("BYOL", "EMP-SSL | embedding", "EMP-SSL | backbone")
    )
    assert byol[5] == ("linear, whole", f"{mean:.2f} ± {deviation:.2f}")
    assert byol[6] == (
        "paper",
        "24.9\\*",
    )
    assert byol[7][1] == ""
    assert byol[8][1] == ""
    assert embedding[6][1] == ""
    assert embedding[8] == (
        "paper",
        "80.6\\*",
    )
    assert backbone[6][1] == backbone[8][1] == ""
    assert cells(table, "raw pixels")[5][1] == "38.00"
    assert cells(table, "untrained")[5][1] == "40.00"
    assert "over 2 seeds" in table
    assert byol[9][1] == "2"
    assert "not evaluated here" not in table


def test_a_figure_of_the_paper_without_its_cell_is_in_a_line_of_its_own(tmp_path):
    rows = [
        row("emp", 0, 79.0, features=features, view="bag of 16 plain", paper=EMP)
        for features in ("backbone", "embedding")
    ]
    table, _ = report(tmp_path, rows)
    assert "paper" not in dict(cells(table, "EMP-SSL | embedding"))
    assert (
        table.count(
            "EMP-SSL: the paper has 80.6\\*, of embedding and bag of 128 augmented, not evaluated here."
        )
        == 1
    )


def test_references_say_which_methods_they_are_for(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("emp_plugin.studies.report.plt.close", drawn.append)
    rows = [
        row("emp", 0, 70.0, inputs="emp"),
        *(row(method, 0, 45.0, inputs="simclr") for method in ("simclr", "byol")),
        *(
            reference("untrained", "backbone", top1) | {"inputs": inputs}
            for inputs, top1 in (("emp", 43.0), ("simclr", 42.0))
        ),
    ]
    table, _ = report(tmp_path, rows)
    assert cells(table, "untrained, for EMP-SSL |")[5][1] == "43.00"
    assert cells(table, "untrained, for SimCLR, BYOL |")[5][1] == "42.00"
    lines = [line for line in drawn[0].axes[1].lines if line.get_label() == "untrained"]
    assert [line.get_ydata()[0] for line in lines] == [43.0, 42.0]
    assert {text.get_text(): text.get_position()[1] for text in drawn[0].axes[1].texts} == {
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
    assert cells(until, "BYOL")[2] == (
        "50 %",
        written,
    )


def test_a_logarithmic_axis_has_few_labels_without_powers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "emp_plugin.studies.report.save_figure", lambda figure, path: drawn.append(figure)
    )
    report(
        tmp_path,
        [
            row("emp", 0, 50.0 + minutes, epoch=minutes, minutes=minutes)
            for minutes in (0.3, 3.0, 20.0)
        ],
    )
    drawn[0].canvas.draw()
    for axis in drawn[0].axes:
        low, high = axis.get_xlim()
        labels = [
            label.get_text()
            for which in ("major", "minor")
            for label in axis.get_xticklabels(which=which)
            if low <= label.get_position()[0] <= high
        ]
        assert axis.get_xscale() == "log"
        assert [label for label in labels if label] == [
            "0.5",
            "1",
            "2",
            "5",
            "10",
            "20",
        ]


def test_readings_of_the_epochs_are_not_mixed(tmp_path):
    def paper(schedule):
        table, _ = report(
            tmp_path,
            [
                row(
                    "emp",
                    0,
                    80.0,
                    schedule=schedule,
                    features="embedding",
                    view="bag of 128 augmented",
                    paper="EMP-SSL 200 patches",
                )
            ],
        )
        assert f"## 1 epoch, schedule {schedule}" in table
        return dict(cells(table, "EMP-SSL"))["paper"]

    assert paper("fitted") == "85.1"
    assert paper("snapshot") == "82.6\\*"


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
    table, _ = report(
        tmp_path,
        two_seeds
        + [
            row("swav", 1, None, error="out of memory")
            | {"view": None, "probe": None, "features": None}
        ],
    )
    assert "SwAV, seed 1: failed: out of memory" in table
    assert "| SwAV" not in table


def test_first_time_at_a_threshold(tmp_path):
    rows = [
        row("byol", seed, value, epoch=epoch, minutes=epoch * 10 + seed, paper="BYOL")
        for seed, values in ((0, (40, 55, 91)), (1, (52, 60, 70)))
        for epoch, value in zip((1, 2, 5), values)
    ]
    _, text = report(tmp_path, rows)
    line = cells(text, "BYOL | backbone")
    assert line[2:] == [
        ("50 %", f"{statistics.mean([20, 11]):.1f} ± {statistics.stdev([20, 11]):.1f}"),
        ("90 %", "50.0 (1 of 2 seeds)"),
        ("paper, two A100", "142"),
        ("best seen, %", "91.00"),
    ]
    assert cells(report(tmp_path, rows, [95])[1], "BYOL")[2] == ("95 %", "not reached")
    failed = row("byol", 2, None, error="out of memory") | {
        "view": None,
        "probe": None,
        "features": None,
    }
    assert cells(report(tmp_path, [*rows, failed])[1], "BYOL")[2][1].endswith("(2 of 3 seeds)")


def test_the_papers_minutes_stand_beside_its_own_cell_only(tmp_path):
    """Of EMP-SSL the paper probes the embedding of a bag of patches, of the others the backbone's features of whole images."""
    rows = [
        row(method, 0, 91.0, features=features, view=view, paper=paper)
        for method, paper in (("emp", EMP), ("byol", "BYOL"))
        for features in ("backbone", "embedding")
        for view in ("whole", "bag of 128 augmented")
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
    assert report(tmp_path, [row("byol", 0, 25.0, fraction=0.2)])[0].startswith(
        "# CIFAR-10, 20 % of the training images\n"
    )
    assert report(tmp_path, [row("byol", 0, 25.0, fraction=-1)])[0].startswith("# CIFAR-10\n")
    several = [
        row("emp", 0, 25.0, fraction=value, setting="data.fraction", value=value)
        for value in (0.1, 0.2)
    ]
    assert report(tmp_path, several)[0].startswith("# CIFAR-10\n")  # each row says it


def test_a_thousand_epochs_are_written_out(tmp_path):
    assert (
        dict(cells(report(tmp_path, [row("byol", 0, 92.0, epoch=1000.0)])[0], "BYOL"))["epochs"]
        == "1000"
    )


def test_plot(tmp_path, two_seeds):
    report(tmp_path, two_seeds)
    with Image.open(tmp_path / "convergence.png") as picture:
        assert min(picture.size) > 500
        colours = {
            colour for _, colour in picture.convert("RGB").getcolors(picture.width * picture.height)
        }
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
    assert (
        dict(cells(table, "EMP-SSL"))["linear, whole"]
        == f"70.50 ± {statistics.stdev([70, 71]):.2f}"
    )
    assert cells(minutes, "EMP-SSL")[2] == (
        "50 %",
        f"10.5 ± {statistics.stdev([10, 11]):.1f}",
    )  # the end alone would say 20.5


def test_convergence_has_a_line_through_the_course_for_linear_and_knn(
    tmp_path, course, monkeypatch
):
    drawn = []
    monkeypatch.setattr("emp_plugin.studies.report.plt.close", drawn.append)
    report(tmp_path, course)
    axes = drawn[0].axes
    assert [axis.get_ylabel().split("\n")[1] for axis in axes[::2]] == [
        "linear, whole images",
        "k-NN, whole images",
    ]
    for axis, x, y in (
        (axes[0], [0.25, 0.5, 1], [30.5, 55.5, 70.5]),
        (axes[1], [5.5, 10.5, 20.5], [30.5, 55.5, 70.5]),
        (axes[2], [0.25, 0.5, 1], [35.5, 60.5, 75.5]),
    ):
        (line,) = [
            bars.lines[0]
            for bars in axis.containers
            if bars.get_label() == "EMP-SSL, in the course of 1 epoch"
        ]
        assert line.get_xdata().tolist() == pytest.approx(x)
        assert line.get_ydata().tolist() == pytest.approx(y)
        (end,) = [bars.lines[0] for bars in axis.containers if bars.get_label() == "EMP-SSL"]
        assert end.get_xdata().tolist() == pytest.approx(x[-1:])


def test_an_epoch_and_a_minute_are_points_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("emp_plugin.studies.report.plt.close", drawn.append)
    table, _ = report(
        tmp_path,
        [
            row("emp", 0, 70.0),
            row("emp", 0, 30.0, epoch=0.2, minutes=1, budget="minutes", length=1.0),
        ],
    )
    assert "## 1 epoch, schedule" in table
    assert "## 1 minute of training, schedule" in table
    (bars,) = drawn[0].axes[0].containers
    assert bars.lines[0].get_xdata().tolist() == [0.2, 1.0]
    assert bars.lines[0].get_ydata().tolist() == [30.0, 70.0]


def test_an_ablation_has_a_row_and_a_point_for_each_value(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("emp_plugin.studies.report.plt.close", drawn.append)
    rows = [
        row("emp_native", seed, top1 + seed, setting="data.num_patches", value=n, probe=probe)
        for n, top1 in ((2, 50), (5, 60), (20, 64))
        for seed in (0, 1)
        for probe in ("linear", "knn")
    ]
    aside = [
        {"schedule": "course", "top1": 10.0},
        {"labels": 0.1},
        {"probe": "online linear"},
        {"probe": "mlp"},
        {"features": "embedding"},
    ]  # in no plot
    rows += [rows[0] | {"top1": 5.0} | other for other in aside]
    table, minutes = report(
        tmp_path, rows + [reference("untrained", "backbone", 40.0)], thresholds=[60]
    )
    for n, top1 in ((2, "50.50"), (5, "60.50"), (20, "64.50")):
        assert cells(table, f"EMP-SSL, native patches, num_patches {n} | backbone")[5][
            1
        ].startswith(top1)
    assert cells(minutes, "EMP-SSL, native patches, num_patches 2 |")[2][1] == "not reached"
    assert [axis.get_ylabel().split("\n")[1] for axis in drawn[0].axes] == [
        "linear, whole images",
        "k-NN, whole images",
    ]
    for axis in drawn[0].axes:
        (bars,) = axis.containers
        assert bars.lines[0].get_xdata().tolist() == [2, 5, 20]
        assert bars.lines[0].get_ydata().tolist() == [50.5, 60.5, 64.5]
        assert bars.lines[0].get_color() == STYLES["emp_native"][0]
    (tmp_path / "ablation.png").unlink()
    report(tmp_path, [row("byol", 0, 25.0)])
    assert not (tmp_path / "ablation.png").exists()


def test_methods_have_colours_of_their_own():
    assert (
        len({colour for colour, _ in STYLES.values()})
        == len({marker for _, marker in STYLES.values()})
        == len(STYLES)
    )


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="without report_only"):
        write_report(tmp_path / "results.csv", tmp_path, [])
