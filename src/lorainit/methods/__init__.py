"""One file a method: a frozen dataclass of its settings, `needs`, and a pure `solve`."""

from lorainit.methods.auto import Auto
from lorainit.methods.corda import CorDA
from lorainit.methods.eva import EVA
from lorainit.methods.filet import FILet
from lorainit.methods.lora_da import LoraDA
from lorainit.methods.lora_ga import LoraGA
from lorainit.methods.lora_one import LoraOne
from lorainit.methods.milora import MiLoRA
from lorainit.methods.natural import Natural
from lorainit.methods.olora import OLoRA
from lorainit.methods.pissa import PiSSA
from lorainit.methods.random_init import Gaussian, Orthogonal
from lorainit.methods.vanilla import Vanilla

METHODS: dict[str, type] = {
    "vanilla": Vanilla,
    "gaussian": Gaussian,
    "orthogonal": Orthogonal,
    "pissa": PiSSA,
    "milora": MiLoRA,
    "olora": OLoRA,
    "eva": EVA,
    "corda": CorDA,
    "lora-ga": LoraGA,
    "lora-one": LoraOne,
    "filet": FILet,
    "lora-da": LoraDA,
    "natural": Natural,
    "auto": Auto,
}
"""Every method by its name on the command line: first those that read nothing, then the weight, the
inputs, the gradient, and last those that read Fisher factors. One contract test runs over this
table."""

__all__ = [
    "EVA",
    "METHODS",
    "Auto",
    "CorDA",
    "FILet",
    "Gaussian",
    "LoraDA",
    "LoraGA",
    "LoraOne",
    "MiLoRA",
    "Natural",
    "OLoRA",
    "Orthogonal",
    "PiSSA",
    "Vanilla",
]
