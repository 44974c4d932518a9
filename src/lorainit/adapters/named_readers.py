"""Who reads a module's parameters by their names, past ``state_dict``: told by the calling function.

An anchored factor's parameter is its trained half alone. What saves or loads the factor wants both halves,
what shards or steps the parameter wants that.
"""

from __future__ import annotations

from types import FrameType

_TORCH_STATES = "torch.distributed.checkpoint.state_dict"
_WALK = ("recurse", "_iterate_valid_model_state")


def shards(caller: FrameType) -> bool:
    """Whether FSDP looks for the parameters that it shards."""
    return str(caller.f_globals.get("__name__")).startswith("torch.distributed.fsdp")


def saves_partitioned(caller: FrameType) -> bool:
    """Whether DeepSpeed makes a state dictionary of partitioned parameters, module by module."""
    return caller.f_code.co_name == "get_layer_state_dict"


def loads_distributed(caller: FrameType) -> bool:
    """Whether ``set_model_state_dict`` looks for the tensors that a whole state dictionary is cut up for."""
    frame: FrameType | None = caller
    while frame is not None and frame.f_code.co_name in _WALK:
        if frame.f_globals.get("__name__") != _TORCH_STATES:
            return False
        frame = frame.f_back
    return frame is not caller and frame is not None and "_load_model" in frame.f_code.co_name
