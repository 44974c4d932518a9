"""Which output locations of a convolution count, from which of its inputs do."""

from __future__ import annotations

import torch

from lorainit.models.convolution import Convolution
from lorainit.statistics.positions.calls import InputPositions
from lorainit.statistics.positions.counted import CountedPositions, positions_of


def after_convolution(
    found: InputPositions, convolution: Convolution, size: tuple[int, ...], rows: int
) -> InputPositions:
    """The locations that count.

    Of a sequence of ``n`` steps at the beginning of a row, the locations count that the convolution makes of
    ``n`` steps alone; a convolution that keeps the number of steps keeps the mask. A mask of a sequence
    says nothing of an image's pixels.

    Args:
        found: which of the inputs count.
        convolution: how it walks.
        size: of its input, by dimension.
        rows: of the batch.
    """
    mask = found.mask
    if mask is None or mask.indices is None:
        return found
    if len(size) > 1:
        return InputPositions(None, known=False)
    (steps,), (made,) = size, convolution.locations(size)
    inputs = mask.lying_like(torch.Size((rows, steps)))
    if inputs is None or inputs.indices is None:
        return InputPositions(None, known=inputs is not None)
    if made == steps:
        return InputPositions(inputs, found.known)
    outputs = _of_lengths(inputs, steps, made, convolution)
    if outputs is None:
        return InputPositions(None, known=False)
    # What reads the outputs further on is masked alike.
    mask.fewer[made] = outputs
    return InputPositions(outputs, found.known)


def _of_lengths(
    inputs: CountedPositions, steps: int, made: int, convolution: Convolution
) -> CountedPositions | None:
    """Of rows whose first steps count; None where others do."""
    rows = inputs.shape[0]
    assert inputs.indices is not None
    kept = torch.zeros(rows * steps, dtype=torch.bool)
    kept[inputs.indices.cpu()] = True
    kept = kept.reshape(rows, steps)
    lengths = kept.sum(1)
    if not torch.equal(kept, torch.arange(steps) < lengths[:, None]):
        return None
    new = torch.tensor([convolution.locations((int(n),))[0] for n in lengths.tolist()])
    return positions_of(torch.arange(made) < new[:, None], inputs.indices.device)
