from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import lorainit
from lorainit.adapters.origin import origin_of
from lorainit.adapters.targets import match_targets
from lorainit.errors import DataError, MissingStatisticError
from lorainit.report import Curve, read_curves, report
from lorainit.report.drawing import DRAWN_LAYERS, _scale, spectra
from lorainit.report.measure import _directions, _spectrum, measure_layer, place_of, spread
from lorainit.report.rate_curve import RateCurve, drawn, of_measured, read_rate_curves
from lorainit.report.sizes import sizes_of
from tests.adapters import tiny
from tests.statistics.test_convolutions import TARGETS, images, losses, network


@pytest.fixture(scope="module")
def statistics() -> lorainit.Statistics:
    torch.manual_seed(0)
    return lorainit.collect_statistics(
        tiny.llama(),
        tiny.config(),
        data=[tiny.batch(rows=12)],
        needs=lorainit.Natural.needs | lorainit.EVA().needs,
        progress=False,
    )


@pytest.fixture(scope="module")
def page(statistics: lorainit.Statistics, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "page.html"
    model = tiny.start(tiny.llama(), lorainit.Natural(), data=[tiny.batch(rows=12)])
    noisy = tuple((float(i), 4.0 - i / 100 + i % 3 / 5) for i in range(1, 101))
    curves = [
        Curve("natural", ((0.0, 4.0), (50.0, 3.4), (100.0, 3.0)), held_out=True),
        Curve("natural", noisy),
        Curve("<b>vanilla</b>", ((0.0, 4.2), (100.0, 3.1)), held_out=True),
    ]
    report(model, tiny.config(), statistics, file, curves=curves, progress=False)
    return file


class Balanced(HTMLParser):
    VOID = frozenset({"meta", "rect", "line", "polyline", "circle", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_whole_and_asks_nothing_of_the_network(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"https?://|<script|<link|@import|url\(|src=", text)
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text.lower())
    assert "model.layers.1.mlp.down_proj" in text
    assert text.count("<polyline") > 3
    assert "r = 4" in text
    assert "&lt;b&gt;vanilla" in text
    assert text.count('class="line c0"') == 2  # held out, and the mean of the noisy one
    assert text.count('class="line c0 noise"') == 1


def test_the_loss_at_the_start_is_the_measured_one(
    page: Path, statistics: lorainit.Statistics
) -> None:
    """Natural writes what it measured into the adapter's origin, and the page shows it."""
    model = tiny.start(tiny.llama(), lorainit.Natural(), data=[tiny.batch(rows=12)])
    measured = origin_of(model, "default").measured
    assert measured["start_loss"] < measured["base_loss"]
    text = page.read_text(encoding="utf-8")
    assert f"<td>{measured['base_loss']:.4f}</td>" in text
    assert f"<td>{measured['start_loss']:.4f}</td>" in text


def test_without_statistics_there_is_what_the_adapter_says(
    page: Path, statistics: lorainit.Statistics, tmp_path: Path
) -> None:
    model = tiny.start(tiny.llama(), lorainit.Natural(), data=[tiny.batch(rows=12)])
    said = report(model, tiny.config(), None, tmp_path / "p.html", progress=False)
    whole = report(model, tiny.config(), statistics, tmp_path / "w.html", progress=False)
    bare, text = ((tmp_path / f"{n}.html").read_text(encoding="utf-8") for n in ("p", "w"))
    assert [said[0], said[2]] == [whole[0], whole[2]]  # rate and method; the rank wants statistics
    assert said[1] != whole[1]
    titles = [re.findall(r"<h2>(.*?)</h2>", found) for found in (bare, text)]
    assert titles[0] == ["The loss at the start", "How far the adapter goes", "Every layer"]
    assert set(titles[0]) < set(titles[1])
    parser = Balanced()
    parser.feed(bare)
    assert parser.open == []
    with pytest.raises(MissingStatisticError, match="give statistics"):
        report(
            model, tiny.config(), None, tmp_path / "p.html",
            reference_weights=tiny.llama(), progress=False,
        )  # fmt: skip


def test_the_origin_keeps_what_was_measured(tmp_path: Path) -> None:
    model = tiny.start(tiny.llama(), lorainit.Natural(), data=[tiny.batch(rows=12)])
    model.save_pretrained(tmp_path)
    again = lorainit.load_adapter(tiny.llama(), tmp_path)
    assert origin_of(again, "default").measured == origin_of(model, "default").measured != {}


def test_curves_of_a_trainer_and_of_a_comparison(tmp_path: Path) -> None:
    log = [
        {"step": 10, "loss": 3.0, "learning_rate": 1e-4},
        {"step": 10, "eval_loss": 3.2},
        {"step": 20, "loss": float("nan")},
        {"step": 30, "loss": 2.0},
        {"step": 30, "train_runtime": 4.0, "train_loss": 2.5},
    ]
    for step, kept in ((20, log[:3]), (30, log)):
        folder = tmp_path / "mine" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": kept}))
    trained, held = read_curves(tmp_path / "mine")
    assert trained == Curve("mine", ((10.0, 3.0), (30.0, 2.0)))
    assert held == Curve("mine", ((10.0, 3.2),), held_out=True)
    best = {"rate": 1e-3, "curve": [[0, 4.0], [5, 3.0]], "train_losses": [4.0, 3.5]}
    (tmp_path / "c.json").write_text(json.dumps({"best": {"eva": best}}))
    held, trained = read_curves(tmp_path / "c.json")
    assert held == Curve("eva, 0.001", ((0.0, 4.0), (5.0, 3.0)), held_out=True)
    assert trained.points == ((1.0, 4.0), (2.0, 3.5))


@pytest.mark.parametrize("content", ["{", "[]", '{"log_history": []}', "{}"])
def test_files_without_curves_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(DataError, match=r"c\.json"):
        read_curves(tmp_path / "c.json")
    with pytest.raises(DataError, match="no learning curve"):
        read_curves(tmp_path / "none")


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.01, 0.02], [3.0, 2.5, 1e4], [-1.0, 1.0], [0.0, 0.0]]
)
def test_axes_hold_their_values(values: list[float]) -> None:
    low, high, ticks = _scale(values)
    assert low <= min(values) < high
    assert low == ticks[0]
    assert high == ticks[-1]
    assert 2 <= len(ticks) <= 8
    if max(values) < 100:
        assert high >= max(values)


def test_numbers_against_their_definitions(statistics: lorainit.Statistics) -> None:
    from lorainit.adapters.targets import match_targets

    name = "model.layers.0.self_attn.q_proj"
    target = match_targets(tiny.llama(), tiny.config()).layers[name]
    layer = statistics[name]
    methods = {"natural": lorainit.Natural(), "again": lorainit.Natural(), "eva": lorainit.EVA()}
    found = measure_layer(target, layer, methods)
    gradient = layer.gradient.double()
    assert found.energy == pytest.approx(float((gradient**2).sum()), rel=1e-6)
    values = torch.linalg.eigvalsh(layer.input_second_moment.double()).flip(0)
    assert found.input_spectrum == pytest.approx((values / values.sum()).tolist(), abs=1e-9)
    x, y = layer.input_second_moment.double(), layer.output_second_moment.double()
    roots = []
    for moment in (y, x):
        damping = 0.1 * moment.diagonal().mean()
        w, v = torch.linalg.eigh(moment + damping * torch.eye(len(moment)))
        roots.append(v @ torch.diag(w**-0.5) @ v.mT)
    singular = torch.linalg.svdvals(roots[0] @ gradient @ roots[1]) ** 2
    assert found.kept == pytest.approx(float(singular[:4].sum() / singular.sum()), rel=1e-4)
    assert found.overlap["natural", "again"] == pytest.approx(1.0, abs=1e-6)
    assert 0 <= found.overlap["natural", "eva"] < 0.99


def test_leading_eigenvalues_of_a_large_matrix() -> None:
    """Above the dense size they are iterated, over the trace of all."""
    n = 1100
    basis = torch.linalg.qr(
        torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    values = torch.arange(1, n + 1, dtype=torch.float64) ** -1.5
    matrix = (basis * values) @ basis.mT
    assert _spectrum(matrix, 20) == pytest.approx((values[:20] / values.sum()).tolist(), rel=1e-6)
    assert _directions(matrix) == pytest.approx(float(values.sum() ** 2 / values.square().sum()))


def test_a_rank_that_no_layer_can_have(statistics: lorainit.Statistics, tmp_path: Path) -> None:
    with pytest.raises(lorainit.errors.RankError, match="Lower r"):
        report(tiny.llama(), tiny.config(r=999), statistics, tmp_path / "a.html", progress=False)


def test_sizes_are_of_the_product() -> None:
    model = tiny.start(tiny.llama(), lorainit.LoraOne())
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_base_model().get_submodule(name)
    product = layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    expected = float(product.detach().norm() / layer.base_layer.weight.norm())
    assert sizes_of(model)[name] == pytest.approx(expected, rel=1e-4)


def test_sizes_and_few_sequences_follow_the_advice(
    statistics: lorainit.Statistics, tmp_path: Path
) -> None:
    rest = (tiny.config(), statistics, tmp_path / "a.html")
    long = tiny.start(tiny.llama(), lorainit.LoraOne(gamma=1.0))
    said = report(long, *rest, progress=False)
    words = " ".join(text for kind, text in said[3:] if kind == "warn")
    assert "Only 12 sequences" in words
    assert "long first step" in words
    anchored = report(tiny.start(tiny.llama(), lorainit.PiSSA()), *rest, progress=False)
    assert "long first step" not in " ".join(text for _, text in anchored)


def test_statistics_of_inputs_alone_are_enough(tmp_path: Path) -> None:
    found = lorainit.collect_statistics(
        tiny.llama(), tiny.config(), data=[tiny.batch()], needs=lorainit.EVA().needs, progress=False
    )
    report(tiny.llama(), tiny.config(), found, tmp_path / "a.html", progress=False)
    assert "hold no gradient" in (tmp_path / "a.html").read_text()


def test_layers_compared_are_spread_over_the_depth() -> None:
    from lorainit.adapters.targets import match_targets

    layers = list(match_targets(tiny.llama(), tiny.config()).layers.values())
    (first, *_) = layers
    deep = [
        replace(first, spec=replace(first.spec, name=f"model.layers.{i}.mlp.{kind}"))
        for i in range(30)
        for kind in ("up", "down")
    ]
    names = spread(deep, 4)
    assert {int(name.split(".")[2]) for name in names} == {0, 10, 19, 29}
    assert len(names) == 8
    assert spread(layers, 4) == {target.name for target in layers}


def test_spectra_of_many_layers_are_drawn_from_all_depths() -> None:
    """A deep stack is thinned out evenly, and the median is of all of it."""
    lines = [[0.5 + i / 1000, 0.01] for i in range(210)]
    drawn = re.findall(r'class="(faint|strong)" points="(\S+)', spectra(lines, 1, "shares"))
    heights = [float(place.split(",")[1]) for kind, place in drawn if kind == "faint"]
    assert len(heights) == DRAWN_LAYERS
    whole = [spectra([line], 1, "shares") for line in (lines[0], lines[-1], lines[105])]
    ends = [float(re.search(r'"faint" points="\S+?,([\d.]+)', one)[1]) for one in whole]
    assert heights[0] == ends[0]
    assert heights[-1] == pytest.approx(ends[1], abs=0.3)
    (middle,) = [float(place.split(",")[1]) for kind, place in drawn if kind == "strong"]
    assert middle == pytest.approx(ends[2], abs=0.11)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", (3, "up_proj")),
        ("transformer.h.0.attn.c_attn", (0, "c_attn")),
        ("encoder.layer.2.attention.output.dense", (2, "output.dense")),
        ("classifier", (None, "classifier")),
    ],
)
def test_places(name: str, place: tuple[int | None, str]) -> None:
    assert place_of(name) == place


BROWSER = next(
    (b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), ""
)


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_browser_draws_it(page: Path, look: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    shot = tmp_path / "shot.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={'500,3600' if look == 'phone' else '1100,2400'}"]
    command += ["--blink-settings=preferredColorScheme=0"] if look == "dark" else []
    command += [f"--user-data-dir={tmp_path}/profile", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    drawn = image.open(shot).convert("RGB")
    corner = sum(drawn.getpixel((2, 2)))
    assert corner < 150 if look == "dark" else corner > 700
    colours = drawn.getcolors(1 << 24)
    teal = sum(n for n, (r, g, b) in colours if g > r + 40 and b > r + 40)
    assert teal > 2000, "no heat map was drawn"


def on_a_phone(page: Path, folder: Path) -> tuple[float, float]:
    """Width that the page takes, and its smallest letters, in CSS pixels, in a frame of 360 of them."""
    frame = folder / "frame.html"
    frame.write_text(
        f'''<iframe id="f" src="{page.as_uri()}" style="width:360px;height:900px;border:0"></iframe>
<script>onload = () => {{
  const inner = document.getElementById("f").contentDocument, sizes = [];
  for (const t of inner.querySelectorAll("svg text"))
    sizes.push(t.getScreenCTM().a * parseFloat(inner.defaultView.getComputedStyle(t).fontSize));
  document.body.innerText = `wide ${{inner.documentElement.scrollWidth}} small ${{Math.min(...sizes)}}`;
}}</script>'''
    )
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        "--hide-scrollbars",
    ]
    command += ["--allow-file-access-from-files", f"--user-data-dir={folder}/profile"]
    done = subprocess.run(
        [*command, frame.as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    found = re.search(r"wide ([\d.]+) small ([\d.]+)", done.stdout)
    assert found is not None, done.stdout[-500:]
    return float(found[1]), float(found[2])


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_on_a_phone_nothing_is_wider_than_the_page_or_too_small(page: Path, tmp_path: Path) -> None:
    wide, small = on_a_phone(page, tmp_path)
    assert wide == 360
    assert small > 8
    spread_out = tmp_path / "spread.html"
    text = page.read_text(encoding="utf-8").replace("<main>", '<main><p style="width:500px">x</p>')
    spread_out.write_text(text.replace("font:11px", "font:8px"))
    wide, small = on_a_phone(spread_out, tmp_path)
    assert wide > 500
    assert small < 8


def test_a_page_of_convolutions_and_of_words(tmp_path: Path) -> None:
    needs = lorainit.Natural.needs | lorainit.EVA().needs
    config = tiny.config(target_modules=["embed_tokens", "q_proj"])
    data = [tiny.batch(rows=12)]
    words = lorainit.collect_statistics(
        tiny.llama(), config, data=data, needs=needs, progress=False
    )
    model = tiny.start(tiny.llama(), lorainit.LoraDA(), config, data=data)
    report(model, config, words, tmp_path / "words.html", progress=False)
    assert "embed_tokens" in (tmp_path / "words.html").read_text()
    layer = words["model.embed_tokens"]
    known: dict[int, tuple[list[float], float]] = {}
    target = match_targets(tiny.llama(), config).layers["model.embed_tokens"]
    found = measure_layer(target, layer, {}, spectra=known)
    dense = layer.input_second_moment.dense().double()  # type: ignore[attr-defined]
    assert found.directions == pytest.approx(_directions(dense))
    assert found.input_spectrum == pytest.approx(_spectrum(dense, len(found.input_spectrum)))
    # What is drawn is what the adapter adds to the weight that is looked up.
    size = sizes_of(model)["model.embed_tokens"]
    embedding = model.base_model.model.model.embed_tokens
    change = embedding.get_delta_weight("default")
    assert size == pytest.approx(float(change.norm() / embedding.weight.norm()), rel=1e-4)

    patches = LoraConfig(r=2, target_modules=TARGETS)
    found_patches = lorainit.collect_statistics(
        network(), patches, data=images(4, 4), needs=needs, loss_fn=losses, progress=False
    )
    started = lorainit.get_peft_model(
        network(),
        patches,
        method=lorainit.FILet(),
        data=images(4, 4),
        loss_fn=losses,
        progress=False,
    )
    report(started, patches, found_patches, tmp_path / "patches.html", progress=False)
    assert set(sizes_of(started)) == set(TARGETS)


def test_the_rate_curve_is_drawn_with_the_suggestion_on_it(tmp_path: Path) -> None:
    model = tiny.llama()
    data = [tiny.batch(rows=16)]
    started = lorainit.get_peft_model(
        model, tiny.config(), method=lorainit.Vanilla(), data=data, suggest_rate=True
    )
    origin = origin_of(started, "default")
    assert origin is not None
    curve = of_measured(origin.measured)
    assert curve is not None
    trials = origin.measured["learning_rate_trials"]
    assert curve.points == tuple(map(tuple, trials))
    assert curve.suggested is not None
    assert curve.suggested[0] == origin.measured["learning_rate"]
    statistics = lorainit.collect_statistics(
        tiny.llama(), tiny.config(), data=data, needs=lorainit.Natural.needs, progress=False
    )
    page = tmp_path / "rates.html"
    report(started, tiny.config(), statistics, page, progress=False)
    text = page.read_text()
    assert "The learning rate" in text
    assert 'class="range"' in text
    without = tmp_path / "without.html"
    report(tiny.llama(), tiny.config(), statistics, without, progress=False)
    assert "The learning rate</h2>" not in without.read_text()


def test_of_a_matched_adapter_the_curve_is_in_rates_of_the_adapter_as_it_is() -> None:
    origins = []
    for options in ({"suggest_rate": True}, {"learning_rate": 1e-5}):
        torch.manual_seed(0)
        started = lorainit.get_peft_model(
            tiny.llama(), tiny.config(), method=lorainit.Vanilla(), data=[tiny.batch(rows=16)], **options
        )  # fmt: skip
        origins.append(origin_of(started, "default"))
    known, matched = (of_measured(origin.measured) for origin in origins)
    assert known is not None
    assert matched is not None
    assert matched.suggested is not None
    assert matched.suggested[0] == 1e-5
    for (rate, loss), (other, same) in zip(matched.points, known.points, strict=True):
        assert (rate, loss) == (pytest.approx(other * origins[1].resized), same)


@pytest.mark.parametrize(
    "trials",
    [None, "1e-4", [[1e-4]], [[0.0, 1.0], [-1, 2.0]], [[1e-4, None], ["a", "b"]], 3, [1e-4]],
)
def test_trials_that_are_none_draw_nothing(trials: object) -> None:
    assert of_measured({"learning_rate": 1e-4, "learning_rate_trials": trials}) is None


def test_a_comparison_has_a_rate_curve_a_method(tmp_path: Path) -> None:
    runs = [{"rate": 1e-4, "loss": 2.0}, {"rate": 3e-4, "loss": 1.0}]
    content = {
        "best": {},
        "runs": {"natural": runs, "eva": runs[:1]},
        "suggested": {"natural": 3e-4},
    }
    content["suggested_range"] = {"natural": [2e-4, 5e-4]}
    (tmp_path / "table.json").write_text(json.dumps(content))
    (curve,) = read_rate_curves(tmp_path / "table.json")
    assert curve.points == ((1e-4, 2.0), (3e-4, 1.0))
    assert curve.suggested == (3e-4, 2e-4, 5e-4)
    (tmp_path / "other.json").write_text("[1]")
    assert read_rate_curves(tmp_path / "other.json") == []


def test_the_suggestion_stands_where_its_rate_is() -> None:
    """On a logarithmic axis from 1e-4 to 1e-2, 1e-3 is the middle; ends beyond the axis stand at its edges."""
    points = ((1e-4, 3.0), (1e-3, 1.0), (1e-2, 2.0))
    figure = drawn([RateCurve("x", points, (1e-3, 10**-3.5, 1.0))])
    tried = [float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)"', figure)]
    (mark,) = (float(x) for x in re.findall(r'<line class="rank" x1="([\d.]+)"', figure))
    ((left, width),) = re.findall(r'<rect class="range" x="([\d.]+)"[^>]* width="([\d.]+)"', figure)
    assert mark == pytest.approx(tried[1]) == pytest.approx((tried[0] + tried[2]) / 2, abs=0.1)
    assert float(left) == pytest.approx((3 * tried[0] + tried[2]) / 4, abs=0.1)
    assert float(left) + float(width) == pytest.approx(tried[2], abs=0.1)
    assert re.findall(r">rate ([^<]+)<", figure) == ["0.0001"]
    unmarked = drawn([RateCurve("x", points)])
    assert 'class="range"' not in unmarked
    assert 'class="rank"' not in unmarked
