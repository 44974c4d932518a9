"""PEFT's own tests with starts of this project in place of PEFT's, and what each further failure comes from.

    pip download peft==VERSION --no-binary :all: --no-deps     # its tests are in its source archive
    python -m tools.peft_suite --peft FOLDER [FILES] [--only EXPRESSION] [--records FOLDER]

FOLDER is an unpacked archive or a checkout of PEFT, of the installed version; nothing is fetched. The test
files are copied to a temporary folder and run once for each kind of `starts`: as they are, with anchored
starts, and with unanchored ones; then what failed with an anchored start alone is run with the two
controls. Such a failure is a rank written into the test (it fails at twice PEFT's own rank), other numbers
written into it (a plain adapter with the same numbers fails), an error of this project that names
a remedy, or ours. Models that the tests ask the hub for are made from their configurations (`hub`); a test that
needs more of the hub fails with PEFT's starts as well, and is left out. Counted are the tests that
made an adapter whose start was replaced.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.peft_suite import hub

FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_initialization",
    "test_lora_variants",
    "test_tuners_utils",
    "test_low_level_api",
    "test_target_parameters",
    "test_trainable_tokens",
    "test_mixed",
    "test_other",
    "test_helpers",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_loraplus",
    "test_lorafa",
    "test_lora_conversion",
    "test_lora_intruders",
    "test_torch_compile",
    "test_integrations",
    "test_vision_models",
)
ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.peft_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", default=[], help=f"of {', '.join(FILES)}; all")
    parser.add_argument("--peft", type=Path, required=True, help="an unpacked source of PEFT")
    parser.add_argument("--only", default="", help="pytest's -k")
    parser.add_argument("--records", type=Path, default=Path("outputs/peft_suite"))
    parser.add_argument("--anchored-alone", action="store_true", help="no unanchored starts")
    parser.add_argument("--again", action="store_true", help="run what is recorded anew")
    options = parser.parse_args()
    options.records.mkdir(parents=True, exist_ok=True)
    failed = hub.fill(options.records.resolve() / "hub")
    print("\n".join(f"not made: {line}" for line in failed), end="\n" * bool(failed))
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "tests").mkdir()
        for file in (options.peft / "tests").glob("*.py"):
            shutil.copy(file, place / "tests")
        (place / "tests" / "__init__.py").touch()
        (place / "pytest.ini").write_text("[pytest]\n")
        for name in options.files or FILES:
            tables[name] = _compare(name, place, options)
    print(f"PEFT {importlib.metadata.version('peft')}")
    _show(tables)
    return 1 if any(rows["ours"] for rows in tables.values()) else 0


def _compare(name: str, place: Path, options: Any) -> dict[str, dict[str, Any]]:
    """Of one file: outcomes by kind of start, and the tests whose failure is `ours` by the controls."""
    anchored = _run(name, "anchored", place, options)
    acted = {t for t, line in anchored.items() if line["started"]}
    stock = _run(name, "stock", place, options, acted)
    plain = {} if options.anchored_alone else _run(name, "unanchored", place, options, acted)
    good = {t for t in acted if stock.get(t, {}).get("outcome") == "passed"}
    only = {t for t in good if anchored[t]["outcome"] == "failed"}
    twice, same = (
        _run(name, kind, place, options, only) for kind in ("twice-the-rank", "same-numbers")
    )
    kinds: dict[str, Any] = {"rank": {}, "numbers": {}, "remedy": {}, "ours": {}}
    for test in sorted(only):
        if anchored[test]["message"].startswith("lorainit.errors."):
            kinds["remedy"][test] = anchored[test]
        elif twice.get(test, {}).get("outcome") == "failed":
            kinds["rank"][test] = anchored[test]
        elif same.get(test, {}).get("outcome") == "failed":
            kinds["numbers"][test] = anchored[test]
        else:
            kinds["ours"][test] = anchored[test]
    plainly = {t: plain[t] for t in good if plain.get(t, {}).get("outcome") == "failed"}
    refused = {t for t, line in anchored.items() if line["refused"]}
    return {
        "counts": {
            "tests": len(acted),
            "stock": len(good),
            "stock failed": sum(stock.get(t, {}).get("outcome") == "failed" for t in acted),
            "anchored": len(good) - len(only),
            "unanchored": "not run" if options.anchored_alone else len(good) - len(plainly),
            "refused": len(refused),
        },
        **kinds,
        "unanchored": plainly,
    }


def _run(
    name: str, kind: str, place: Path, options: Any, tests: set[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Outcomes by test, from the record where there is one."""
    record = options.records.resolve() / f"{name}.{kind}.jsonl"
    if tests is not None and not tests:
        return {}
    known = _read(record)
    if options.again or not known or not (tests or set()) <= known.keys():
        record.unlink(missing_ok=True)
        unfinished = record.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.peft_suite.plugin"]
        command += ["-p", "no:cacheprovider", "--no-header", "--tb=short", "--timeout=300"]
        selected = place / "selected.txt"
        if tests is None:
            selected.write_text(f"tests/{name}.py\n" + (f"-k\n{options.only}" * bool(options.only)))
        else:
            selected.write_text("\n".join(sorted(tests)))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "PEFT_SUITE_KIND": kind,
            "PEFT_SUITE_RECORD": str(unfinished),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(options.records.resolve() / "hub"),
            "OMP_NUM_THREADS": "1",
        }
        log = record.with_suffix(".log")
        with log.open("w") as out:
            subprocess.run(
                [*command, f"@{selected}"],
                cwd=place,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if not unfinished.is_file():
            end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
            raise SystemExit(f"{name}: no test was run; the end of {log}:\n{end}")
        unfinished.rename(record)
    return _read(record)


def _read(record: Path) -> dict[str, dict[str, Any]]:
    """The lines of a record by test; of a test with several, the one that is not passed."""
    found: dict[str, dict[str, Any]] = {}
    if record.is_file():
        for line in map(json.loads, record.read_text(encoding="utf-8").splitlines()):
            if found.get(line["test"], {}).get("outcome", "passed") == "passed":
                found[line["test"]] = line
    return found


def _show(tables: dict[str, dict[str, Any]]) -> None:
    heads = "file | tests | stock passed, failed | anchored | unanchored | refused"
    print(f"| {heads} | rank in the test | numbers in the test | error with a remedy | ours |")
    print("|---" * 10 + "|")
    for name, rows in tables.items():
        n = rows["counts"]
        cells = [name, n["tests"], f"{n['stock']}, {n['stock failed']}", n["anchored"]]
        cells += [n["unanchored"], n["refused"]]
        cells += [len(rows[kind]) for kind in ("rank", "numbers", "remedy", "ours")]
        print("| " + " | ".join(map(str, cells)) + " |")
    for name, rows in tables.items():
        for kind in ("ours", "remedy", "numbers", "rank", "unanchored"):
            for test, line in rows[kind].items():
                print(
                    f"{kind}: {name}: {test.partition('::')[2]}: {line['where']}: {line['message']}"
                )


if __name__ == "__main__":
    sys.exit(main())
