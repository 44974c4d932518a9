"""Fine-tune on FSDP2 with plain PyTorch: start the adapter, shard the model, train, save.

    torchrun --nproc_per_node 8 examples/fully_shard.py --model FOLDER --data train.jsonl --out adapter

or ``accelerate launch``, which sets the same variables. Each line of the data is a JSON object with
"prompt" and "completion". Without an accelerator it runs on gloo.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorainit
from lorainit.models.pretrained import load_whole


def batches_of_this_process(
    tokenizer: Any, path: Path, size: int, length: int
) -> list[dict[str, Any]]:
    """Every world-size-th line; prompts carry no label."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    lines = lines[dist.get_rank() :: dist.get_world_size()]
    found = []
    for first in range(0, len(lines), size):
        ids, labels = [], []
        for line in lines[first : first + size]:
            prompt = tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
            answer = tokenizer(line["completion"], add_special_tokens=False)["input_ids"]
            answer = [*answer, tokenizer.eos_token_id]
            ids.append(torch.tensor((prompt + answer)[:length]))
            labels.append(torch.tensor(([-100] * len(prompt) + answer)[:length]))
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        found.append(
            {
                "input_ids": pad(ids, batch_first=True),
                "attention_mask": mask,
                "labels": pad(labels, batch_first=True, padding_value=-100),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-4)
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = torch.bfloat16 if cuda else torch.float32
    # As from_pretrained, but a checkpoint that is not whole is an error.
    model = load_whole(AutoModelForCausalLM, arguments.model, dtype=dtype)
    data = batches_of_this_process(tokenizer, arguments.data, arguments.batch, arguments.length)

    # 1. The adapter's layers, from PEFT; then everything is sharded, block by block.
    config = LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules="all-linear")
    # One dtype in each sharded block: the adapter stays in the model's.
    model = lorainit.get_peft_model(
        model, config, method=lorainit.Vanilla(), autocast_adapter_dtype=False
    )
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module)
    fully_shard(model)

    # 2. The start, measured through the sharded model; every process gives its part of the data.
    model = lorainit.get_peft_model(model, None, method=lorainit.LoraDA(), data=data)

    # 3. Any training loop.
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=arguments.lr)
    model.train()
    for step in range(arguments.steps):
        batch = data[step % len(data)]
        batch = {k: v if device is None else v.to(device) for k, v in batch.items()}
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {float(total) / dist.get_world_size():.4f}", flush=True)

    # 4. A plain adapter: gathered by all, written by one.
    state = {
        name: p.full_tensor().cpu() if hasattr(p, "full_tensor") else p.cpu()
        for name, p in model.state_dict().items()
        if "lora_" in name
    }
    if dist.get_rank() == 0:
        model.save_pretrained(str(arguments.out), state_dict=state)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
