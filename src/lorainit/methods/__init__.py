"""One file a method: a frozen dataclass of its settings, `needs`, and a pure `solve`."""

from lorainit.methods.auto import Auto
from lorainit.methods.corda import CorDA
from lorainit.methods.eva import EVA
from lorainit.methods.filet import FILet
from lorainit.methods.kronecker_qer import KroneckerQER
from lorainit.methods.loftq import LoftQ
from lorainit.methods.lora_da import LoraDA
from lorainit.methods.lora_ga import LoraGA
from lorainit.methods.lora_one import LoraOne
from lorainit.methods.milora import MiLoRA
from lorainit.methods.natural import Natural
from lorainit.methods.olora import OLoRA
from lorainit.methods.pissa import PiSSA
from lorainit.methods.qera import QERA
from lorainit.methods.random_init import Gaussian, Orthogonal
from lorainit.methods.vanilla import Vanilla

METHODS: dict[str, type] = {
    "vanilla": Vanilla,
    "gaussian": Gaussian,
    "orthogonal": Orthogonal,
    "pissa": PiSSA,
    "milora": MiLoRA,
    "olora": OLoRA,
    "loftq": LoftQ,
    "eva": EVA,
    "corda": CorDA,
    "qera": QERA,
    "lora-ga": LoraGA,
    "lora-one": LoraOne,
    "filet": FILet,
    "kronecker-qer": KroneckerQER,
    "lora-da": LoraDA,
    "natural": Natural,
    "auto": Auto,
}
"""Every method by its name on the command line: first those that read nothing, then the weight or what
quantization took from it, the inputs, the gradient, and last those that read Fisher factors. One contract
test runs over this table."""

__all__ = [
    "EVA",
    "METHODS",
    "QERA",
    "Auto",
    "CorDA",
    "FILet",
    "Gaussian",
    "KroneckerQER",
    "LoftQ",
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
