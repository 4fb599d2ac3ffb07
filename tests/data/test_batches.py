"""Padding, the schedule of a client, the evaluation split and the fingerprint."""

import random
import subprocess
import sys
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cutlayer.contracts import IGNORE, Example
from cutlayer.data.batches import Batches, collate, fingerprint, split_eval
from cutlayer.data.formats import pack
from cutlayer.errors import DataError

PAD = 0


def example(*ids, ignore=0):
    return Example(list(ids), labels=[*[IGNORE] * ignore, *ids[ignore:]])


LONG, SHORT = example(5, 6, 7, 8, ignore=2), example(9, 10)
pad = partial(collate, pad_id=PAD, causal=True)


def test_right_padding():
    batch = pad([LONG, SHORT], padding_side="right")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 7, 8], [9, 10, -100, -100]]
    assert batch.position_ids is None
    assert (batch.tokens, batch.label_tokens) == (6, 3)
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}


def test_left_padding_counts_real_tokens_as_generate_does():
    batch = pad([LONG, SHORT], padding_side="left")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [0, 0, 9, 10]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.labels.tolist() == [[-100, -100, 7, 8], [-100, -100, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    # GenerationMixin's own
    made = LlamaForCausalLM._prepare_position_ids_for_generation(
        None, batch.input_ids, {"attention_mask": batch.attention_mask}
    )
    assert torch.equal(batch.position_ids, made)
    # a model without causal attention finds its own positions
    assert collate([LONG, SHORT], pad_id=PAD, padding_side="left", causal=False).position_ids is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_padding_there_is_no_mask(side):
    batch = pad([SHORT, SHORT], padding_side=side)
    assert batch.attention_mask is None
    assert batch.position_ids is None


def test_classification_labels():
    batch = pad([Example([5, 6], label=2), Example([7], label=0)], padding_side="right")
    assert batch.labels.tolist() == [2, 0]
    assert batch.labels.dtype == torch.int64
    assert (batch.tokens, batch.label_tokens) == (3, 2)


def test_padding_of_packed_rows_is_an_example_of_its_own():
    rows = pack([example(5, 6, 7), example(8, 9), example(10, 11)], 5)
    batch = pad(rows, padding_side="right")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [10, 11, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 9], [-100, 11, -100, -100, -100]]
    assert batch.attention_mask is None
    assert (batch.tokens, batch.label_tokens) == (7, 4)
    assert pad(rows, padding_side="left").position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("packing", [False, True])
def test_padding_and_packing_change_no_real_tokens_logits(attention, side, packing):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings = LlamaConfig(vocab_size=32, num_hidden_layers=2, attn_implementation=attention, **sizes)
    model = LlamaForCausalLM(settings).eval()
    examples = [example(*torch.randint(1, 32, (n,)).tolist()) for n in (3, 1, 4, 1, 5, 2, 6)]
    alone = [model(torch.tensor([e.input_ids])).logits[0] for e in examples]
    rows = pack(examples, 7) if packing else examples
    batch = pad(rows, padding_side=side)
    assert batch.tokens < batch.input_ids.numel()
    logits = model(
        batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    real = [
        logits[row, -len(one.input_ids) :] if side == "left" else logits[row, : len(one.input_ids)]
        for row, one in enumerate(rows)
    ]
    torch.testing.assert_close(torch.cat(real), torch.cat(alone))


# --- the schedule ----------------------------------------------------------------------------------------------------


def schedule(count, *, batch_size=2, accumulation=1, seed=0, client="a", shuffle=False):
    """A schedule whose batches are the row numbers themselves."""
    return Batches(
        [Example([row], label=0) for row in range(count)],
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        client=client,
        shuffle=shuffle,
        collate=lambda examples: [one.input_ids[0] for one in examples],
    )


def test_file_order_by_hand():
    batches = schedule(7, accumulation=3)
    assert batches.steps_per_epoch == 2
    epoch = [[[0, 1], [2, 3], [4, 5]], [[6]]]  # no row is dropped, no step reaches over the end
    assert [batches.step(number) for number in range(6)] == epoch * 3


def test_random_schedules_against_a_plain_loop():
    chance = random.Random(0)
    for _ in range(100):
        count, size, accumulation = chance.randint(1, 20), chance.randint(1, 6), chance.randint(1, 4)
        shuffle = chance.random() < 0.5
        batches = schedule(count, batch_size=size, accumulation=accumulation, shuffle=shuffle)
        number = 0
        for _ in range(3):
            seen, micros = [], []
            for _ in range(batches.steps_per_epoch):
                step = batches.step(number)
                assert 1 <= len(step) <= accumulation
                micros += step
                seen += [row for micro in step for row in micro]
                number += 1
            assert sorted(seen) == list(range(count))
            assert [len(micro) for micro in micros[:-1]] == [size] * (len(micros) - 1)
            assert shuffle or seen == list(range(count))


def test_a_step_is_a_function_of_its_number():
    forward = schedule(11, accumulation=2, shuffle=True)
    all_steps = [forward.step(number) for number in range(30)]
    numbers = list(range(30))
    random.Random(3).shuffle(numbers)
    other = schedule(11, accumulation=2, shuffle=True)
    assert {number: other.step(number) for number in numbers} == dict(enumerate(all_steps))


def test_orders_differ_between_epochs_clients_and_seeds():
    def order(**more):
        batches = schedule(50, batch_size=50, shuffle=True, **more)
        return [tuple(batches.step(epoch)[0]) for epoch in range(2)]

    orders = [*order(), *order(client="b"), *order(seed=1)]
    assert len(set(orders)) == 6
    assert order() == orders[:2]


def test_an_order_is_the_same_in_every_process():
    """Written down once: another order would make a resumed run another run."""
    [micro] = schedule(8, batch_size=8, shuffle=True, client="clinic-a", seed=7).step(3)
    assert micro == [7, 0, 1, 2, 4, 5, 3, 6]


def test_a_client_without_examples():
    with pytest.raises(DataError, match="Client 'a' has no examples"):
        schedule(0)


# --- the evaluation part and the fingerprint -------------------------------------------------------------------------


def test_split_eval():
    assert split_eval(range(10), 0.3, 0, False) == ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9])
    assert len(split_eval(range(100), 0.07, 0, False)[1]) == 7  # 0.07 * 100 is more than 7 in floating point
    assert split_eval(range(2), 0.01, 0, False) == ([0], [1])
    train, held_out = split_eval(range(100), 0.25, 3, True)
    assert (train, held_out) == (sorted(train), sorted(held_out))
    assert sorted(train + held_out) == list(range(100))
    assert held_out != list(range(75, 100))
    assert (train, held_out) == split_eval(range(100), 0.25, 3, True)
    assert held_out != split_eval(range(100), 0.25, 4, True)[1]
    for rows, fraction in [([1], 0.5), ([], 0.5), ([1, 2], 0.9)]:
        with pytest.raises(DataError, match="Both need at least one"):
            split_eval(rows, fraction, 0, False)


def test_fingerprint_tells_examples_apart():
    different = [
        [],
        [Example([], labels=[])],
        [Example([1, 2], labels=[1, 2])],
        [Example([1, 2], labels=[1, 3])],
        [Example([1], labels=[1]), Example([2], labels=[2])],
        [Example([2], labels=[2]), Example([1], labels=[1])],
        [Example([1, 2], labels=[1, 2], position_ids=[0, 1])],
        [Example([1, 2], labels=[1, 2], position_ids=[0, 0])],
        [Example([1, 2], label=0)],
        [Example([1, 2], label=1)],
        [Example([1, 2])],
    ]
    assert len({fingerprint(examples) for examples in different}) == len(different)
    assert fingerprint([Example((1, 2), labels=(1, 2))]) == fingerprint(different[2])
    code = (
        "from cutlayer.contracts import Example; from cutlayer.data.batches import fingerprint;"
        "print(fingerprint([Example([1, 2], labels=[1, 2])]))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert elsewhere.stdout.strip() == fingerprint(different[2])
