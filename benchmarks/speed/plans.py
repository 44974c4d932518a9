"""What is measured on which device, most decisive first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.common.decoder import Case

BLOCKS = {4: "7 GiB", 8: "9 GiB", 16: "14 GiB"}
"""Decoder layers, and a budget within which their sums are taken block by block."""


def big_plan(
    shape: str = "llama-2-7b",
    widths: Sequence[int] = (1024, 2048, 4096, 8192),
    quantized: str = "llama-2-70b, 4 bits",
) -> list[Case]:
    """The plan for an accelerator."""
    base = Case("", "", shape)
    small = replace(base, sequences=64, tokens=256)
    one = replace(small, layers=1)
    peers = replace(base, sequences=64, zipf=True)
    single = replace(base, sequences=64, batch=1)
    grown = [
        replace(
            base, name=f"{what}, width {n}", kind=kind, shape=f"width {n}", sequences=64, limit=40
        )
        for n in widths
        for what, kind in (("floor", "floor"), ("LoRA-DA", "start"))
    ]
    middle = replace(base, shape=f"width {widths[-2]}", limit=40)
    tight = replace(base, kind="start", sequences=64, limit=120, options={"max_memory": "24 GiB"})
    # A budget that holds the weights and one block's sums, not those of all.
    longer = [
        replace(case, name=f"{case.name}, {layers} blocks", layers=layers)
        for layers, size in BLOCKS.items()
        for case in (
            replace(base, name="floor", kind="floor", sequences=64),
            replace(tight, name="LoRA-DA within a budget", options={"max_memory": size}),
        )
    ]
    return [
        replace(base, name="floor", kind="floor"),
        replace(base, name="LoRA-DA", kind="start", limit=90),
        replace(base, name="full Sy", kind="full", method="natural", limit=110),
        replace(base, name="Auto", kind="start", method="auto", limit=120),
        *(
            replace(base, name=f"solve {m}, synthetic", kind="solve", method=m, limit=30)
            for m in ("lora_da", "filet", "natural")
        ),
        replace(small, name="floor, 64 x 256", kind="floor"),
        replace(small, name="LoRA-DA, 64 x 256", kind="start"),
        replace(small, name="LoRA-DA, 64 x 256, Zipf", kind="start", zipf=True),
        # A process's first solves load the device's libraries: measured first above, and here after others.
        replace(base, name="LoRA-DA, after others", kind="start", limit=90),
        replace(small, name="LoRA-DA, 64 x 256, after others", kind="start"),
        replace(one, name="profile floor", kind="profile_floor", layers=4),
        replace(one, name="profile LoRA-DA", kind="profile", layers=4),
        replace(one, name="profile Natural", kind="profile", method="natural", layers=4),
        replace(one, name="profile FILet", kind="profile", method="filet", layers=4),
        replace(one, name="objective", kind="objective"),
        replace(base, name="floor, 64 x 512", kind="floor", sequences=64),
        *(
            replace(
                tight, name=f"{name} within {size}", method=method, options={"max_memory": size}
            )
            for size in ("24 GiB", "30 GiB")
            for name, method in (("LoRA-DA", "lora_da"), ("FILet", "filet"), ("Auto", "auto"))
        ),
        replace(tight, name="LoRA-DA within 24 GiB, after others"),
        replace(tight, name="LoRA-DA, 64 x 512", options={}),
        replace(tight, name="factors within 24 GiB", kind="budget"),
        *(
            replace(
                tight,
                name=f"{name} within 8 GiB, weights on the host",
                method=method,
                batch=32,
                offloaded=True,
                options={"max_memory": "8 GiB"},
            )
            for name, method in (("LoRA-DA", "lora_da"), ("Auto", "auto"))
        ),
        *(
            replace(
                small,
                name=f"{name} within {size}, 70B in 4 bits",
                kind="start",
                method=method,
                shape=quantized,
                limit=600,
                options={"max_memory": size},
            )
            for name, method, size in (
                ("Auto", "auto", "78 GiB"),
                ("LoRA-DA", "lora_da", "46 GiB"),
                ("Auto", "auto", "46 GiB"),
            )
        ),
        # 70B's blocks are alike: a quarter of them, beside as much room as 80 leave of 58 GiB.
        replace(
            small,
            name="LoRA-DA within 31 GiB, 20 blocks of 70B in 4 bits",
            kind="start",
            shape=quantized,
            layers=20,
            limit=180,
            options={"max_memory": "31 GiB"},
        ),
        *(
            replace(
                tight,
                name=f"{name}, 7B in 4 bits",
                kind="quantized_start",
                method=method,
                options={},
            )
            for name, method in (("QERA", "qera"), ("Auto, giving back", "giving_back"))
        ),
        replace(small, name="share", kind="share", batch=32),
        replace(peers, name="PEFT LoRA-GA", kind="peft_lora_ga"),
        replace(peers, name="LoRA-GA", kind="start", method="lora_ga"),
        replace(
            peers,
            name="LoRA-GA, PEFT's memory",
            kind="start",
            method="lora_ga",
            cap_of="PEFT LoRA-GA",
        ),
        replace(
            peers,
            name="LoRA-GA, PEFT's memory and sums",
            kind="start",
            method="lora_ga",
            cap_of="PEFT LoRA-GA",
            options={"gradient_dtype": "bfloat16"},
        ),
        replace(peers, name="PEFT CorDA", kind="peft_corda", layers=1, batch=1),
        replace(peers, name="CorDA", kind="start", method="corda"),
        replace(
            peers, name="CorDA, PEFT's memory", kind="start", method="corda", cap_of="PEFT CorDA"
        ),
        replace(peers, name="PEFT EVA", kind="peft_eva", layers=1, limit=75),
        replace(peers, name="EVA", kind="start", method="eva"),
        replace(
            peers,
            name="EVA, PEFT's memory",
            kind="start",
            method="eva",
            cap_of="PEFT EVA",
            limit=150,
        ),
        replace(single, name="floor, batch 1", kind="floor"),
        replace(single, name="LoRA-DA, batch 1", kind="start"),
        replace(one, name="precision", kind="precision"),
        replace(middle, name="floor, tokens x 4", kind="floor"),
        replace(middle, name="LoRA-DA, tokens x 4", kind="start"),
        *grown,
        *longer,
        replace(
            middle, name="ranks", kind="ranks", sequences=64, options={"ranks": [8, 32, 128, 256]}
        ),
        replace(base, name="operations", kind="operations", limit=30),
    ]


def processor_plan() -> list[Case]:
    """The plan for a CPU."""
    small = Case("", "", "smollm2-135m", sequences=64, tokens=128, limit=1800)
    return [
        replace(small, name="floor, CPU", kind="floor"),
        replace(small, name="pass LoRA-DA, CPU", kind="pass"),
        replace(small, name="pass full Sy, CPU", kind="pass", method="natural"),
        replace(small, name="LoRA-DA, CPU", kind="start"),
        replace(small, name="Auto, CPU", kind="start", method="auto"),
        replace(small, name="share, CPU", kind="share"),
    ]


def tiny_plan() -> list[Case]:
    """Every case of the large plan at sizes that a CPU runs in seconds."""
    cases = []
    for case in big_plan("tiny", (32, 64, 32, 64)[:2], "tiny, 4 bits"):
        options = dict(case.options)
        if "ranks" in options:
            options["ranks"] = [2, 4]
        if "max_memory" in options:
            options["max_memory"] = "1GiB"
        cases.append(
            replace(
                case,
                sequences=8,
                tokens=16,
                batch=min(case.batch, 4),
                layers=min(case.layers, 2),
                rank=2,
                limit=60,
                options=options,
            )
        )
    return cases
