"""The end of ``make demo``: what the tuned model writes, beside the base model. Plain Transformers and PEFT.

python demo/show.py outputs/demo
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

HERE = Path(__file__).parent


def write(model: Any, tokenizer: Any, prompt: str) -> str:
    """What ``model`` goes on with, always the likeliest token."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=140, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def show(out: Path, row: int) -> None:
    """Print one validation prompt with the notes of the base model, of the tuned model, and of the clinic."""
    example = json.loads((HERE / "data/valid.jsonl").read_text(encoding="utf-8").splitlines()[row])
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    base = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, out / "adapter").eval()
    with tuned.disable_adapter():
        before = write(tuned, tokenizer, example["prompt"])
    parts = {
        f"the prompt, a validation row of {example['clinic']}": example["prompt"],
        "before, the base model writes": before,
        "after, the tuned model writes": write(tuned, tokenizer, example["prompt"]),
        "the clinic itself wrote": example["completion"].strip(),
    }
    for title, text in parts.items():
        print(f"\n--- {title}\n{text}")
    print(
        "\nThe model is small: it learns the form of a clinic's notes, but does not copy facts from the prompt. "
        "Names and numbers are made up."
        f"\n\nThe adapter is in {out / 'adapter'}. It is an ordinary PEFT adapter:"
        f'\n    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("demo/model"), "{out / "adapter"}")'
        "\n\nSplitting alone does not hide the text: a server that has the base weights can work out much of it from "
        "the hidden states and gradients that it is sent."
    )


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the output folder of the run")
    parser.add_argument("--row", type=int, default=0, help="which validation row to show, from 0")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    show(arguments.out, arguments.row)


if __name__ == "__main__":
    main()
