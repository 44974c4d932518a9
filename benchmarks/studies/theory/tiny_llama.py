"""A two-layer Llama, trained in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def tiny_llama(seed: int = 0, steps: int = 250) -> tuple[nn.Module, Tensor, float]:
    """A two-layer Llama trained for seconds on a noisy second-order Markov chain.

    Returns:
        The model in float64, held-out sequences, and its loss on them in nats per token.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, length = 16, 16
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attn_implementation="eager",
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
    finally:
        torch.random.set_rng_state(state)
    generator = torch.Generator().manual_seed(seed + 1)
    table = (2.0 * torch.randn(vocabulary, vocabulary, vocabulary, generator=generator)).softmax(-1)

    def draw(count: int) -> Tensor:
        tokens = torch.randint(vocabulary, (count, 2), generator=generator)
        for _ in range(length - 2):
            chances = table[tokens[:, -2], tokens[:, -1]]
            new = torch.multinomial(chances, 1, generator=generator)
            tokens = torch.cat([tokens, new], 1)
        return tokens

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        batch = draw(64)
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    held_out = draw(32)
    with torch.no_grad():
        loss = float(model(input_ids=held_out, labels=held_out).loss)
    model.double().eval().requires_grad_(False)
    return model, held_out, loss
