"""What is disturbed at every call site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import lorainit
from lorainit.cli.main import INTERRUPTED, main
from tests.adapters import tiny
from tests.cli.place import make_place
from tests.life import mixtures


@dataclass(frozen=True)
class Operation:
    """Something of the package's API.

    Attributes:
        model: it works on; the same one every time, since it is left as it was.
        work: with the model and a folder.
        undo: after it has succeeded, or been disturbed after its last deed.
        ignored: parts of the state that need not stay: a command's random numbers are its process's own.
    """

    model: Any
    work: Callable[[Any, Path], object]
    undo: Callable[[Any], None] = field(default=lambda model: None)
    ignored: tuple[str, ...] = ()


def data() -> list[dict[str, Tensor]]:
    return [tiny.batch(4, 6, seed=s) for s in range(2)]


def unsettled(model: Any) -> Any:
    """In train mode, a part in eval mode and a part frozen: flags that no code would set by chance."""
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(False)
    return model


def operations(folder: Path) -> dict[str, Operation]:
    """By name; the folder holds what some of them read."""
    base = tiny.llama()
    second = lorainit.get_peft_model(
        tiny.llama(), tiny.config(), method=lorainit.PiSSA(), progress=False
    )
    again = lorainit.get_peft_model(
        tiny.llama(), tiny.config(), method=lorainit.PiSSA(), progress=False
    )
    tiny.train(again)
    anchored = again
    in_place = tiny.llama()
    in_place.add_adapter(tiny.config())
    needs = lorainit.Natural().needs
    statistics = lorainit.collect_statistics(
        tiny.llama(), tiny.config(), data=data(), needs=needs, progress=False
    )
    statistics.save(folder / "s.safetensors")
    lorainit.save_adapter(anchored, folder / "adapter")
    mixture = mixtures.mixtral()
    experts = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["experts.down_proj", "experts.gate_up_proj"],
    )
    read = make_place(folder)

    def command(line: str, place: Path) -> None:
        """A command; Ctrl-C, which it turns into an exit code, is one again."""
        code = main(
            [
                *line.split(),
                "--model",
                str(read / "model"),
                "--output",
                str(place),
                "--quiet",
                "--device",
                "cpu",
            ]
        )
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        assert code == 0, f"exit code {code}"

    def get(model: Any, **settings: Any) -> None:
        settings = {"method": lorainit.LoraDA(), "data": data()} | settings
        lorainit.get_peft_model(
            model, settings.pop("config", tiny.config()), progress=False, **settings
        )

    def unload(model: Any) -> None:
        """A base model that was wrapped is unwrapped by taking its layers out again."""
        for module in list(model.modules()):
            for name, child in list(module._modules.items()):
                if isinstance(child, nn.Module) and hasattr(child, "base_layer"):
                    module._modules[name] = child.base_layer
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(model).pop(name, None)
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    def delete(model: PeftModel) -> None:
        if "other" in model.peft_config:
            model.delete_adapter("other")

    return {
        "collect_statistics": Operation(
            unsettled(tiny.llama()),
            lambda model, _: lorainit.collect_statistics(
                model, tiny.config(), data=data(), needs=needs, progress=False
            ),
        ),
        "collect_statistics, experts": Operation(
            unsettled(mixture),
            lambda model, _: lorainit.collect_statistics(
                model, experts, data=data(), needs=needs, progress=False
            ),
        ),
        "get_peft_model, new": Operation(base, lambda model, _: get(model), unload),
        "get_peft_model, second": Operation(
            second, lambda model, _: get(model, adapter_name="other"), delete
        ),
        "get_peft_model, restarted": Operation(
            again, lambda model, _: get(model, config=None, method=lorainit.EVA(rho=1))
        ),
        "get_peft_model, in place": Operation(
            in_place, lambda model, _: get(model, config=None, method=lorainit.EVA(rho=1))
        ),
        "get_peft_model, measured": Operation(
            tiny.llama().train(),
            lambda model, _: get(
                model, method=lorainit.Natural(), config=tiny.config(r=2, target_modules=["q_proj"])
            ),
            unload,
        ),
        "load_adapter": Operation(
            tiny.llama(),
            lambda model, place: lorainit.load_adapter(model, folder / "adapter"),
            unload,
        ),
        "save": Operation(statistics, lambda held, place: held.save(place / "t.safetensors")),
        "load": Operation(
            None, lambda _, place: lorainit.Statistics.load(folder / "s.safetensors")
        ),
        "save_adapter": Operation(
            anchored, lambda model, place: lorainit.save_adapter(model, place / "a")
        ),
        "export": Operation(
            anchored, lambda model, place: lorainit.export(model, place / "a", rank=2)
        ),
        "init": Operation(
            None,
            lambda _, place: command(
                f"init --method lora-one --data {read / 'pairs.jsonl'} --rank 4", place / "i"
            ),
            ignored=("rng", "python"),
        ),
        "collect": Operation(
            None,
            lambda _, place: command(
                f"collect --method eva --data {read / 'pairs.jsonl'}", place / "c.safetensors"
            ),
        ),
    }
