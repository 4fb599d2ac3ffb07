"""Make the demo's base model: a byte-level BPE tokenizer and a Llama decoder of about 3 million parameters.

Both learn from the general text of ``general_text.py`` only; the clinic notes are never read here. Run from anywhere:

    python demo/make_model.py                      # the committed model: all steps, into demo/model
    python demo/make_model.py --steps 3 --out DIR  # a few steps, to check that the losses begin the same way

The seed, the number of steps, the order of the text and the number of threads are fixed, and only deterministic
operations run, so two runs give equal files bit for bit on the same kind of CPU with the same PyTorch version and
thread count. On another machine the sums round differently: expect the first losses to agree to 1e-3 and the final
ones nearly.
"""

import argparse
import hashlib
import itertools
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from general_text import general_documents

HERE = Path(__file__).resolve().parent
TEXT_SEED = 20_240
HELD_OUT_SEED = 20_241
MODEL_SEED = 7
THREADS = 1
VOCAB = 2560
TOKENIZER_DOCUMENTS = 10_000
EOS, PAD = "<|endoftext|>", "<|pad|>"

STEPS = 1000
BATCH, LENGTH = 8, 256
PEAK_RATE, WARMUP = 3e-3, 60


def train_tokenizer(seed: int = TEXT_SEED) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stay single, so that a number is copied digit by digit."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(itertools.islice(general_documents(seed), TOKENIZER_DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=EOS,
        eos_token=EOS,
        unk_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised decoder; the seed is set here."""
    torch.manual_seed(MODEL_SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Batches:
    """Rows of ``LENGTH`` tokens cut from the stream of documents, which are joined by the end-of-text token.

    Also counts and hashes the text it has read, for the record.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.documents = general_documents(seed)
        self.count = 0
        self.digest = hashlib.sha256()
        self.buffer: list[int] = [tokenizer.eos_token_id]

    def __iter__(self) -> Iterator[torch.Tensor]:
        size = BATCH * LENGTH
        while True:
            while len(self.buffer) < size:
                self._read_document()
            rows, self.buffer = self.buffer[:size], self.buffer[size:]
            yield torch.tensor(rows).view(BATCH, LENGTH)

    def _read_document(self) -> None:
        text = next(self.documents)
        self.count += 1
        self.digest.update(text.encode() + b"\0")
        self.buffer += [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]


def text_sha256(documents: int, seed: int = TEXT_SEED) -> str:
    """Hash of the first documents, as `Batches` counts it."""
    digest = hashlib.sha256()
    for text in itertools.islice(general_documents(seed), documents):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up of fixed length (so that short runs begin like the long one), then a cosine down to 5 percent."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(model: LlamaForCausalLM, batches: Batches, steps: int) -> list[float]:
    """Train in float32 and return the loss of every step."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses: list[float] = []
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(itertools.islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {losses[-1]:.3f}  {time.monotonic() - started:5.0f} s", flush=True)
    return losses


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batches: int = 8) -> float:
    """Mean loss on general text from another seed."""
    model.eval()
    rows = itertools.islice(Batches(tokenizer, HELD_OUT_SEED), batches)
    losses: list[float] = [model(input_ids=batch, labels=batch).loss.item() for batch in rows]
    return sum(losses) / len(losses)


def make_model(steps: int, out: Path) -> dict[str, Any]:
    """Train, save in bfloat16 and return the record, which is also written to ``TRAINING.json``."""
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    batches = Batches(tokenizer, TEXT_SEED)
    losses = pretrain(model, batches, steps)
    model = model.to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    last = losses[-50:]
    record = {
        "steps": steps,
        "seed": MODEL_SEED,
        "text_seed": TEXT_SEED,
        "threads": THREADS,
        "tokens": steps * BATCH * LENGTH,
        "parameters": model.num_parameters(),
        "documents": batches.count,
        "text_sha256": batches.digest.hexdigest(),
        "first_losses": losses[:5],
        "final_loss": sum(last) / len(last),
        "held_out_loss": held_out_loss(model.float(), tokenizer),
        "weights_sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "made_with": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
    }
    (out / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="folder to write (default demo/model)")
    arguments = parser.parse_args()
    print(json.dumps(make_model(arguments.steps, arguments.out), indent=2))


if __name__ == "__main__":
    main()
