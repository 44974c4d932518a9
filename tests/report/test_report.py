from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import lorainit
from lorainit.report import report
from lorainit.report.measure import measure_layer, place_of
from lorainit.report.sizes import sizes_of
from tests.adapters import tiny


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
    model = tiny.start(tiny.llama(), lorainit.LoraDA())
    report(
        model, tiny.config(), statistics, file, sizes=sizes_of(model), progress=False
    )  # fmt: skip
    return file


class Balanced(HTMLParser):
    VOID = frozenset({"meta", "rect", "line", "polyline", "br"})

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


def test_sizes_are_of_the_product() -> None:
    model = tiny.start(tiny.llama(), lorainit.LoraOne())
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_base_model().get_submodule(name)
    product = layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    expected = float(product.detach().norm() / layer.base_layer.weight.norm())
    assert sizes_of(model)[name] == pytest.approx(expected, rel=1e-4)


def test_advice_names_few_sequences_and_long_starts(
    statistics: lorainit.Statistics, tmp_path: Path
) -> None:
    sizes = dict.fromkeys(statistics, 0.9)
    arguments = (tiny.llama(), tiny.config(), statistics, tmp_path / "a.html")
    said = report(*arguments, sizes=sizes, progress=False)
    words = " ".join(text for kind, text in said if kind == "warn")
    assert "Only 12 sequences" in words
    assert "long first step" in words
    anchored = report(*arguments, sizes=sizes, anchored=True, progress=False)
    assert "long first step" not in " ".join(text for _, text in anchored)


def test_statistics_of_inputs_alone_are_enough(tmp_path: Path) -> None:
    found = lorainit.collect_statistics(
        tiny.llama(), tiny.config(), data=[tiny.batch()], needs=lorainit.EVA().needs, progress=False
    )
    report(tiny.llama(), tiny.config(), found, tmp_path / "a.html", progress=False)
    assert "hold no gradient" in (tmp_path / "a.html").read_text()


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
    command += [f"--window-size={'500' if look == 'phone' else '1100'},1400"]
    command += ["--blink-settings=preferredColorScheme=0"] if look == "dark" else []
    command += [f"--user-data-dir={tmp_path}/profile", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    drawn = image.open(shot).convert("RGB")
    corner = sum(drawn.getpixel((2, 2)))
    assert corner < 150 if look == "dark" else corner > 700
    colours = drawn.getcolors(1 << 24)
    teal = sum(n for n, (r, g, b) in colours if g > r + 40 and b > r + 40)
    assert teal > 2000, "no heat map was drawn"
