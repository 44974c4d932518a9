"""What each operation is on each kind of layer and of start: one table for tests and docs/adapters.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.adapters import operations as do
from tests.adapters import torch_operations as torches
from tests.adapters.operations import Operation
from tests.adapters.started import KINDS, RANK, STARTS


@dataclass(frozen=True)
class Exact:
    """The result is that of the dense weights in float64."""


@dataclass(frozen=True)
class AsPeft:
    """A plain adapter of PEFT's with the same numbers gives the same result, or the same error."""

    why: str


@dataclass(frozen=True)
class Refused:
    """An error before anything is changed, with this remedy in it."""

    remedy: str


Verdict = Exact | AsPeft | Refused


@dataclass(frozen=True)
class Row:
    """An operation, and where it is anything but exact.

    Attributes:
        run: the operation.
        ranks: of the adapter, and of a second one where it takes part.
        tolerance: relative, of the norm.
        other: by ``kind``, or by ``start`` of all other kinds, what is not exact.
    """

    run: Operation
    ranks: tuple[int, ...] = (RANK,)
    tolerance: float = 1e-5
    other: Mapping[str, Verdict] = field(default_factory=dict)

    def verdict(self, kind: str, start: str) -> Verdict:
        """Of a cell; what PEFT does with experts goes first, then that of a start."""
        if kind == "expert" and kind in self.other:
            return self.other[kind]
        return self.other.get(start, self.other.get(kind, Exact()))


_TWO = (RANK, RANK)
_PARAMETERS = AsPeft("PEFT raises: not for `target_parameters`")
_MERGED = {
    "quantized": AsPeft("PEFT rounds the merged weight to 4 bits again"),
    "tied": AsPeft("PEFT merges into the weight that the embedding shares"),
}
_SWAPPED = {
    "tied": AsPeft("PEFT raises: beside a tied target it saves the embedding, and does not swap it")
}
_COMBINED = {"expert": _PARAMETERS}
_FACTORS = {
    kind: AsPeft("PEFT combines the factors, not the changes that they make") for kind in KINDS
} | _COMBINED
_QUANTIZED_STATE = {
    "quantized": AsPeft("PEFT's raises, too: bitsandbytes' layers do not load their own state dict")
}


_REMEDY = "before anything is changed; the remedy is the form that ends in `_svd`"


def _pruned(how: str) -> Row:
    refused = {"anchored": Refused(f"{how}_svd")}
    return Row(do.combine(how), _TWO, other=_FACTORS | refused)


TABLE: dict[str, Row] = {
    "`merge_adapter`": Row(do.merge, other=_MERGED),
    "`merge_adapter(safe_merge=True)`": Row(do.safe_merge, other=_MERGED),
    "`unmerge_adapter`": Row(do.unmerge, other={"quantized": _MERGED["quantized"]}),
    "`merge_and_unload`": Row(do.merge_and_unload, other=_MERGED),
    "`unload`": Row(do.unload),
    "`disable_adapter`": Row(do.disable),
    "`set_adapter`": Row(do.switch, _TWO),
    "several active adapters": Row(do.several_active, _TWO),
    "mixed batches (`adapter_names`)": Row(do.mixed_batch, _TWO, other={"expert": _PARAMETERS}),
    "`delete_adapter`, start again": Row(do.delete_and_start_again, _TWO),
    "`reset_lora_parameters`": Row(do.reset),
    **{
        f"`add_weighted_adapter`, `{how}`": Row(do.combine(how), _TWO, other=_COMBINED)
        for how in ("cat", "svd", "ties_svd", "dare_ties_svd", "dare_linear_svd")
    },
    "`add_weighted_adapter`, `magnitude_prune_svd`": Row(
        do.combine("magnitude_prune_svd"), _TWO, other=_COMBINED
    ),
    "`add_weighted_adapter`, `linear`": Row(do.combine("linear"), _TWO, other=_FACTORS),
    **{
        f"`add_weighted_adapter`, `{how}`": _pruned(how)
        for how in ("ties", "dare_ties", "dare_linear", "magnitude_prune")
    },
    "`hotswap_adapter`": Row(do.hotswap, _TWO, other=_SWAPPED),
    "`hotswap_adapter`, to a larger rank": Row(do.hotswap, (RANK, RANK + 2), other=_SWAPPED),
    "`hotswap_adapter`, to a smaller rank": Row(
        do.hotswap,
        (RANK, RANK - 1),
        other=_SWAPPED
        | {"expert": AsPeft("**wrong in PEFT, without an error**: experts' factors are mixed up")},
    ),
    "`hotswap_adapter`, compiled": Row(
        torches.hotswap_compiled, _TWO, other=_SWAPPED | {"expert": _PARAMETERS}
    ),
    "`save_pretrained`, PEFT's `from_pretrained`": Row(do.load_by_peft),
    "the same with `low_cpu_mem_usage=True`": Row(do.load_low_cpu_mem),
    "the same by `load_adapter` beside the live one": Row(do.load_beside),
    "`save_pretrained`, `lorainit.load_adapter`": Row(do.load),
    "`get_peft_model_state_dict`, `set_...`": Row(do.peft_state_dict),
    "`state_dict`, `load_state_dict`": Row(do.state_dict(False), other=_QUANTIZED_STATE),
    "`load_state_dict(assign=True)`": Row(do.state_dict(True), other=_QUANTIZED_STATE),
    "`functional_call` with `named_parameters`": Row(do.call_functionally("named_parameters")),
    "`functional_call` with `state_dict`": Row(do.call_functionally("state_dict")),
    "`copy.deepcopy`": Row(torches.deepcopied),
    "`pickle`": Row(torches.pickled),
    "`torch.save` of the model": Row(torches.saved_whole),
    "`torch.compile`": Row(torches.compiled_layer),
    "`torch.export`": Row(
        torches.exported_layer,
        other={"quantized": AsPeft("PEFT's raises, too: bitsandbytes' weights cannot be traced")},
    ),
    "`lorainit.export`": Row(torches.exported_folder),
    "`accelerate.cpu_offload`": Row(
        torches.offloaded,
        other={
            "expert": AsPeft("PEFT's raises, too: the parametrization meets weights on `meta`"),
            "quantized": AsPeft("PEFT's raises, too: bitsandbytes' weights stay on `meta`"),
        },
    ),
    "`model.to(torch.bfloat16)`": Row(torches.half_precision, tolerance=3e-2),
    "gradients": Row(torches.gradients, tolerance=1e-4),
    "gradient checkpointing": Row(torches.checkpointed, tolerance=1e-4),
    "LoRA+ (a step of `create_loraplus_optimizer`)": Row(torches.loraplus),
    # PEFT projects in bfloat16 where the machine has it.
    "LoRA-FA (a step of `create_lorafa_optimizer`)": Row(torches.lorafa, tolerance=5e-2),
    "AdamW's state, in numbers": Row(torches.optimizer_state),
}

ELSEWHERE: dict[str, tuple[str, str]] = {
    "DDP: gradients and buffers sent": (
        "an anchored adapter sends what plain LoRA of its rank sends",
        "tests/distributed/test_adapters.py::test_ddp_sends_as_much_as_for_plain_lora",
    ),
    "DDP, FSDP1, FSDP2: a step, and the state dict": (
        "the values of a single process; PEFT's names and shapes",
        "tests/distributed/test_adapters.py::test_state_dict_of_a_sharded_model",
    ),
    "FSDP2: reading and writing a factor": (
        "whole, by PEFT's names",
        "tests/distributed/test_adapters.py::test_a_sharded_factor_is_read_and_written_whole",
    ),
    "TRL's DPO, KTO, GRPO (`beta > 0`), RLOO with the ready model": (
        "the reference adapter is the start, and stays it",
        "tests/trainers/test_ready_models.py::test_the_reference_is_the_start_and_does_not_learn",
    ),
}
"""Operations that want processes or trainers: what is tested of them, and where."""


def cells() -> list[tuple[str, str, str]]:
    """Operation, kind and start of every cell."""
    return [(name, kind, start) for name in TABLE for kind in KINDS for start in STARTS]


def rendered() -> str:
    """The table as Markdown, with its notes."""
    notes: list[str] = []

    def mark(verdict: Verdict) -> str:
        if isinstance(verdict, Exact):
            return "exact"
        refused = isinstance(verdict, Refused)
        why = _REMEDY if refused else verdict.why
        if why not in notes:
            notes.append(why)
        return f"{'refused' if refused else 'as PEFT'} ({notes.index(why) + 1})"

    lines = ["| | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for name, row in TABLE.items():
        found = []
        for kind in KINDS:
            by_start = {start: mark(row.verdict(kind, start)) for start in STARTS}
            common = by_start["zero-B"]
            odd = [f"{start}: {text}" for start, text in by_start.items() if text != common]
            found.append("; ".join([common, *odd]))
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    lines += ["", *(f"{number}. {why}." for number, why in enumerate(notes, 1))]
    lines += ["", "| over processes, and in trainers | | |", "|---|---|---|"]
    for name, (what, where) in ELSEWHERE.items():
        path, _, test = where.partition("::")
        lines.append(f"| {name} | {what} | `{path}`, `{test}` |")
    return "\n".join(lines)
