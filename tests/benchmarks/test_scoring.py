"""Teacher-forced scores against the slow, obvious way: greedy decoding and a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from benchmarks.common.scoring import score, score_batches, sequence_scores
from benchmarks.common.tasks import IGNORED, Collator, Example
from transformers import LlamaConfig, LlamaForCausalLM

END, PAD, VOCABULARY = 1, 0, 12


def _examples(count: int, seed: int) -> list[Example]:
    """Ragged prompts; the answer repeats the prompt's first token one to three times."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        prompt = torch.randint(2, VOCABULARY, (int(3 + i % 4),), generator=generator).tolist()
        answer = [prompt[0]] * (1 + prompt[0] % 3) + [END]
        examples.append(Example((*prompt, *answer), (*([IGNORED] * len(prompt)), *answer)))
    return examples


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A tiny Llama, trained until it answers some of the problems and not others."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    batch = Collator(PAD)(_examples(48, seed=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def test_exact_match_is_what_greedy_decoding_gives(model):
    examples = _examples(96, seed=2)
    scores = score(model, examples, collate=Collator(PAD), batch_size=16)
    decoded = []
    model.eval()
    for example in examples:
        prompt = torch.tensor([example.input_ids[: example.prompt_length]])
        answer = example.input_ids[example.prompt_length :]
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(answer),
            do_sample=False,
        )
        decoded.append(tuple(out[0, prompt.shape[1] :].tolist()) == answer)
    assert scores.exact.tolist() == decoded
    assert 0.1 < scores.exact_match < 0.95  # both outcomes were seen


def test_losses_are_means_over_own_tokens_whatever_the_batch(model):
    examples = _examples(12, seed=3)
    expected = []
    model.eval()
    with torch.no_grad():
        for example in examples:
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
            steps = [i for i, label in enumerate(example.labels) if label != IGNORED]
            logs = logits.log_softmax(-1)
            tokens = [-logs[i - 1, example.labels[i]].item() for i in steps]
            expected.append(sum(tokens) / len(tokens))
    expected = torch.tensor(expected, dtype=torch.float64)
    for side in ("left", "right"):
        for batch_size in (1, 5, 12):
            got = score(model, examples, collate=Collator(PAD, side), batch_size=batch_size)
            torch.testing.assert_close(got.losses, expected, rtol=1e-5, atol=1e-5)
    token_mean = model(**Collator(PAD)(examples)).loss.item()
    assert abs(token_mean - expected.mean().item()) > 1e-3  # the batch's mean is another number


def test_the_mode_is_put_back_and_no_gradient_is_left(model):
    model.train()
    score_batches(model, [Collator(PAD)(_examples(2, seed=4))])
    assert model.training
    model.zero_grad()
    model.eval()


def test_a_sequence_without_labels_is_an_error():
    labels = torch.tensor([[IGNORED, 3], [IGNORED, IGNORED]])
    with pytest.raises(ValueError, match="no label token"):
        sequence_scores(torch.zeros(2, 2, 5), labels)


def test_nothing_to_score_is_an_error(model):
    with pytest.raises(ValueError, match="nothing to score"):
        score_batches(model, [])
