"""Rows become token ids and labels that one can check by hand. The tokenizers are those of ``conftest.py``."""

import random

import pytest

from cutlayer.config import DataConfig
from cutlayer.contracts import IGNORE
from cutlayer.data.classes import label_names
from cutlayer.data.formats import tokenize
from cutlayer.errors import DataError
from shared import shared

EOS, BOS, A, B, C, D, E, USER, BOT, SAYS, STOP = 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12


def config(format="text", **more):
    return DataConfig(train="x.jsonl", format=format, **more)


def causal(rows, tokenizer, **settings):
    """(ids, labels) of each row, with 0 for IGNORE, to be read at a glance."""
    examples = tokenize(rows, config(**settings), tokenizer, task="causal", where="x.jsonl")
    return [(list(e.input_ids), [0 if label == IGNORE else label for label in e.labels]) for e in examples]


def test_text_is_the_tokenizers_output_and_an_end(words, words_with):
    rows = [{"text": "a b c d"}, {"text": "e"}]
    assert causal(rows, words) == [([A, B, C, D, EOS],) * 2, ([E, EOS],) * 2]
    assert causal(rows, words, append_eos=False) == [([A, B, C, D],) * 2, ([E],) * 2]
    assert causal(rows, words, max_length=5)[0][0] == [A, B, C, D, EOS]
    assert causal(rows, words, max_length=4)[0][0] == [A, B, C, EOS]  # the end counts
    assert causal(rows, words, max_length=4, append_eos=False)[0][0] == [A, B, C, D]
    assert causal(rows, words_with(bos=True))[1][0] == [BOS, E, EOS]
    assert causal(rows, words_with(eos=False))[1][0] == [E]  # there is no such token


def test_an_end_that_is_there_is_not_doubled(words, words_with):
    ending = words_with(bos=True, ends_itself=True)
    assert causal([{"text": "a b"}], ending)[0][0] == [BOS, A, B, EOS]
    assert causal([{"text": "a b"}], ending, max_length=3)[0][0] == [BOS, A, EOS]
    assert causal([{"text": "a b <eos>"}], words)[0][0] == [A, B, EOS]


def test_prompt_and_completion(words, words_with):
    rows = [{"prompt": "a b ", "completion": "c d"}]
    settings = {"format": "prompt-completion"}
    assert causal(rows, words, **settings) == [([A, B, C, D, EOS], [0, 0, C, D, EOS])]
    assert causal(rows, words, completion_only=False, **settings) == [([A, B, C, D, EOS],) * 2]
    assert causal(rows, words, append_eos=False, **settings) == [([A, B, C, D], [0, 0, C, D])]
    assert causal(rows, words_with(bos=True), **settings) == [([BOS, A, B, C, D, EOS], [0, 0, 0, C, D, EOS])]
    # a tokenizer that ends every text: once, and it belongs to the completion
    ending = words_with(ends_itself=True)
    assert causal(rows, ending, **settings) == [([A, B, C, D, EOS], [0, 0, C, D, EOS])]
    assert causal(rows, ending, append_eos=False, **settings) == [([A, B, C, D, EOS], [0, 0, C, D, EOS])]
    # a shortened answer is not finished, so it has no end
    assert causal(rows, words, max_length=4, **settings) == [([A, B, C, D], [0, 0, C, D])]


def test_empty_prompts_and_completions(words, words_with):
    rows = [{"prompt": "", "completion": "c"}, {"prompt": "a", "completion": ""}]
    settings = {"format": "prompt-completion"}
    assert causal(rows, words, **settings) == [([C, EOS], [C, EOS]), ([A, EOS], [0, EOS])]
    assert causal(rows, words_with(ends_itself=True), **settings) == [([C, EOS], [C, EOS]), ([A, EOS], [0, EOS])]


def test_a_token_over_the_border_belongs_to_the_completion(bytewise):
    rows = [{"prompt": "q ", "completion": "yes"}, {"prompt": "q", "completion": " yes"}]
    q, yes, eos = (bytewise.convert_tokens_to_ids(token) for token in ("q", "Ġyes", "<eos>"))
    # alone, the first prompt is "q" and " "; joined, the blank is part of " yes"
    assert causal(rows, bytewise, format="prompt-completion") == [([q, yes, eos], [0, yes, eos])] * 2


def test_a_tokenizer_without_offsets():
    """ByT5's is written in Python, one token a byte, and ends every text with its end, 1."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    [(ids, labels)] = causal([{"prompt": "é ", "completion": "ab"}], tokenizer, format="prompt-completion")
    assert tokenizer.is_fast is False
    assert ids == [*(byte + 3 for byte in "é ab".encode()), 1]
    assert labels == [0, 0, 0, *ids[3:]]
    for template in (PLAIN, MARKED.replace("{% endif %}{% endfor %}", "{% endif %}{% endfor %}" + PROMPT)):
        ids, labels = chats(CHAT[:2], tokenizer, template)
        assert [chr(token - 3) if token > 3 else token for token in ids[-11:]] == [*"nt : b c ;", 1]
        assert labels == [0] * (len(ids) - 7) + ids[-7:]


def test_borders_of_random_texts_against_characters(bytewise):
    """Without a token over the border, the labelled tokens are exactly the completion's characters."""
    chance = random.Random(0)
    rows = [
        {"prompt": "".join(chance.choices("yes q", k=9)) + ":", "completion": "".join(chance.choices("yesq é", k=5))}
        for _ in range(200)
    ]
    for row, (ids, labels) in zip(rows, causal(rows, bytewise, format="prompt-completion"), strict=True):
        assert bytewise.decode(ids[:-1]) == row["prompt"] + row["completion"]
        assert bytewise.decode([label for label in labels[:-1] if label]) == row["completion"]
        assert ids[-1] == labels[-1] == bytewise.eos_token_id


# --- messages -------------------------------------------------------------------------------------------------------

PROMPT = "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' ;' }}{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'assistant : ' }}"
    "{% generation %}{{ m.content + ' ;' }}{% endgeneration %}"
    "{% else %}{{ m.role + ' : ' + m.content + ' ;' }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]
CHAT_IDS = [USER, SAYS, A, STOP, BOT, SAYS, B, C, STOP, USER, SAYS, D, STOP, BOT, SAYS, E, STOP]
CHAT_LABELS = [0, 0, 0, 0, 0, 0, B, C, STOP, 0, 0, 0, 0, 0, 0, E, STOP]


def chats(messages, tokenizer, template, **settings):
    tokenizer.chat_template = template
    return causal([{"messages": messages}], tokenizer, format="messages", **settings)[0]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistants_turns_count(words, template):
    assert chats(CHAT, words, template) == ([*CHAT_IDS, EOS], [*CHAT_LABELS, EOS])
    assert chats(CHAT, words, template, append_eos=False) == (CHAT_IDS, CHAT_LABELS)
    assert chats(CHAT, words, template, completion_only=False) == ([*CHAT_IDS, EOS],) * 2
    assert chats(CHAT, words, template, max_length=8) == (CHAT_IDS[:8], CHAT_LABELS[:8])
    assert chats(CHAT[:3], words, template) == ([*CHAT_IDS[:13], EOS], [*CHAT_LABELS[:13], 0])  # the user spoke last


@pytest.mark.parametrize("end", ["<eos>", "<eos>\n"])
def test_an_end_that_the_template_writes_is_not_doubled(words, end):
    answers_end = PLAIN.replace("' ;'", "(' ; ' if m.role == 'user' else ' " + end.replace("\n", "\\n") + "')")
    ids, labels = chats(CHAT[:2], words, answers_end)
    assert ids == [USER, SAYS, A, STOP, BOT, SAYS, B, C, EOS]
    assert labels == [0, 0, 0, 0, 0, 0, B, C, EOS]


def test_the_templates_own_beginning_is_the_only_one(words_with):
    assert chats(CHAT, words_with(bos=True), "{{ bos_token }}" + PLAIN)[0] == [BOS, *CHAT_IDS, EOS]


def test_a_template_without_a_generation_prompt(words):
    """The assistant's name then counts too: nothing tells it from the answer."""
    template = PLAIN.split("{% if")[0]
    assert chats(CHAT[:2], words, template, append_eos=False)[1] == [0, 0, 0, 0, BOT, SAYS, B, C, STOP]


def test_a_turn_whose_first_token_reaches_back(bytewise):
    """With "A: " before it the answer "yes" is the token " yes", which counts."""
    bytewise.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ': ' + m.content + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
    )
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    [(ids, labels)] = causal([{"messages": talk}], bytewise, format="messages", append_eos=False)
    assert bytewise.convert_ids_to_tokens(ids) == ["u", ":", "Ġ", "q", ";", "a", ":", "Ġyes", ";"]
    assert labels == [0] * 7 + ids[7:]


def test_templates_that_cannot_be_used(words):
    with pytest.raises(DataError, match="The tokenizer has no chat template"):
        causal([{"messages": CHAT}], words, format="messages")
    forgets = "{% for m in messages %}{{ m.role if not loop.last else m.role + ' : ' + m.content }} {% endfor %}"
    with pytest.raises(DataError, match=r"x\.jsonl, row 1: the chat template writes message 2 .*\{% generation %\}"):
        chats(CHAT, words, forgets)
    assert chats(CHAT[:2], words, forgets, completion_only=False, append_eos=False)[0] == [USER, BOT, SAYS, B, C]
    with pytest.raises(DataError, match="row 1: the chat template does not take these messages: roles must alternate"):
        chats(CHAT, words, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="starts with the assistant"):
        chats(CHAT[1:], words, PLAIN)
    assert chats(CHAT[1:], words, MARKED)[1][:5] == [0, 0, B, C, STOP]


# --- classification --------------------------------------------------------------------------------------------------


def classes(rows, tokenizer, names=None, **settings):
    settings = config("classification", **settings)
    numbers = None if names is None else {name: number for number, name in enumerate(names)}
    examples = tokenize(rows, settings, tokenizer, task="classification", where="x.jsonl", classes=numbers)
    assert all(example.labels is None for example in examples)
    return [(list(example.input_ids), example.label) for example in examples]


def test_classification_takes_the_models_own_special_tokens(words_with):
    tokenizer = words_with(bos=True, ends_itself=True)
    tokenizer.truncation_side = "left"
    rows = [{"text": "a b c", "label": "pos"}, {"text": "d", "label": "neg"}]
    assert classes(rows, tokenizer) == [([BOS, A, B, C, EOS], 1), ([BOS, D, EOS], 0)]
    assert classes(rows, tokenizer, max_length=4)[0] == ([BOS, A, B, EOS], 1)
    assert tokenizer.truncation_side == "left"
    assert classes(rows, tokenizer, names=["pos", "neg", "mixed"])[0][1] == 0
    assert classes([{"text": "a", "label": 1}], words_with(), names=["0", "1"]) == [([A], 1)]
    with pytest.raises(DataError, match=r"x\.jsonl, row 2: the label 'neg' is not among the classes pos\."):
        classes(rows, tokenizer, names=["pos"])


def test_label_names(caplog):
    def names(*labels):
        return label_names([{"label": label} for label in labels])

    assert names("b", "a", "b") == ["a", "b"]
    assert names(*range(11), 3) == [str(number) for number in range(11)]
    assert not caplog.text
    assert names(3, 0) == ["0", "1", "2", "3"]
    assert "No row has the label 1" in caplog.text
    assert label_names([{"topic": "x"}], "topic") == ["x"]
    with pytest.raises(DataError, match="mixes numbers and texts, such as 1 and 'a'"):
        names(1, "a")
    with pytest.raises(DataError, match="holds -1"):
        names(-1, 0)
    with pytest.raises(DataError, match="no rows"):
        names()


def test_format_and_task_must_agree(words):
    row = [{"text": "a", "label": 0}]
    with pytest.raises(DataError, match="'text', but the model's task is classification"):
        tokenize(row, config("text"), words, task="classification", where="x")
    with pytest.raises(DataError, match="'classification', but the model's task is causal"):
        tokenize(row, config("classification"), words, task="causal", where="x")


def test_no_rows(words):
    with pytest.raises(DataError, match=r"x\.jsonl has no rows"):
        causal([], words)


def test_rows_without_labels_stay_in_place_and_are_counted(words, caplog):
    rows = [{"prompt": "a b c ", "completion": "d"}, {"prompt": "a ", "completion": "d"}]
    kept = causal(rows, words, format="prompt-completion", max_length=3)
    assert kept == [([A, B, C], [0, 0, 0]), ([A, D, EOS], [0, D, EOS])]
    assert "x.jsonl: 1 of 2 rows have no token that the loss counts" in caplog.text
    with pytest.raises(DataError, match=r"No row of x\.jsonl has a token that the loss counts"):
        causal(rows[:1], words, format="prompt-completion", max_length=3)
    with pytest.raises(DataError, match="No row"):
        causal([{"text": "a"}], words, append_eos=False)  # one token predicts nothing
    empty = {"prompt": "", "completion": ""}
    with pytest.raises(DataError, match=r"x\.jsonl, row 2 gives no token at all"):
        causal([rows[0], empty], words, format="prompt-completion", append_eos=False)


def test_real_text_as_the_tokenizer_gives_it():
    from transformers import AutoTokenizer

    from cutlayer.data.sources import load_rows

    tokenizer = AutoTokenizer.from_pretrained(shared("models/llama-tiny-wt2"))
    path = str(shared("data/e2e/valid.jsonl.gz"))
    columns = {"prompt": "context", "completion": "ref"}
    rows = load_rows(path, columns=columns, format="prompt-completion")[:300]
    examples = tokenize(rows, config("prompt-completion"), tokenizer, task="causal", where=path)
    for row, one in zip(rows, examples, strict=True):
        assert list(one.input_ids) == [*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id]
        labelled = [label for label in one.labels if label != IGNORE]
        # "... friendly: no" and "coffee" share the token "oc", which counts: then the text starts a little earlier
        assert tokenizer.decode(labelled[:-1]).endswith(row["completion"])
        assert len(tokenizer.decode(labelled[1:-1])) < len(row["completion"])
