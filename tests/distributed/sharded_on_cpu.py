"""Runs a script under ``accelerate launch`` with FSDP on a CPU, where accelerate itself does not shard.

Accelerate asks for an accelerator before it takes FSDP's part of a configuration to heart; PyTorch
shards on gloo too. Everything else is accelerate's own.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

from accelerate import accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__
_prepare = accelerator.fsdp2_prepare_model


def _sharding(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    fresh = not AcceleratorState._shared_state
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _counted(*args: Any) -> Any:
    model = _prepare(*args)
    cut = [p for p in model.parameters() if p.to_local().numel() < p.numel()]
    print(f"sharded parameters: {len(cut)}", flush=True)
    return model


if __name__ == "__main__":
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    AcceleratorState.__init__ = _sharding
    accelerator.fsdp2_prepare_model = _counted
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
