"""``cutlayer generate``: what the tuned model writes, with plain Transformers and PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from cutlayer.cli.console import guarded, hush
from cutlayer.errors import ModelError


@guarded()
def generate(
    model: Annotated[str, typer.Argument(help="The base model: a name on the Hub, or a folder.")],
    adapter: Annotated[str, typer.Argument(help="A run's adapter folder (or its model, after full fine-tuning).")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")] = "auto",
) -> None:
    """Print the prompt and what the tuned model makes of it."""
    import torch

    from cutlayer.models.loading import load_tokenizer

    hush()
    place = _device(device)
    tuned = load_tuned(model, adapter).to(place).eval()
    own = (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter if own else model)
    inputs = tokenizer(prompt, return_tensors="pt").to(place)
    inputs.pop("token_type_ids", None)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ModelError("The prompt is empty, and this tokenizer has no token to begin with. Give at least a word.")
    room = getattr(tuned.config, "max_position_embeddings", None)
    if room is not None and length + max_new_tokens > room:
        raise ModelError(
            f"The prompt has {length} tokens; with {max_new_tokens} new ones that is more than the {room} positions of "
            f"'{model}'. Shorten the prompt, or lower --max-new-tokens."
        )
    options: dict[str, Any] = (
        {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature}
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        written = tuned.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **options)
    typer.echo(tokenizer.decode(written[0], skip_special_tokens=True))


def load_tuned(model: str, adapter: str) -> Any:
    """The base with the adapter on it, or the model in ``adapter`` if that is a whole one.

    Raises:
        ModelError: one of them is missing or damaged, or the adapter is of another model.
    """
    from transformers import AutoModelForCausalLM

    from cutlayer.models.loading import load_config

    base_config = load_config(model)
    folder = Path(adapter)
    if not folder.is_dir():
        raise ModelError(f"The adapter folder '{adapter}' does not exist. Give the folder adapter/ of a finished run.")
    if (folder / "adapter_config.json").is_file():
        config = _adapter_config(adapter)
        named = config.base_model_name_or_path or ""
        if named != model and Path(named).is_dir():
            _same_shape(f"The adapter '{adapter}'", load_config(named), model, base_config)
        return _with_adapter(_loaded(AutoModelForCausalLM, model), model, adapter, named)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"'{adapter}' holds neither adapter_config.json nor config.json. Give the folder adapter/ (or model/) of a "
            "finished run."
        )
    _same_shape(f"The model in '{adapter}'", load_config(adapter), model, base_config)
    return _loaded(AutoModelForCausalLM, adapter)


def _same_shape(what: str, own: Any, model: str, base: Any) -> None:
    for key in ("model_type", "hidden_size", "num_hidden_layers"):
        mine, theirs = getattr(own, key, None), getattr(base, key, None)
        if mine != theirs:
            raise ModelError(
                f"{what} was not tuned from '{model}': its {key} is {mine}, there it is {theirs}. "
                "Name the base that the run used."
            )


def _loaded(cls: Any, name: str) -> Any:
    try:
        return cls.from_pretrained(name)
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"The model '{name}' cannot be loaded for generation: {said}") from error


def _adapter_config(adapter: str) -> Any:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(adapter)
    except Exception as error:
        raise ModelError(
            f"'{adapter}/adapter_config.json' cannot be read: {_short(error)}. "
            "Name a folder that a run wrote as adapter/."
        ) from error
    if not config.peft_type:
        raise ModelError(
            f"'{adapter}/adapter_config.json' names no kind of adapter. Name a folder that a run wrote as adapter/."
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ModelError(f"The adapter '{adapter}' is for the task {config.task_type}; it writes no text.")
    return config


def _with_adapter(base: Any, model: str, adapter: str, named: str) -> Any:
    """The base with the adapter, after a look at all tensors' names: PEFT itself loads what fits and drops the rest."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    other = f"The adapter '{adapter}' does not fit '{model}'"
    hint = f"Name the base that it was trained on (it says '{named}')."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys; they are counted below
            tuned = PeftModel.from_pretrained(base, adapter)
        saved = set(load_peft_weights(adapter, device="cpu"))
    except Exception as error:
        raise ModelError(f"{other}: {_short(error)}. {hint}") from error
    expected = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    missing = sorted(expected - saved)
    unknown = sorted(name for name in saved - expected if ".lora_" in name)
    if missing:
        raise ModelError(f"{other}: it lacks {len(missing)} tensors, for instance '{missing[0]}'. {hint}")
    if unknown:
        raise ModelError(f"{other}: {len(unknown)} of its tensors have no place, for instance '{unknown[0]}'. {hint}")
    return tuned


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device is '{device}', which this machine does not have. Use auto, cpu or cuda.") from error
    return device
