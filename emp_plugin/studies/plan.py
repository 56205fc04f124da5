"""Which runs a study consists of, and how long each of them trains."""

from typing import NamedTuple

from emp_plugin.studies.settings import StudySettings


class Trial(NamedTuple):
    """One run of a study and the points of it that are evaluated."""

    method: str  # name of the recipe
    seed: int
    schedule: str  # fitted or snapshot
    budget: str
    length: float  # epochs, minutes, or (flops) epochs of EMP
    points: tuple[float, ...]  # in the unit of length; the last one is the end
    override: tuple[str, ...] = ()  # the ablated setting, as it is overridden

    def __str__(self) -> str:
        what = ", ".join((self.method, *self.override))
        length = describe_length(self.budget, self.length)
        return f"{what}, seed {self.seed}, {length}, schedule {self.schedule}"


class TrialFailed(Exception):
    """One trial failed and the others can go on; the message says why."""


def describe_length(budget: str, length: float) -> str:
    """A length in words.

    >>> describe_length("minutes", 5), describe_length("flops", 1)
    ('5 minutes of training', '1 epoch of EMP-SSL in FLOPs')
    """
    unit, of = {
        "epochs": ("epoch", ""),
        "minutes": ("minute", " of training"),
        "flops": ("epoch", " of EMP-SSL in FLOPs"),
    }[budget]
    return f"{length:g} {unit}{'' if length == 1 else 's'}{of}"


def plan(cfg: StudySettings) -> list[Trial]:
    """The trials of a study.

    Short ones come first, so that a study cut off has the methods side by side. A long schedule
    comes before the fitted ones: its last point is one of them.
    """
    values: list[tuple[str, ...]] = [(f"{cfg.ablate}={value}",) for value in cfg.values] or [()]
    variants = [
        (seed, method, override)
        for seed in cfg.seeds
        for method in cfg.methods
        for override in values
    ]
    trials = []

    def add(schedule: str, budget: str, *points: float) -> None:
        for seed, method, override in variants:
            trials.append(Trial(method, seed, schedule, budget, points[-1], points, override))

    for budget in cfg.budget:
        lengths = sorted(cfg.minutes if budget == "minutes" else cfg.epochs)
        if "snapshot" in cfg.schedule:
            add("snapshot", budget, *lengths)
        if "fitted" in cfg.schedule:
            for length in lengths:
                add("fitted", budget, length)
    return trials
