"""What starts give back before training: rows, measures, one solve for all ranks, records, tables."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.quantized import bases, recover, recovery_tables, token_rows
from benchmarks.quantized.measures import (
    Distances,
    Predictions,
    along_directions,
    embeddings,
    with_directions,
)
from benchmarks.quantized.quantizers import quantize
from benchmarks.quantized.recover import METHODS, cut, lora
from benchmarks.quantized.recovery_tables import share_gone
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

import lorainit
from tests.adapters.tiny import VOCABULARY, batch, llama
from tests.benchmarks.tokenizer import ByteTokenizer

CPU = torch.device("cpu")


def bert(labels: int | None = None, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=128, num_labels=labels or 2, hidden_dropout_prob=0.1,
        )  # fmt: skip
        return (
            BertModel(config) if labels is None else BertForSequenceClassification(config)
        ).eval()


def sentences(count: int = 24, seed: int = 0) -> token_rows.TextPool:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 11, (count,), generator=generator)
    tokens = torch.randint(1, 300, (count, 10), generator=generator)
    tokens = tokens.masked_fill(torch.arange(10) >= lengths[:, None], 0)
    return token_rows.class_pool(tokens, lengths, (tokens[:, 0] > 150).long())


class FramedTokenizer(ByteTokenizer):
    """With a first and a last token, as an encoder's."""

    def __call__(
        self, text: str, add_special_tokens: bool = True, **_: Any
    ) -> dict[str, list[int]]:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [258, *ids, 259] if add_special_tokens else ids}


class PlainTokenizer(ByteTokenizer):
    def __call__(
        self, text: str, add_special_tokens: bool = True, **_: Any
    ) -> dict[str, list[int]]:
        return super().__call__(text)


@pytest.mark.parametrize(("tokenizer", "ends"), [(PlainTokenizer(), 0), (FramedTokenizer(), 2)])
def test_text_rows_are_pieces_of_the_manual_in_the_models_frame(
    tokenizer: Any, ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(chr(65 + i % 26) * 3 for i in range(200))
    monkeypatch.setattr(token_rows, "manual", lambda: text)
    rows = token_rows.text_rows(tokenizer, 5, 20)
    assert rows.shape == (5, 20)
    inside = rows[:, 1:-1] if ends else rows
    pieces = ["".join(chr(t - 2) for t in row) for row in inside.tolist()]
    width = 20 - ends
    assert [text.index(p) % width for p in pieces[:1]] == [0]
    assert pieces[0] == text[:width]
    last = len(text) // width - 1
    assert pieces[-1] == text[last * width : (last + 1) * width]
    if ends:
        assert rows[:, 0].tolist() == [258] * 5
        assert rows[:, -1].tolist() == [259] * 5
    with pytest.raises(ValueError, match="100 rows were asked for"):
        token_rows.text_rows(tokenizer, 100, 20)


def test_rows_of_a_file_are_the_rows_that_were_made(tmp_path: Path) -> None:
    """Text, a task's prompts and answers, sentences with classes; batches with the same labels."""
    pools = token_rows.language_rows(FramedTokenizer(), ["chain_sum"], 6, 32)
    pools["sentences"] = sentences()
    token_rows.write(pools, tmp_path / "rows.npz")
    found = token_rows.read(tmp_path / "rows.npz")
    assert list(found) == ["text", "chain_sum", "sentences"]
    for name, pool in pools.items():
        for mine, theirs in zip(
            pool.batches(range(6), 4), found[name].batches(range(6), 4), strict=True
        ):
            assert mine.keys() == theirs.keys()
            assert all(mine[key].equal(theirs[key]) for key in mine)
    text = found["text"].batches([0], 1)[0]
    assert text["labels"][0, 1:].equal(text["input_ids"][0, 1:])
    task = found["chain_sum"].batches([0], 1)[0]
    answer = task["labels"][0][task["labels"][0] != -100].tolist()
    assert answer[-1] == ByteTokenizer().eos_token_id
    assert all(chr(t - 2) in " -0123456789" for t in answer[:-1])
    # The model's first token stands before the prompt, and is not the answer's.
    assert task["input_ids"][0, 0] == 258


def test_rows_to_measure_on_are_others_from_the_whole_pool() -> None:
    pool = sentences(24)
    data, held = token_rows.divided(pool, 12, 6, 4)
    of = [
        torch.cat([b["labels"] * 0 + b["input_ids"][:, 0] for b in part]) for part in (data, held)
    ]
    assert [len(rows) for rows in of] == [12, 6]
    everything = pool.tokens[token_rows.evenly(24, 18)][:, 0].tolist()
    assert sorted([*of[0].tolist(), *of[1].tolist()]) == sorted(everything)
    assert of[1].tolist() == everything[2::3]


def test_predictions_are_kl_and_loss_by_their_definitions() -> None:
    full, other = llama(seed=0), llama(seed=1)
    rows = [batch(seed=1), batch(seed=2)]
    measure = Predictions(full, rows)
    assert measure(full)["kl"] == pytest.approx(0.0, abs=1e-7)
    kl, loss, count = 0.0, 0.0, 0
    for one in rows:
        inputs = {key: one[key] for key in ("input_ids", "attention_mask")}
        kept = one["labels"][:, 1:] != -100
        with torch.no_grad():
            p, q = (m(**inputs).logits[:, :-1][kept].double() for m in (full, other))
        kl += float(
            F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True)
        )
        loss += float(F.cross_entropy(q, one["labels"][:, 1:][kept], reduction="sum"))
        count += int(kept.sum())
    found = measure(other)
    assert found == pytest.approx({"kl": kl / count, "loss": loss / count}, rel=1e-5)
    assert found["kl"] > 1e-3


def test_a_classifier_is_measured_by_its_classes() -> None:
    full, other = bert(2), bert(2, seed=3)
    rows = sentences().batches(range(24), 8)
    found = Predictions(full, rows)(other)
    with torch.no_grad():
        logits = [
            torch.cat([m(**{k: v for k, v in r.items() if k != "labels"}).logits for r in rows])
            for m in (full, other)
        ]
    labels = torch.cat([r["labels"] for r in rows])
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits[1], labels)), rel=1e-5)
    p, q = (values.log_softmax(-1) for values in logits)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_distances_are_one_less_the_cosine_of_mean_embeddings() -> None:
    full, other = bert(), bert(seed=3)
    rows = sentences().batches(range(24), 8)
    measure = Distances(full, rows)
    assert measure(full)["distance"] == pytest.approx(0.0, abs=1e-12)
    expected = []
    for one in rows:
        pooled = []
        for model in (full, other):
            with torch.no_grad():
                found = model(one["input_ids"], attention_mask=one["attention_mask"])
            lengths = one["attention_mask"].sum(1).tolist()
            states = zip(found.last_hidden_state, lengths, strict=True)
            pooled.append(torch.stack([state[:n].mean(0) for state, n in states]))
        expected.append(1 - F.cosine_similarity(*pooled))
    distance = measure(other)["distance"]
    assert distance == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4)
    assert distance > 1e-3


def test_directions_see_the_curvature_of_the_distance() -> None:
    """``E[g g^T]`` over directions is ``J^T J``: twice the distance of a small step along it."""
    model = bert().double()
    one = sentences(3).batches(range(3), 3)[0]
    bias = model.encoder.layer[1].output.dense.bias

    def of(shift: Tensor) -> Tensor:
        moved = {"encoder.layer.1.output.dense.bias": bias.detach() + shift}

        class Moved(nn.Module):
            def forward(self, **inputs: Any) -> Any:
                return torch.func.functional_call(model, moved, kwargs=inputs)

        return embeddings(Moved(), one)

    step = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(of, torch.zeros(64, dtype=torch.float64))
    seen = with_directions([one], 64)[0]
    gradients = []
    for row in range(3):
        model.zero_grad()
        along_directions(model, seen | {"direction": seen["direction"].double()})[row].backward()
        gradients.append(bias.grad.clone())
        expected = seen["direction"][row].double() @ jacobian[row]
        torch.testing.assert_close(gradients[-1], expected)
    small = 1e-4 * step
    moved = (of(small) - of(0 * step)).square().sum(-1) / 2
    torch.testing.assert_close(moved, (jacobian @ small).square().sum(-1) / 2, rtol=1e-3, atol=0.0)
    draws = with_directions([one], 64)
    assert len(draws) == 2
    assert not draws[0]["direction"].equal(draws[1]["direction"])
    assert "labels" not in draws[0]


def test_a_head_is_fitted_to_its_one_minimum() -> None:
    rows = sentences(48).batches(range(48), 16)
    found = []
    for seed in (0, 1):
        model = bert(2)
        with torch.no_grad():
            model.classifier.weight.copy_(
                torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
            )
        before = copy.deepcopy(model.bert.state_dict())
        loss = bases.fit_head(model, rows)
        assert all(value.equal(before[name]) for name, value in model.bert.state_dict().items())
        found.append((loss, model.classifier.weight.clone()))
    assert found[0][0] < 0.69
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)
    # By the conditions of a minimum: the gradient of the loss is that of the decay.
    inputs = torch.cat(
        [model.bert(r["input_ids"], r["attention_mask"]).pooler_output for r in rows]
    )
    weight = model.classifier.weight.detach().clone().requires_grad_()
    logits = inputs.detach() @ weight.mT + model.classifier.bias.detach()
    F.cross_entropy(logits, torch.cat([r["labels"] for r in rows])).backward()
    torch.testing.assert_close(weight.grad, -2e-3 * weight.detach(), rtol=1e-2, atol=1e-5)


def products(model: Any) -> dict[str, Tensor]:
    """``s B A`` by layer."""
    return {
        name: module.get_delta_weight("default").clone()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


SHARED = "both sides, ranks shared"


@pytest.mark.parametrize("method", [name for name in METHODS if name != SHARED])
def test_the_first_terms_are_the_start_of_the_lower_rank(method: str) -> None:
    full = llama()
    found = {}
    for rank in (2, 8):
        base = copy.deepcopy(full)
        quantize(base, "nf4", lora(8))
        model = lorainit.get_peft_model(
            base,
            lora(rank),
            method=METHODS[method],
            data=[batch()],
            reference_weights=full,
            progress=False,
        )
        cut(model, 2)
        found[rank] = products(model)
        if rank == 8:
            cut(model, 1)
            found[1] = products(model)
    assert found[2].keys() == found[8].keys()
    for name, low in found[2].items():
        scale = float(low.norm())
        assert float((found[8][name] - low).norm()) < 2e-3 * scale
        assert float((found[1][name] - low).norm()) > 0.1 * scale


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run on a tiny model that is a row of the table."""
    full = llama()

    def case(split: bases.Split, data: str) -> bases.Case:
        batches, held = split.of(data)
        return bases.Case(full, batches, Predictions(full, held), {"target_modules": "all-linear"})

    monkeypatch.setitem(bases.BASES, "tiny", bases.Base("Tiny", PlainTokenizer, case, ("gcd",)))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (24, 12), generator=generator)
    lengths = torch.full((24,), 12)
    pools = {
        "text": token_rows.pool_of(tokens, lengths, torch.ones_like(lengths), 11),
        "gcd": token_rows.pool_of(tokens.flip(0), lengths, torch.full((24,), 9), 3),
    }
    token_rows.write(pools, tmp_path / "rows.npz")
    return [
        "--model", "tiny", "--rows-file", str(tmp_path / "rows.npz"), "--rows", "12", "--held-out", "12",
        "--batch", "4", "--device", "cpu", "--kinds", "nf4", "rtn2", "--ranks", "2", "4",
        "--output", str(tmp_path / "recovery-tiny.jsonl"),
    ]  # fmt: skip


def records(arguments: list[str]) -> list[dict[str, Any]]:
    path = Path(arguments[arguments.index("--output") + 1])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_records_every_start_once(tiny: list[str]) -> None:
    recover.main([*tiny, "--time-limit", "0"])
    with pytest.raises(FileNotFoundError):
        records(tiny)
    recover.main(tiny)
    first = records(tiny)
    # Two data sets and grids, each: nothing, LoftQ, and four methods with two models' statistics, two ranks.
    assert len(first) == 2 * 2 * (1 + 2 + 4 * 2 * 2)
    assert len({recovery_tables.key(r) for r in first}) == len(first)
    for record in first:
        assert record["full_loss"] > 0
        assert {"kl", "loss", "kl_before", "loss_before", "date", "revision", "device"} <= set(
            record
        )
        if record["rank"]:
            # Where ranks are shared out, the first terms of a higher rank are no start.
            top = record["rank"] if record["method"] == SHARED else 4
            assert record["s"] == pytest.approx(16 / top**0.5)
            assert record["solved_at_rank"] == top
            assert record["seconds"]["solve"] >= 0
    alike = ("data", "kind", "statistics", "rank")
    equal = {
        tuple(r[k] for k in alike): r["parameters"] for r in first if r["method"] == "both sides"
    }
    for record in (r for r in first if r["method"] == SHARED):
        # Less than a direction of the widest layer is left over.
        most = equal[tuple(record[k] for k in alike)]
        assert most - 80 < record["parameters"] <= most
    path = Path(tiny[-1])
    kept = path.read_text().splitlines()
    recover.main(tiny)
    assert path.read_text().splitlines() == kept
    # What is missing is made again, with the very figures.
    path.write_text("\n".join(kept[:-3]) + "\n")
    recover.main(tiny)
    again = {recovery_tables.key(r): r for r in records(tiny)}
    for record in first:
        found = again[recovery_tables.key(record)]
        assert found["kl"] == pytest.approx(record["kl"], rel=1e-4)


@pytest.mark.parametrize("of", ["quantized", "full"])
@pytest.mark.parametrize("method", ["QERA", SHARED])
def test_a_record_says_what_the_package_does(tiny: list[str], of: str, method: str) -> None:
    """Measured once more by hand, with the statistics of that model; those of the other differ."""
    recover.main(
        [*tiny, "--methods", method, "--statistics", of, "--data", "text", "--kinds", "rtn2"]
    )
    found = {r["rank"]: r for r in records(tiny)}
    full = llama()
    base = copy.deepcopy(full)
    quantize(base, "rtn2", lora(8))
    rows = token_rows.read(Path(tiny[3]))["text"]
    whole = list(range(24))
    measure = Predictions(full, rows.batches(whole[1::2], 12))
    assert found[0]["kl"] == pytest.approx(measure(base)["kl"], rel=1e-4)
    kl = {}
    for name, model in (("quantized", base), ("full", full)):
        statistics = lorainit.collect_statistics(
            model,
            lora(2),
            data=rows.batches(whole[::2], 3),
            needs=METHODS[method].needs,
            progress=False,
        )
        statistics = lorainit.Statistics(statistics, statistics.metadata)
        started = lorainit.get_peft_model(
            base, lora(2), method=METHODS[method], statistics=statistics, reference_weights=full,
            progress=False,
        )  # fmt: skip
        kl[name] = measure(started)["kl"]
        if name == of:
            parameters = sum(p.numel() for p in started.parameters() if p.requires_grad)
            assert found[2]["parameters"] == parameters
        base = started.unload()
    assert found[2]["kl"] == pytest.approx(kl.pop(of), rel=2e-3)
    assert found[2]["kl"] != pytest.approx(*kl.values(), rel=2e-3)


def test_an_encoder_has_two_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text by its embeddings, sentences by a fitted head; both give a start back more than nothing."""
    monkeypatch.setattr(bases, "load_minilm", lambda num_labels=None, **_: bert(num_labels))
    pools = {"text": sentences(24), "movies": sentences(24, 1), "movies+head": sentences(64, 2)}
    split = bases.Split(pools, 12, 12, 6, CPU)
    for data, name in (("text", "distance"), ("movies", "kl")):
        case = bases.encoder_case(split, data)
        assert case.measure(case.full)[name] == pytest.approx(0.0, abs=1e-7)
        trial = recover.Trial(case, recover.Rounded(case.full, lora(8, **case.adapter)), "rtn2")
        for of in ("quantized", "full"):
            for found in trial.line("both sides", of, [16], CPU):
                assert found[name] < trial.before[name]
        # What is measured does not read these, so they are not rounded.
        kept = "pooler.dense" if data == "text" else "classifier"
        for layer in (kept, "encoder.layer.0.output.dense"):
            prefix = "" if data == "text" or layer == "classifier" else "bert."
            full, rounded = (
                m.get_submodule(prefix + layer).weight for m in (case.full, trial.rounded.model)
            )
            assert full.equal(rounded) == (layer == kept)


def record(method: str, kl: float, loss: float, **changes: Any) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M", "data": "text", "kind": "nf4", "method": method, "statistics": "quantized",
        "rank": 8, "rows": 64, "held_out": 64, "length": 128, "kl": kl, "kl_before": 0.4, "loss": loss,
        "loss_before": 3.4, "full_loss": 3.0, **changes,
    }  # fmt: skip


def test_tables_say_what_share_is_gone_beside_the_aim() -> None:
    known = [
        record("LoftQ", 0.36, 3.38, statistics="none"),
        record("QERA", 0.1, 3.1),
        record("QERA", 0.2, 3.3, statistics="full"),
        record("QERA", 0.08, 3.1, data="gcd"),
        record("QERA", 0.2, 3.1, data="chain_sum"),
        record("QERA", 0.3, 3.1, rank=32),
        record("LoftQ", 0.2, 3.1, data="gcd", statistics="none"),
        record("LoftQ", 0.4, 3.1, data="chain_sum", statistics="none"),
        # Alone on its task: left out of the means.
        record("LoftQ", 0.0, 3.1, data="count_bits", statistics="none"),
    ]
    assert share_gone(known[1], "kl") == pytest.approx(0.75)
    lines = recovery_tables.recovered(known, [8]).splitlines()[2:]
    assert lines == ["| SmolLM2-135M | NF4, 8 | 0.4 / 0.4 | 10% / 5% |  | 75% / 75% |  | 55% |"]
    assert len(recovery_tables.recovered(known, [8, 32]).splitlines()) == 4
    assert recovery_tables.over_tasks(known, [8]).splitlines()[2:] == [
        "| SmolLM2-135M | NF4, 8 | 2 | 25% (0%) |  | 65% (50%) |  |"
    ]
    assert recovery_tables.by_statistics(known).splitlines()[2:] == [
        "| SmolLM2-135M | QERA | -25.0 (0 of 1) |  |  |  |  |"
    ]
    of_predictions = ("kl", "loss", "kl_before", "loss_before", "full_loss")
    distance = {k: v for k, v in known[1].items() if k not in of_predictions}
    distance |= {"model": "all-MiniLM-L6-v2", "kind": "hqq3"}
    distance |= {"distance": 0.01, "distance_before": 0.04}
    assert recovery_tables.recovered([distance], [8]).splitlines()[2:] == [
        "| all-MiniLM-L6-v2 | HQQ 3, 8 | 0.04 |  |  | 75% |  |  |"
    ]


def test_of_records_made_twice_the_newest_is_read(tmp_path: Path) -> None:
    old = record("LoftQ", 0.3, 3.3)
    del old["statistics"]
    new = record("LoftQ", 0.2, 3.2, statistics="none", date="2026-11-29")
    (tmp_path / "recovery.jsonl").write_text(json.dumps(new) + "\n")
    (tmp_path / "recovery-smollm2.jsonl").write_text(json.dumps(old) + "\n")
    assert [r["kl"] for r in recovery_tables.read(tmp_path)] == [0.2]
