"""What the server of `tests.fresh` does before the first process: imports, and a table of transformers'.

No backward pass, and nothing in threads: neither outlives a fork.
"""

from __future__ import annotations

import importlib
import pkgutil

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import lorainit

torch.set_num_threads(1)
get_checkpoint_conversion_mapping("llama")
for module in pkgutil.walk_packages(lorainit.__path__, "lorainit."):
    if not module.name.startswith(("lorainit.cli", "lorainit.integrations")):
        importlib.import_module(module.name)
