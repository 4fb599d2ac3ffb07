"""Files and globs become rows; every fault is one paragraph that says where."""

import csv
import gzip
import io
import json
import os

import pytest

from cutlayer.data.sources import load_rows, resolve_source
from cutlayer.errors import DataError
from shared import shared


def rows_of(source, format="text", columns=None, **more):
    return load_rows(str(source), format=format, columns=columns or {}, **more)


def put(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def put_gz(path, text):
    path.write_bytes(gzip.compress(text.encode()))
    return path


ROWS = [{"text": "one"}, {"text": "zwei, «drei»"}, {"text": 'a "quote"\nand a line'}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.jsonl", "\n" + JSONL.replace("\n", "\n\n")),
        ("a.jsonl", "\ufeff" + JSONL),
        ("a.jsonl", JSONL.replace("\n", "\r\n")),
        ("a.json", JSONL),
        ("a.json", "\n" + json.dumps(ROWS, indent=2)),
        ("A.CSV", as_csv(ROWS)),
        ("a.csv", "\ufeff" + as_csv(ROWS)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content, packed):
    path = put_gz(tmp_path / f"{name}.gz", content) if packed else tmp_path / name
    if not packed:
        path.write_bytes(content.encode())
    assert rows_of(path) == ROWS
    assert os.listdir(tmp_path) == [path.name]  # no cache beside the user's data


def test_parquet_with_nested_values(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "split=a"  # must not become a column
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "n": 3}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    assert rows_of(folder / "a.parquet", "messages") == rows
    put(tmp_path / "b.parquet", "this is not parquet")
    with pytest.raises(DataError, match=r"b\.parquet is not a whole Parquet file"):
        rows_of(tmp_path / "b.parquet", "messages")


def test_text_is_one_line_one_row_as_it_stands(tmp_path):
    text = " = Title = \n\n  \t\nfirst\x0b\u2028still first\r\nlast, no line end  "
    wanted = [{"text": " = Title = "}, {"text": "first\x0b\u2028still first"}, {"text": "last, no line end  "}]
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert rows_of(tmp_path / "a.txt") == wanted
    assert rows_of(put_gz(tmp_path / "b.txt.gz", text)) == wanted


def test_columns_are_added_under_our_names_and_the_files_stay(tmp_path):
    path = put(tmp_path / "a.jsonl", '{"prompt": "P", "ref": "R", "topic": 3}\n')
    swapped = rows_of(path, "prompt-completion", {"prompt": "ref", "completion": "prompt"})
    assert swapped == [{"prompt": "R", "completion": "P", "ref": "R", "topic": 3}]
    path = put(tmp_path / "b.jsonl", '{"text": "t", "topic": 3}\n')
    assert rows_of(path, "text", {"label": "topic"})[0]["label"] == 3  # for a division over labels


def test_a_glob_reads_its_files_in_sorted_order(tmp_path, monkeypatch):
    folder = tmp_path / "odd [1] name"
    folder.mkdir()
    for name in ("part-10.txt", "part-2.txt", "other.txt"):
        put(folder / name, name)
    (folder / "part-x").mkdir()
    wanted = [{"text": "part-10.txt"}, {"text": "part-2.txt"}]
    assert rows_of("part-*", base=folder) == wanted
    monkeypatch.chdir(folder)
    assert rows_of("part-*.txt") == wanted
    assert rows_of(resolve_source("part-*.txt", None)) == wanted
    with pytest.raises(DataError, match=r"No file matches the glob 'none-\*' in .*Check"):
        rows_of("none-*")


def test_relative_paths_are_looked_for_here_first_and_then_beside_the_run_file(tmp_path, monkeypatch):
    here, base = tmp_path / "here", tmp_path / "base"
    here.mkdir()
    base.mkdir()
    monkeypatch.chdir(here)
    put(base / "a.txt", "from base")
    assert rows_of("a.txt", base=base) == [{"text": "from base"}]
    assert resolve_source("a.txt", base) == str(base / "a.txt")
    put(here / "a.txt", "from here")
    assert rows_of("a.txt", base=base) == [{"text": "from here"}]
    assert resolve_source("../here/a.txt", base) == str(here / "a.txt")
    put(here / "b[0].txt", "brackets in a name")
    assert rows_of("b[0].txt", base=base) == [{"text": "brackets in a name"}]
    assert resolve_source("owner/name", base) == "owner/name"
    assert resolve_source("owner/name:config", base) == "owner/name:config"
    with pytest.raises(DataError, match=r"'owner/a\.jsonl\.gz' is no file here"):
        resolve_source("owner/a.jsonl.gz", base)
    with pytest.raises(DataError, match=r"'name' is no file here .*owner/name"):
        resolve_source("name", None)


def test_blank_texts_are_dropped_and_said(tmp_path, caplog):
    path = put(tmp_path / "a.jsonl", '{"text": " "}\n{"text": "x"}\n{"text": ""}\n')
    assert rows_of(path) == [{"text": "x"}]
    assert "2 of 3 rows have blank text" in caplog.text


def test_whole_number_labels_of_a_csv_file_are_numbers(tmp_path):
    head = "text,label\n"
    numbers = put(tmp_path / "a.csv", head + "x,10\ny,2\n")
    assert [row["label"] for row in rows_of(numbers, "classification")] == [10, 2]
    texts = put(tmp_path / "b.csv", head + "x,10\ny,02\n")
    assert [row["label"] for row in rows_of(texts, "classification")] == ["10", "02"]
    verbatim = put(tmp_path / "c.csv", head + "NA,n\n12,null\n")
    assert rows_of(verbatim, "classification") == [{"text": "NA", "label": "n"}, {"text": "12", "label": "null"}]


@pytest.mark.parametrize(
    ("name", "content", "format", "columns", "said"),
    [
        ("a.txt", "", "text", {}, r"a\.txt has no row"),
        ("a.txt", " \n\n", "text", {}, r"a\.txt has no row"),
        ("a.jsonl", "\n", "text", {}, r"a\.jsonl has no row"),
        ("a.jsonl", '{"text": ""}', "text", {}, r"a\.jsonl has no row"),
        ("a.csv", "text,label\n", "text", {}, r"a\.csv has no row"),
        ("a.json", "[]", "text", {}, r"a\.json has no row"),
        ("a.tsv", "x", "text", {}, r"a\.tsv has an ending that cannot be read"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', "text", {}, r"a\.jsonl, line 3 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n"y"\n', "text", {}, r"a\.jsonl, line 2 is a str, not an object"),
        ("a.json", '[{"text": "x"},\n {"text": }]', "text", {}, r"a\.json, line 2 is not JSON"),
        ("a.json", '[{"text": "x"}, 3]', "text", {}, r"a\.json, row 2 is a int"),
        ("a.jsonl", '{"txt": "x", "id": 1}', "text", {}, r"no column 'text'. Did you mean 'txt'\? .*there: txt, id\."),
        (
            "a.jsonl",
            '{"text": "x"}',
            "text",
            {"text": "body"},
            r"no column 'body'\. .*there: text\. Set data\.columns: \{t",
        ),
        ("a.jsonl", '{"text": "x"}', "text", {"label": "no"}, r"no column 'no'"),
        ("a.jsonl", '{"text": "x"}', "text", {"txet": "a"}, r"columns names 'txet'.* Did you mean 'text'\?"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', "text", {}, r"a\.jsonl, line 2: the column 'text' holds a int"),
        ("a.jsonl", '{"b": "x"}\n{"b": null}', "text", {"text": "b"}, r"line 2: the column 'b' is missing or empty"),
        ("a.jsonl", '{"text": "x"}\n\n{"c": 3}', "text", {}, r"line 3: the column 'text' is missing"),
        ("a.jsonl", '{"text": "x", "label": 1.0}', "classification", {}, r"line 1: .*'label' holds 1\.0"),
        ("a.jsonl", '{"text": "x", "label": true}', "classification", {}, r"line 1: .*'label' holds True"),
        ("a.csv", "text,label\nx,0\ny,\n", "classification", {}, r"line 3: .*'label' is missing or empty"),
        ("a.csv", "text,label\nx\n", "classification", {}, r"line 2 has 1 values, the header has 2"),
        ("a.csv", 'text,label\n"x,0\n', "classification", {}, r"line 2 is not CSV"),
        ("a.csv", "text,text\nx,y\n", "text", {}, r"twice in its header"),
        ("a.jsonl", '{"messages": "hi"}', "messages", {}, r"holds a str, not a list of messages"),
        ("a.jsonl", '{"messages": []}', "messages", {}, r"holds an empty list"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "messages", {}, r"message 1 whose 'content' is not text"),
        ("a.jsonl", '{"text": "\\ud83d cut"}', "text", {}, r"line 1: .* half a character"),
        ("a.txt", "x", "prompt-completion", {}, r"no column 'prompt'\. .*there: text"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, format, columns, said):
    path = put(tmp_path / name, content)
    with pytest.raises(DataError, match=said) as caught:
        rows_of(path, format, columns)
    assert str(tmp_path) in str(caught.value) or "data.columns names" in str(caught.value)


def test_damaged_files_and_folders(tmp_path):
    whole = gzip.compress(JSONL.encode() * 50)
    for name, content, said in [
        ("cut.jsonl.gz", whole[:-20], "not a whole gzip file"),
        ("plain.jsonl.gz", b"{}", "not a whole gzip file"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} is {said}"):
            rows_of(tmp_path / name)
    with pytest.raises(DataError, match="is a folder"):
        rows_of(tmp_path)
    with pytest.raises(DataError, match="is no file here"):
        rows_of(tmp_path / "absent.jsonl")


def test_long_csv_values_and_the_limit_of_the_csv_module(tmp_path):
    before = csv.field_size_limit()
    assert rows_of(put(tmp_path / "a.csv", f"text\n{'x' * 300_000}\n")) == [{"text": "x" * 300_000}]
    assert csv.field_size_limit() == before


def test_real_files():
    assert len(rows_of(shared("data/wikitext-2/valid.txt.gz"))) == 2461  # 3,760 lines, 1,299 of them blank
    rows = rows_of(shared("data/e2e/valid.jsonl.gz"), "prompt-completion", {"prompt": "context", "completion": "ref"})
    assert len(rows) == 4672
    assert rows[0]["prompt"] == rows[0]["context"]
