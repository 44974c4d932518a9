"""Packed models: the blocks of GGUF files by torch alone, and files that give a model back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks.quality.models import packing
from benchmarks.quality.models.gguf_blocks import BLOCKS, dequantize
from benchmarks.quality.models.packing import load_packed, write_packed
from safetensors.torch import load_file, save_file

from tests.benchmarks import test_quality_gemma, test_quality_trainer

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_blocks_are_read_as_gguf_reads_them(kind):
    """On random bytes: every bit pattern, scales that are not numbers among them."""
    size = BLOCKS[kind][0]
    raw = np.random.default_rng(0).integers(0, 256, (64, 5 * size)).astype(np.uint8)
    wanted = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    found = dequantize(torch.from_numpy(raw), kind).numpy()
    np.testing.assert_array_equal(found, wanted)
    assert np.isfinite(found).mean() > 0.5
    other = next(name for name in BLOCKS if name != kind)
    assert dequantize(torch.zeros(1, BLOCKS[other][0], dtype=torch.uint8), other).shape[1] % 32 == 0


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="IQ2_XXS"):
        dequantize(torch.zeros(1, 66, dtype=torch.uint8), "IQ2_XXS")


def quantized(model):
    """Raw tensors of a model (Q8_0 where the width allows it) and the model with their very values."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if weight.ndim == 2 and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            raw = torch.from_numpy(gguf.quantize(weight.numpy(), kind))
            tensors[name] = (raw, "Q8_0")
            weight.copy_(torch.from_numpy(gguf.dequantize(raw.numpy(), kind)))
        else:
            tensors[name] = (weight.clone(), "F32")
    return tensors


@pytest.fixture(params=[test_quality_gemma, test_quality_trainer], ids=["gemma", "llama"])
def packed(request, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MOST_BYTES", 700)
    model = request.param.base_model()
    tensors = quantized(model)
    write_packed(tmp_path, model.config.to_dict(), tensors)
    return model, tensors, tmp_path


def test_a_packed_model_comes_back_from_several_files(packed):
    model, tensors, folder = packed
    assert any(raw.nbytes > packing.MOST_BYTES for raw, _ in tensors.values())
    files = sorted(folder.glob("blocks-*.safetensors"))
    assert len(files) > 20
    held = [sum(t.nbytes for t in load_file(path).values()) for path in files]
    assert max(held) <= packing.MOST_BYTES + 700
    ours, theirs = load_packed(folder).state_dict(), model.state_dict()
    assert set(ours) == set(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_model_that_is_not_whole_is_refused(packed):
    _, _, folder = packed
    files = sorted(folder.glob("blocks-*.safetensors"))
    files[len(files) // 2].unlink()
    with pytest.raises(ValueError, match="does not hold this model"):
        load_packed(folder)


def test_files_without_types_are_read_by_their_width(packed):
    """As they were once written for SmolLM2, whose only types are Q8_0 and Q4_1."""
    model, _, folder = packed
    for path in folder.glob("blocks-*.safetensors"):
        save_file(load_file(path), path)
    weight = load_packed(folder).model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, model.model.layers[0].mlp.up_proj.weight)
    values = torch.randn(4, 2 * 32).numpy()
    raw = torch.from_numpy(gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1))
    assert packing._untyped(raw) == "Q4_1"


def test_names_and_norms_of_gemma():
    raw = torch.tensor([1.5, 0.25])
    norm = packing._name("blk.3.post_ffw_norm.weight", packing.SOURCES["gemma-3-270m"].names)
    assert norm == "model.layers.3.post_feedforward_layernorm.weight"
    assert torch.equal(packing._without_one(norm, raw, {}), torch.tensor([0.5, -0.75]))
    assert packing._without_one("model.layers.0.mlp.up_proj.weight", raw, {}) is raw
    llama = packing._name("blk.3.ffn_norm.weight", packing.SOURCES["smollm2-135m-instruct"].names)
    assert llama == "model.layers.3.post_attention_layernorm.weight"
    assert packing._name("blk.3.ffn_norm.weight", packing.SOURCES["gemma-3-270m"].names) == (
        "model.layers.3.pre_feedforward_layernorm.weight"
    )
