"""``python -m benchmarks.demo``: what a start and its learning rate do on a real model, in a few minutes.

Plain LoRA at the common rate, 2e-4; plain LoRA and this package's default at the rates that it suggests;
a base in 4 bits with and without what quantization took given back. All are trained on the same problems
in the same order and scored on the same held-out ones; an adapter that was started here is saved and loaded
again with stock PEFT in another process. Finished parts are found again under ``outputs/demo``.

It is one seed on one small task: which method is best is the question of ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# DeepSpeed, where it is installed, is not used and need not look for a card.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Threads that wait a few microseconds and then sleep: nearly as quick on an idle machine as threads that
# spin, and quicker where other programs want the same cores (docs/performance.md). Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Optional packages tell of their own missing extensions at import; it is no news of this program.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from benchmarks.common.cache import REPOSITORY  # noqa: E402
from benchmarks.common.models import smollm2_folder  # noqa: E402
from benchmarks.demo import report  # noqa: E402
from benchmarks.demo.four_bits import run_four_bits  # noqa: E402
from benchmarks.demo.run import load_data, run_base, run_method  # noqa: E402
from benchmarks.demo.settings import Entry, Settings, entries, result_key  # noqa: E402

DEFAULT_METHODS = ("lora", "lora-suggested", "auto")

PASTE = """
    model = lorainit.get_peft_model(model, config, data=dataloader)  # any LoraConfig; an ordinary PeftModel
    rate = float(lorainit.suggest_learning_rate(model, dataloader))  # for AdamW, warmup and decay
    # a 4-bit base:  get_peft_model(..., method=lorainit.QERA(), reference_weights="FULL_PRECISION_FOLDER")
"""


class _ThroughTqdm(logging.Handler):
    """Log lines above the progress bars, not through them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"  {record.getMessage()}", file=sys.stderr)


def main() -> None:
    arguments = _parse()
    started = time.perf_counter()
    _quiet()
    settings = Settings(steps=arguments.steps)
    if arguments.smoke:
        settings = settings.smoke()
    known = entries()
    wanted = [known[name] for name in arguments.methods]
    kind = "demo-smoke" if arguments.smoke else "demo"
    folder = arguments.output or REPOSITORY / "outputs" / kind

    _say(
        f"SmolLM2-135M, task {settings.task}: {settings.steps} steps of {settings.batch_size} a line, "
        f"{torch.get_num_threads()} threads"
    )
    smollm2_folder()
    data = load_data(settings)
    fresh = arguments.fresh
    base = _cached(folder, settings, "base", lambda _: run_base(settings, data), fresh=fresh)
    results = [
        _cached(
            folder,
            settings,
            entry.name,
            lambda place, entry=entry: run_method(settings, entry, data, place),
            entry,
            fresh=fresh,
        )
        for entry in wanted
    ]
    four_bits = None
    if arguments.four_bits and importlib.util.find_spec("bitsandbytes") is None:
        _say("bitsandbytes is not installed: the 4-bit base is left out")
    elif arguments.four_bits:
        four_bits = _cached(
            folder, settings, "4-bit base", lambda _: run_four_bits(settings, data), fresh=fresh
        )

    report.write_json(folder / "results.json", settings, base, four_bits, results)
    report.plot(folder / "loss.png", settings, base, four_bits, results, known)
    text = report.table(settings, base, four_bits, results)
    report.write_text(folder / "table.md", text + "\n")
    if arguments.picture:
        shutil.copyfile(folder / "loss.png", arguments.picture)
    print(f"\n{text}\n")
    loaded = [result["reload"]["max_abs_diff"] for result in results if result["reload"]]
    if loaded:
        _say(
            f"Saved adapters on stock PEFT in another process: logits within {max(loaded):.1e} of the live "
            "models'; base weights unchanged bit for bit."
        )
    _say(
        f"Picture: {_shown(folder / 'loss.png')}; numbers: {_shown(folder / 'results.json')}; "
        f"{(time.perf_counter() - started) / 60:.1f} minutes. In your own program:"
    )
    print(PASTE)


def _cached(
    folder: Path,
    settings: Settings,
    name: str,
    make: Callable[[Path], dict[str, Any]],
    entry: Entry | None = None,
    *,
    fresh: bool,
) -> report.Result:
    """A finished result of the same settings and code, or a new one."""
    place = folder / f"{name.replace(' ', '-')}-{result_key(settings, entry)}"
    path = place / "result.json"
    if path.exists() and not fresh:
        _say(f"{name}: already done, read from {_shown(path)}")
        return json.loads(path.read_text(encoding="utf-8"))
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    _say(name)
    result = make(place)
    result["provenance"] = report.provenance()
    report.write_text(path, json.dumps(result, indent=1) + "\n")
    return result


def _parse() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="everything, tiny: a minute or two")
    parser.add_argument("--fresh", action="store_true", help="do not reuse finished results")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument(
        "--no-four-bits", dest="four_bits", action="store_false", help="leave the 4-bit base out"
    )
    parser.add_argument(
        "--methods",
        type=_names,
        default=DEFAULT_METHODS,
        help=f"comma-separated, of: {', '.join(entries())}",
    )
    parser.add_argument("--output", type=Path, help="folder (default: outputs/demo)")
    parser.add_argument("--picture", type=Path, help="copy the picture of the curves here too")
    return parser.parse_args()


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in entries()]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown) or 'nothing given'}; known: {', '.join(entries())}"
        )
    return names


def _quiet() -> None:
    """Show this program's lines and lorainit's, not every library's."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logger = logging.getLogger("lorainit")
    logger.setLevel(logging.INFO)
    logger.addHandler(_ThroughTqdm())
    logger.propagate = False


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _shown(path: Path) -> str:
    """A path as short as it can be said."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    main()
