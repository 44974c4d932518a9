"""The harness end to end on a tiny model: records, resuming, failures, time limit, merging."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from benchmarks.common.cache import REPOSITORY
from benchmarks.quality.analyze import PICTURE
from benchmarks.quality.bench import Bench
from benchmarks.quality.data.order import batch_order, training_rows
from benchmarks.quality.experiment import Experiment, curve_steps, percent_steps
from benchmarks.quality.models.loading import round_base
from benchmarks.quality.records import done_in, keep, read_records
from benchmarks.quality.stages import best_rates, parse_method, search, seeds, suggested
from benchmarks.quality.time_limit import Clock, OutOfTime

from tests.benchmarks.test_quality_trainer import PAD, base_model, examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared task."""
    folder = tmp_path_factory.mktemp("data")
    arrays = {"slots": np.array(4)}
    for i, (split, size) in enumerate((("train", 64), ("validation", 24), ("test", 24))):
        found = examples(size, i)
        tokens = np.full((size, 16), PAD, dtype=np.uint16)
        for row, example in enumerate(found):
            tokens[row, : len(example)] = example.input_ids
        arrays[f"{split}_tokens"] = tokens
        arrays[f"{split}_lengths"] = np.array([len(e) for e in found], dtype=np.uint16)
        arrays[f"{split}_prompts"] = np.array([e.prompt_length for e in found], dtype=np.uint16)
    np.savez_compressed(folder / "tiny.npz", **arrays)
    return folder


SMALL = {"rank": 2, "steps": 6, "batch_size": 4, "train_samples": 32, "statistics_samples": 16}


def bench(folder, out, **arguments):
    return Bench(
        base_model(), folder, out, "search", stack=4, evaluation_rows=16, commit="none", **arguments
    )


def test_a_stage_is_recorded_resumed_and_merged(folder, tmp_path):
    methods = ["vanilla", "pissa", "natural", "lora-ga:gamma=4.0"]
    experiments = search(methods, ["tiny"], (1e-3, 1e-2), precision="fp32", **SMALL)
    before = [p.clone() for p in base_model().parameters()]
    one = bench(folder, tmp_path)
    assert one.run(experiments[:3], set()) == 3
    assert one.run(experiments, set(read_records([tmp_path]))) == 5
    for ours, theirs in zip(one.model.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)
    records = read_records([tmp_path])
    assert set(records) == {e.id for e in experiments}
    record = records[experiments[4].id]
    for key in ("method", "task", "seed", "learning_rate", "rank", "versions", "commit", "device"):
        assert key in record
    assert len(record["train_loss"]) == 6
    assert record["heldout"]["steps"] == percent_steps(6)
    assert set(record["heldout_at_percent"]) == {"0", "1", "2", "5", "10", "25", "50", "100"}
    assert record["init_seconds"] > 0
    assert Experiment.from_json(record["experiment"]).id == record["id"]
    # Kept in two calls, the second with one record again.
    every = list(records.values())
    keep(tmp_path / "merged", every[:3])
    keep(tmp_path / "merged", every[2:])
    # The training loss of every step is in no table, and is not kept.
    kept = {key: {k: v for k, v in r.items() if k != "train_loss"} for key, r in records.items()}
    assert read_records([tmp_path / "merged"]) == kept
    (file,) = (tmp_path / "merged" / "records").iterdir()
    assert file.name == "search-smollm2-135m-instruct.jsonl"
    assert len(file.read_text().splitlines()) == len(records)
    # The same experiment in another stage is a second record, and is not taken for done there.
    again = every[0] | {"stage": "grid"}
    keep(tmp_path / "merged", [again])
    found = read_records([tmp_path / "merged"]).values()
    assert sorted(r["stage"] for r in found) == ["grid"] + ["search"] * len(every)
    assert done_in(found, "grid") == {again["id"]}
    assert done_in(found, "seeds") == {r["id"] for r in every}
    following = seeds(records.values(), methods, ["tiny"], [0, 1], rates=1, **SMALL)
    assert len(following) == 8


def test_runs_alone_and_in_a_stack_agree(folder, tmp_path):
    experiments = search(
        ["vanilla", "orthogonal"], ["tiny"], (1e-3, 1e-2), precision="fp32", **SMALL
    )
    bench(folder, tmp_path / "together").run(experiments, set())
    together = read_records([tmp_path / "together"])
    bench(folder, tmp_path / "alone").run(experiments[2:3], set())
    (alone,) = read_records([tmp_path / "alone"]).values()
    a, b = (r["test"]["loss"] for r in (alone, together[alone["id"]]))
    assert a == pytest.approx(b, rel=1e-4)


def test_failures_stand_apart_and_time_ends_cleanly(folder, tmp_path):
    too_little = Experiment("tiny", "loram", 1e-3, **(SMALL | {"rank": 1}))
    fine = Experiment("tiny", "vanilla", 1e-3, precision="fp32", **SMALL)
    assert bench(folder, tmp_path).run([too_little, fine], set()) == 1
    assert set(read_records([tmp_path])) == {fine.id}
    (failure,) = read_records([tmp_path], "failures").values()
    assert failure["id"] == too_little.id
    assert "RankError" in failure["error"]
    assert 'File "src/lorainit/' in failure["traceback"]
    assert str(REPOSITORY) not in failure["traceback"]
    with pytest.raises(OutOfTime):
        bench(folder, tmp_path, clock=Clock(0.0)).run([fine.at(seed=1)], set())


def test_the_prompts_style_is_the_datas(folder, tmp_path):
    chat = Experiment("tiny", "vanilla", 1e-3, style="chat", **SMALL)
    assert chat.id != chat.at(style="plain").id
    with pytest.raises(ValueError, match="--set style=plain"):
        bench(folder, tmp_path).run([chat], set())


def test_an_experiments_name_is_its_content():
    one = Experiment("chain_sum", "natural", 1e-3, settings={"damping": 0.1})
    assert one.id == Experiment.from_json(json.loads(json.dumps(one.to_json()))).id
    assert one.id != one.at(seed=1).id
    assert one.label == "natural(damping=0.1)"
    assert parse_method("lora-da:paper=true;beta=0.1") == ("lora-da", {"paper": True, "beta": 0.1})


def test_the_best_rates_are_those_of_the_validation_split():
    records = [
        {
            "task": "t", "label": "m", "learning_rate": rate, "stage": "search",
            "experiment": {"rank": 8}, "validation": {"loss": loss, "exact": exact},
            "test": {"loss": rate, "exact": 1.0},
        }
        for rate, loss, exact in ((1e-3, 2.0, 0.1), (1e-2, 1.0, 0.2), (1e-1, None, None))
    ]  # fmt: skip
    assert best_rates(records, 2) == {("t", "m"): [1e-2, 1e-3]}


def test_statistics_are_drawn_from_what_is_trained_on():
    rows = training_rows(100, 40, seed=3)
    order = batch_order(100, 40, 3, steps=30, batch_size=4)
    assert torch.equal(order.reshape(-1)[:40], rows)
    for epoch in order.reshape(-1).split(40):
        assert set(epoch.tolist()) == set(rows.tolist())


def test_starts_are_scored_against_trained_lora(folder, tmp_path):
    from benchmarks.quality.data.files import load_pools
    from benchmarks.studies.untrained_starts.evaluations import StartBench
    from benchmarks.studies.untrained_starts.table import table

    done: dict = {}
    one = StartBench(bench(folder, tmp_path), load_pools("tiny", folder), done)
    small = SMALL | {"precision": "fp32"}
    del small["steps"]
    one.untrained("tiny", 0, ["lora-one", "pissa"], **small)
    one.trained("tiny", [0], [1e-3, 1e-2], steps=6, **small)
    one.matched("tiny", 0, "lora-one", [1e-3, 1e-2], **small)
    kinds = [r["kind"] for r in done.values()]
    assert sorted(kinds) == ["matched", "start", "start", "start", "trained", "trained"]
    base, pissa = (
        next(r for r in done.values() if r.get("label") == label) for label in ("vanilla", "pissa")
    )
    assert base["loss"] == pytest.approx(pissa["loss"], rel=1e-5)
    assert "lora-one" in table(done)
    assert set(read_records([tmp_path], "untrained_starts")) == set(done)


def test_what_was_not_searched_is_left_out_and_said():
    records = [
        {
            "task": "chain_sum", "label": label, "learning_rate": 1e-3, "stage": "search",
            "rank": 8, "validation": {"loss": loss, "exact": 0.1},
            "experiment": {"rank": 8, "style": style},
        }
        for label, loss, style in (("vanilla", 1.0, "plain"), ("eva", 0.1, "chat"))
    ]  # fmt: skip
    # What was searched with prompts of another style does not count either.
    with pytest.warns(UserWarning, match="'eva' on gsm_symbolic, 'eva' on chain_sum"):
        found = seeds(records, ["vanilla", "eva"], ["chain_sum", "gsm_symbolic"][::-1], [0, 1])
    assert [(e.task, e.method, e.seed) for e in found] == [
        ("chain_sum", "vanilla", 0),
        ("chain_sum", "vanilla", 1),
    ]
    with pytest.raises(ValueError, match="run the stage 'search'"):
        seeds(records, ["eva"], ["chain_sum"])


def test_the_commands_from_search_to_tables(folder, tmp_path, monkeypatch, capsys):
    """What is typed on an accelerator, stage by stage, on a tiny model."""
    from benchmarks.quality import __main__ as run
    from benchmarks.quality import analyze, merge

    monkeypatch.setattr(run, "load_model", lambda *_: round_base(base_model()))
    monkeypatch.setattr(run, "choose_device", lambda: torch.device("cpu"))

    def call(module, *arguments):
        monkeypatch.setattr("sys.argv", ["x", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    out, into = tmp_path / "out", tmp_path / "results"
    common = ["--data", folder, "--out", out, "--records", into, "--tasks", "tiny", "--set"]
    common += [f"{k}={v}" for k, v in SMALL.items()]
    short = [*common, "steps=4"]
    methods = ["vanilla", "eva", "filet", "lora-da:scale=calibrated", "natural:steps=2"]
    assert "30 to do" in call(run, "search", *short, "--methods", *methods, "--stack", 8)
    assert "0 to do" in call(run, "search", *short, "--methods", *methods)
    assert not read_records([out], "failures")
    assert "30 new records" in call(merge, out, "--into", into)
    assert "10 to do" in call(
        run, "seeds", *common, "--methods", *methods[:1], methods[4], "--seeds", 0, 1, 2, 3, 4,
        "--rates", 1,
    )  # fmt: skip
    assert "4 to do" in call(
        run, "sweep", *common, "--methods", *methods[:1], methods[4], "--seeds", 0, "--over",
        "rank", "--values", 1, 2, 4, "--rates", 1,
    )  # fmt: skip
    call(merge, out, "--into", into)
    published = PICTURE.read_bytes()
    text = call(analyze, "--records", into, "--out", tmp_path)
    assert (tmp_path / PICTURE.name).exists()
    assert PICTURE.read_bytes() == published
    assert "natural(steps=2)" in text
    assert "### Final score by rank" in text
    assert (tmp_path / "curves-smollm2-135m-instruct.png").exists()
    assert (tmp_path / "learning-rates-smollm2-135m-instruct.png").exists()
    assert not read_records([out], "failures")
    with pytest.raises(SystemExit, match="no such setting"):
        call(run, "search", *common, "ranks=3")


def test_what_is_measured_of_starts_is_recorded_once(folder, tmp_path, monkeypatch, capsys):
    """Suggestions, which the stage of their name then reads, and curves of first steps."""
    from benchmarks.quality import measured_starts, suggestions
    from benchmarks.studies import first_steps

    monkeypatch.setattr(measured_starts, "load_model", lambda *_: round_base(base_model()))
    monkeypatch.setattr(measured_starts, "choose_device", lambda: torch.device("cpu"))
    common = ["x", "--data", folder, "--out", tmp_path, "--records", tmp_path, "--tasks", "tiny"]
    common += ["--methods", "vanilla", "lora-da:scale=calibrated", "--set"]
    common += [f"{k}={v}" for k, v in SMALL.items()]
    for module, name in ((suggestions, "suggestions"), (first_steps, "first_steps")):
        monkeypatch.setattr("sys.argv", [*map(str, common)])
        module.main()
        assert "tiny vanilla" in capsys.readouterr().out
        found = read_records([tmp_path], name)
        assert {r["label"] for r in found.values()} == {"vanilla", "lora-da(scale=calibrated)"}
        module.main()
        assert "tiny vanilla" not in capsys.readouterr().out
        assert read_records([tmp_path], name) == found
    said = read_records([tmp_path], "suggestions").values()
    assert all("suggestion" in r or "refused" in r for r in said)
    curves = read_records([tmp_path], "first_steps").values()
    assert all(len(r["curves"]["apart"]) == 1 + len(r["rates"]) for r in curves)
    # Of the kept curves, by the package's four rates or by all of them.
    monkeypatch.setattr(first_steps, "CURVES", tmp_path)
    tried = {}
    for option in ((), ("--every-rate",)):
        out = tmp_path.parent / f"from_curves{len(option)}"
        monkeypatch.setattr("sys.argv", ["x", "--out", str(out), "--suggestions", *option])
        first_steps.main()
        (tried[option],) = {
            len({rate for rate, _ in r["suggestion"]["trials"]} & {*first_steps.RATES})
            for r in read_records([out], "suggestions").values()
            if r["label"] == "vanilla"
        }
    assert tried["--every-rate",] == len(first_steps.RATES) > tried[()]


def test_lines_at_the_rates_that_are_suggested_for_them():
    common = {"rank": 8, "style": "chat"}

    def said(method: str, value: float, seed: int = 0):
        line = Experiment("gcd", method, 1.0, seed=seed, **common)
        return {"experiment": line.to_json(), "seed": seed, "suggestion": {"value": value}}

    records = [said("vanilla", 7.7e-4, 1), said("vanilla", 1.234e-3), said("auto", 5.05e-4)]
    refused = Experiment("gcd", "pissa", 1.0, **common)
    records.append({"experiment": refused.to_json(), "seed": 0, "refused": "no rate"})
    found = suggested(records, ["vanilla", "auto"], ["gcd"], [0, 3], **common)
    assert [(e.method, e.learning_rate, e.seed) for e in found] == [
        ("vanilla", 1.2e-3, 0),
        ("vanilla", 1.2e-3, 3),
        ("auto", 5.1e-4, 0),
        ("auto", 5.1e-4, 3),
    ]
    with pytest.warns(UserWarning, match="no rate is suggested for 'pissa' on gcd"):
        assert len(suggested(records, ["auto", "pissa"], ["gcd"], [0], **common)) == 1
    # A rate is of a start, whatever the schedule of the run.
    (longer,) = suggested(records, ["auto"], ["gcd"], [0], warmup=0.1, **common)
    assert (longer.learning_rate, longer.warmup) == (5.1e-4, 0.1)
    # Of another rank nothing is known.
    with pytest.raises(ValueError, match=r"benchmarks\.quality\.suggestions first"):
        suggested(records, ["vanilla"], ["gcd"], [0], rank=32, style="chat")


def test_the_loss_after_the_first_step_is_taken():
    assert curve_steps(128)[:3] == [0, 1, 2]
    assert {0, 2, 7, 13, 32, 64, 128} <= set(curve_steps(128))
