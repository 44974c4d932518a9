"""One file a method: a frozen dataclass of its settings, `needs`, and a pure `solve`."""

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
from lorainit.methods.random_like import Random
from lorainit.methods.table import STARTS
from lorainit.methods.vanilla import Vanilla

METHODS: dict[str, type] = {**STARTS, "random": Random}
"""Every method by its name on the command line; add one in `table`. One contract test runs over it."""

__all__ = [
    "EVA",
    "FARSS",
    "METHODS",
    "Astra",
    "QERA",
    "Auto",
    "CGLoRA",
    "CorDA",
    "FILet",
    "Gaussian",
    "GoRA",
    "InitAB",
    "LoRAM",
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
    "Random",
    "Vanilla",
]
