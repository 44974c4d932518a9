"""The rule by which a default is chosen."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.quality.analysis import default_rule
from benchmarks.quality.analysis import report as report_module
from benchmarks.quality.analysis.aims import against_best, family
from benchmarks.quality.analysis.default_rule import fresh_table, rule_table
from benchmarks.quality.analysis.report import chosen_on, report
from benchmarks.quality.data.classification import shifted

from tests.benchmarks.test_quality_analysis import record


def runs(method: str, exact: float, losses: list[float], count: int = 4) -> list[dict]:
    """Seeds whose scores differ a little, and a search over three rates."""
    found = [record(method, s, 1e-3, exact + 0.001 * s, losses) for s in range(count)]
    good = {1e-4: 0.2, 1e-3: exact, 1e-2: 0.2}
    return found + [record(method, 0, rate, e, losses, "search") for rate, e in good.items()]


def test_auto_and_natural_are_one_method_to_the_others():
    assert family("auto") == family("natural(steps=4)") != family("vanilla")
    assert family("vanilla(size=2)") == "vanilla"


def verdicts(records: list[dict]) -> dict[str, str]:
    rows = rule_table(chosen_on(records)).splitlines()[2:]
    return {row.split(" | ")[0].lstrip("| "): row.split(" | ")[1] for row in rows}


def test_the_rule_leaves_who_is_below_nobody_and_quicker():
    plain = runs("vanilla", 0.5, [3.0, 2.5, 2.0, 1.5, 1.0])
    quick = runs("natural", 0.5, [2.0, 1.0, 0.9, 0.8, 0.7])
    found = verdicts(plain + quick)
    assert found == {"vanilla": "left", "natural": "left"}
    # Below another method, by more than the seeds' spread.
    below = runs("pissa", 0.4, [2.0, 1.0, 0.9, 0.8, 0.7])
    found = verdicts(plain + quick + below)
    assert found["pissa"] == "out: below the best other on 1 tasks of smollm2-135m-instruct"
    # Good at fewer rates than plain LoRA.
    wide = [record("vanilla", 0, rate, 0.5, [1.0, 1.0], "search") for rate in (1e-4, 1e-2)]
    kept = [r for r in plain if r["learning_rate"] == 1e-3]
    assert verdicts(kept + wide + quick)["natural"].startswith("out: narrower range")
    # No quicker than plain LoRA.
    slow = runs("eva", 0.5, [3.0, 2.5, 2.0, 1.5, 1.2])
    assert verdicts(plain + slow)["eva"] == "out: no fewer steps than plain LoRA"


def test_the_rules_figures():
    plain = runs("vanilla", 0.5, [3.0, 2.5, 2.0, 1.5, 1.0])
    quick = runs("natural", 0.6, [2.0, 1.0, 0.9, 0.8, 0.7])
    cells = rule_table(chosen_on(plain + quick)).splitlines()[-1].strip("| ").split(" | ")
    assert cells[0] == "natural"
    # A quarter of the steps in every run; early: the mean of 2.0 and 1.6, less plain LoRA's last, 1.0.
    assert cells[2:5] == ["25%", "0.25 to 0.25", "0.800"]
    assert cells[5].startswith("+10.00 [+10.00, +10.00], ")


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ("mirrored", {(0, 5): 200}),
        ("moved", {(5, 5): 200}),
        ("inverted", {(0, 0): 55, (1, 1): 255}),
        ("rotated", {(5, 0): 200}),
        ("faint", {(0, 0): 114, (1, 1): 64}),
    ],
)
def test_shifts_put_a_bright_corner_where_they_say(task, wanted):
    images = np.zeros((2, 6, 6), dtype=np.uint8)
    images[:, 0, 0] = 200
    found = shifted(images, task)
    for (row, column), value in wanted.items():
        assert (found[:, row, column] == value).all()
    noisy = shifted(images, "noisy")
    assert noisy.dtype == np.uint8
    assert not np.array_equal(noisy[0], noisy[1])
    with pytest.raises(ValueError, match="no shift"):
        shifted(images, "upside")


def test_fresh_tasks_choose_nothing():
    fresh = [r | {"task": "syllogism"} for r in runs("pissa", 0.9, [1.0, 0.5, 0.1])]
    records = runs("vanilla", 0.5, [3.0, 2.0, 1.0]) + fresh
    # With the fresh task plain LoRA would lack one.
    assert verdicts(records) == {"vanilla": "left"}
    text = report(records)
    assert "## smollm2-135m-instruct, fresh tasks" in text


def test_against_best_counts_tasks():
    from benchmarks.quality.analysis.lines import collect_lines

    lines = collect_lines(runs("vanilla", 0.5, [3.0, 1.0]) + runs("natural", 0.6, [2.0, 0.5]))
    assert against_best(lines, "natural") == (1, 0, 1)
    assert against_best(lines, "vanilla") == (0, 1, 1)
    # One's own settings are no others.
    better = [r | {"label": "natural(steps=4)"} for r in runs("natural", 0.7, [2.0, 0.5])]
    records = runs("vanilla", 0.5, [3.0, 1.0]) + runs("natural", 0.6, [2.0, 0.5]) + better
    assert against_best(collect_lines(records), "natural") == (1, 0, 1)
    other = [r | {"label": "pissa"} for r in runs("pissa", 0.7, [2.0, 0.5])]
    assert against_best(collect_lines(records + other), "natural") == (0, 1, 1)


def test_numbers_of_statistics_stand_beside_plain_lora():
    records = runs("vanilla", 0.5, [3.0, 1.0]) + runs("natural", 0.6, [2.0, 0.5])
    for r in runs("natural", 0.55, [2.0, 0.5]):
        if r["stage"] == "seeds":
            few = r["experiment"] | {"statistics_samples": 8}
            records.append(r | {"stage": "sweep", "experiment": few})
    text = report(records)
    rows = text[text.index("### Final score by statistics_samples") :].splitlines()
    assert rows[2] == "| method | 8 | 256 |"
    assert rows[4] == "| vanilla | 50.1 (1) | 50.1 (1) |"
    assert rows[5] == "| natural | +5.0 (1) | +10.0 (1) |"


def test_full_fine_tuning_is_nobodys_other():
    from benchmarks.quality.analysis.aims import aims_table
    from benchmarks.quality.analysis.lines import collect_lines

    full = [r | {"label": "full"} for r in runs("vanilla", 0.9, [3.0, 0.1])]
    records = runs("vanilla", 0.5, [3.0, 1.0]) + runs("natural", 0.6, [2.0, 0.5]) + full
    lines = collect_lines(records)
    assert against_best(lines, "natural") == (1, 0, 1)
    assert "full" not in aims_table(lines)
    assert "| full |" in report(records)


def test_points_where_choices_were_made_and_where_not():
    """Means over either kind of task, of methods that have all of them."""
    records = []
    for task, gain in (("chain_sum", 0.1), ("letter_counting", 0.3), ("syllogism", -0.2)):
        for method, extra in (("vanilla", 0.0), ("natural", gain), ("eva", 0.4)):
            if method == "eva" and task == "syllogism":
                continue
            records += [
                r | {"task": task} for r in runs(method, 0.5 + extra, [3.0, 2.0, 1.0], count=5)
            ]
    text = fresh_table({"model": records}, ["syllogism"])
    assert "tasks of choice (2)" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| natural"))
    cells = [cell.strip().split()[0] for cell in row.split("|")[2:5]]
    assert cells == ["+20.00", "-20.00", "+6.67"]
    assert "eva" not in text


@pytest.mark.parametrize(("narrower", "out"), [(0.01, False), (0.03, True)])
def test_ranges_as_wide_as_the_same_start_searched_twice_are_equal(narrower, out, monkeypatch):
    widths = {"vanilla": 0.5, "natural": 0.5 - narrower}
    monkeypatch.setattr(default_rule, "good_ranges", lambda records: widths)
    records = runs("vanilla", 0.5, [3.0, 2.0, 1.0]) + runs("natural", 0.6, [2.0, 1.0, 0.5])
    (row,) = (x for x in rule_table({"model": records}).splitlines() if x.startswith("| natural"))
    assert ("narrower range on model" in row) is out


def test_the_order_of_the_records_does_not_matter(monkeypatch):
    """Where two rates tie on validation, the choice follows the ids, not the files."""
    tied = [
        record("natural", seed, rate, 0.6 + 100 * rate, [2.0, 0.5])
        for seed in range(5)
        for rate in (1e-3, 2e-3)
    ]
    tied = [r | {"validation": {"loss": 1.0, "exact": 0.6, "sequences": 10}} for r in tied]
    records = runs("vanilla", 0.5, [3.0, 2.0, 1.0], count=5) + tied
    assert report(records) == report(records[::-1])
    monkeypatch.setattr(report_module, "in_order", list)
    assert report(records) != report(records[::-1])
