"""Every method by its name on the command line, but for the control that may be like any of them."""

from __future__ import annotations

from lorainit.methods.astra import Astra
from lorainit.methods.auto import Auto
from lorainit.methods.cg_lora import CGLoRA
from lorainit.methods.corda import CorDA
from lorainit.methods.eva import EVA
from lorainit.methods.farss import FARSS
from lorainit.methods.filet import FILet
from lorainit.methods.gora import GoRA
from lorainit.methods.init_ab import InitAB
from lorainit.methods.kronecker_qer import KroneckerQER
from lorainit.methods.loftq import LoftQ
from lorainit.methods.lora_da import LoraDA
from lorainit.methods.lora_ga import LoraGA
from lorainit.methods.lora_one import LoraOne
from lorainit.methods.loram import LoRAM
from lorainit.methods.milora import MiLoRA
from lorainit.methods.natural import Natural
from lorainit.methods.olora import OLoRA
from lorainit.methods.pissa import PiSSA
from lorainit.methods.qera import QERA
from lorainit.methods.random_init import Gaussian, Orthogonal
from lorainit.methods.vanilla import Vanilla

STARTS: dict[str, type] = {
    "vanilla": Vanilla,
    "gaussian": Gaussian,
    "orthogonal": Orthogonal,
    "init-ab": InitAB,
    "pissa": PiSSA,
    "milora": MiLoRA,
    "olora": OLoRA,
    "loram": LoRAM,
    "loftq": LoftQ,
    "eva": EVA,
    "corda": CorDA,
    "astra": Astra,
    "qera": QERA,
    "lora-ga": LoraGA,
    "lora-one": LoraOne,
    "gora": GoRA,
    "filet": FILet,
    "farss": FARSS,
    "cg-lora": CGLoRA,
    "kronecker-qer": KroneckerQER,
    "lora-da": LoraDA,
    "natural": Natural,
    "auto": Auto,
}
"""First those that read nothing, then the weight, the inputs, the gradient, and last those that read
Fisher factors."""
