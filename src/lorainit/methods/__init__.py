"""One file a method: a frozen dataclass of its settings, `needs`, and a pure `solve`."""

from lorainit.methods.filet import FILet
from lorainit.methods.lora_da import LoraDA
from lorainit.methods.vanilla import Vanilla

__all__ = ["FILet", "LoraDA", "Vanilla"]
