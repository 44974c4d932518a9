"""The blocks that a model's layers stand in: members of its outermost lists of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from lorainit.models.experts import ExpertLayer


def list_blocks(model: nn.Module) -> list[nn.Module]:
    """Members of the outermost ``nn.ModuleList`` objects that hold two or more modules with children.

    Such lists are ``model.layers``, ``transformer.h``, ``encoder.layer``, ``encoder.block`` and
    ``decoder.block``, the blocks of a vision tower. Whether members run one after the other is not known
    from the list.
    """
    found = [block for blocks in _outermost(model) for block in blocks]
    # A block that stands in two places is no block of either.
    return found if len({id(block) for block in found}) == len(found) else []


def block_of_layers(
    blocks: list[nn.Module], layers: Mapping[str, nn.Module]
) -> dict[str, int] | None:
    """The index of the block that each layer is in, by layer name; layers outside of all blocks are left out.

    None where a layer is in two blocks.
    """
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            if owners.setdefault(id(module), index) != index:
                owners[id(module)] = -1
    found = {}
    for name, layer in layers.items():
        holder = layer.stack.owner if isinstance(layer, ExpertLayer) else layer
        owner = owners.get(id(holder))
        if owner == -1:
            return None
        if owner is not None:
            found[name] = owner
    return found


def _outermost(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        members = list(child) if isinstance(child, nn.ModuleList) else []
        if len(members) > 1 and all(next(m.children(), None) is not None for m in members):
            assert isinstance(child, nn.ModuleList)
            yield child
        else:
            yield from _outermost(child)
