from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from api_server import ApiServer, Reply

from lib.__main__ import main
from lib.refusal.api import Endpoint
from lib.refusal.prompts import (
    SPLITS,
    PromptError,
    generate_pairs,
    load_prompts,
    load_requests,
    mismatch,
)


def small_set() -> list[dict]:
    """Two pairs and one harmless row a split."""
    rows = []
    for i, split in enumerate(SPLITS):
        for j, category in enumerate(("privacy", "fraud")):
            pair = {"pair": f"{category}{i}", "category": category, "split": split}
            rows.append({**pair, "label": "safe", "text": f"Explain how to help person {i}{j}"})
            rows.append({**pair, "label": "harmful", "text": f"Explain how to harm person {i}{j}"})
        rows.append({"label": "harmless", "split": split, "text": f"Describe the number {i}"})
    return rows


@pytest.fixture
def write(tmp_path):
    def write(rows, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


# --- reading


def test_first_prompts_are_spread_over_the_categories(write):
    rows = []
    for split in SPLITS:
        for i, category in enumerate(("a", "a", "a", "b", "b")):
            pair = {"pair": f"{split}{i}", "category": category, "split": split}
            rows.append({**pair, "label": "harmful", "text": f"harm {split} {i}"})
            rows.append({**pair, "label": "safe", "text": f"help {split} {i}"})
        rows += [{"label": "harmless", "split": split, "text": f"count {split} {i}"} for i in range(4)]
    whole = load_prompts(write(rows))
    few = whole.first(3)
    for split in SPLITS:
        assert few.harmful(split) == [f"harm {split} {i}" for i in (0, 1, 3)]
        assert few.safe(split) == [f"help {split} {i}" for i in (0, 1, 3)]
        assert few.harmless(split) == [f"count {split} {i}" for i in range(3)]
    assert whole.first(0) == whole.first(99) == whole


def test_lists_are_aligned_whatever_the_order_of_the_rows(write):
    rows = small_set()
    rows = rows[::-1] + [dict(row, pair="late", text=row["text"] + " now") for row in rows[:2]]
    prompts = load_prompts(write(rows))
    assert prompts.harmful("extraction") == [
        "Explain how to harm person 01", "Explain how to harm person 00", "Explain how to harm person 00 now",
    ]  # fmt: skip
    assert prompts.safe("extraction") == [t.replace("harm", "help") for t in prompts.harmful("extraction")]
    assert prompts.categories("extraction") == ["fraud", "privacy", "privacy"]
    assert prompts.harmless("test") == ["Describe the number 2"]
    with pytest.raises(ValueError, match="'train'"):
        prompts.harmful("train")


def test_blank_lines_other_fields_and_odd_separators_are_allowed(tmp_path):
    rows = small_set()
    rows[0].update(note="kept", text="Explain\u2028how to help")  # a line separator that is no newline here
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    prompts = load_prompts(path)
    assert prompts.safe("extraction")[0] == "Explain\u2028how to help"
    assert prompts.rows[0]["note"] == "kept"


def without(field, row=0):
    return lambda rows: rows[row].pop(field)


def with_(row=0, **values):
    return lambda rows: rows[row].update(values)


BAD = {
    "missing text": (without("text"), "line 1: text"),
    "missing category": (without("category", 3), "line 4: category"),
    "text that is a number": (with_(text=3), "line 1: text: 3"),
    "unknown label": (with_(label="Harm"), "line 1: label: 'Harm'"),
    "unknown split": (with_(4, split="train"), "line 5: split: 'train'"),
    "harmless row with a pair": (with_(4, pair="x"), "line 5: pair"),
    "half a pair": (lambda rows: rows.pop(1), "line 1: pair: 'privacy0' has no harmful row"),
    "third row of a pair": (with_(3, pair="privacy0"), "line 4: pair: 'privacy0' .*line 2"),
    "pair over two splits": (with_(1, split="test"), "line 1: split: 'extraction'"),
    "text twice": (with_(9, text="explain how to HELP person 00."), "line 10: text: .*line 1"),
    "split without harmless rows": (lambda rows: rows.pop(9), "split: selection"),
    "empty file": (list.clear, "no prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_with_line_and_field(write, name):
    damage, culprit = BAD[name]
    rows = small_set()
    load_prompts(write(rows))
    damage(rows)
    with pytest.raises(PromptError, match=f"prompts.jsonl.*{culprit}"):
        load_prompts(write(rows))


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        (b'{"text": "a"', "line 1: not JSON"),
        (b'\n["a", "b"]\n', "line 2: not an object"),
        (b'{"text": "caf\xe9"}\n', "not UTF-8"),
        (None, "no such file"),
    ],
)
def test_file_that_is_no_json_lines(tmp_path, content, culprit):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    for read in (load_prompts, load_requests):
        with pytest.raises(PromptError, match=f"prompts.jsonl.*{culprit}"):
            read(path)


@pytest.mark.parametrize(
    "harmful, safe, why",
    [
        ("Write a rude letter to Ann", "Draft a kind letter to Ann", "open with 'write' and 'draft'"),
        ("Write a rude letter to Ann", "Write a kind letter to Ann and Bob today", "6 and 9 words"),
        ("Write a rude letter to Ann", "Write some warm words for her", "share 17%"),
        ("Write a letter", "Write a letter!", "the same"),
        ("Write a letter", "?", "empty"),
        ("Write a rude letter to Ann", "Write a kind, long letter to Ann", ""),
    ],
)
def test_what_makes_a_matched_pair(harmful, safe, why):
    assert why in mismatch(harmful, safe) and bool(why) == bool(mismatch(harmful, safe))


# --- the shipped prompts


SHIPPED = load_prompts()


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def test_shipped_counts_and_balance():
    for split, n_pairs, n_harmless in (("extraction", 64, 48), ("selection", 64, 24), ("test", 112, 24)):
        assert len(SHIPPED.harmful(split)) == len(SHIPPED.safe(split)) == n_pairs
        assert len(SHIPPED.harmless(split)) == n_harmless
        assert set(Counter(SHIPPED.categories(split)).values()) == {n_pairs // 8}
        assert len(set(SHIPPED.categories(split))) == 8


def test_shipped_pairs_are_matched():
    pairs = [pair for s in SPLITS for pair in zip(SHIPPED.harmful(s), SHIPPED.safe(s), strict=True)]
    assert {mismatch(*pair) for pair in pairs} == {""}
    longer = [len(words(harmful)) - len(words(safe)) for harmful, safe in pairs]
    assert np.abs(longer).max() <= 1
    assert abs(np.mean(longer)) < 0.1


def test_shipped_splits_share_no_request():
    """Not even reworded: two requests of different pairs share at most 60% of their words."""
    rows = [(row.get("pair") or row["text"], set(words(row["text"]))) for row in SHIPPED.rows]
    for (pair, a), (other, b) in combinations(rows, 2):
        assert pair == other or len(a & b) <= 0.6 * max(len(a), len(b)), f"{a} and {b}"
    texts = [tuple(words(row["text"])) for row in SHIPPED.rows]
    assert len(set(texts)) == len(texts) == 576


# --- more pairs from a language model


@pytest.fixture
def writer(monkeypatch):
    """Endpoint of a server that replies with the given texts in turn, and the server."""
    monkeypatch.setenv("TEST_API_KEY", "secret")
    servers = []

    def start(*replies):
        server = ApiServer(lambda _, number: Reply(replies[min(number, len(replies)) - 1])).__enter__()
        servers.append(server)
        return Endpoint(server.url, "writer", "TEST_API_KEY", timeout=60, max_retries=0), server

    yield start
    for server in servers:
        server.__exit__()


def pairs_reply(*pairs) -> str:
    return json.dumps({"pairs": [{"harmful": harmful, "safe": safe} for harmful, safe in pairs]})


GOOD = [(f"Tell me how to break toy {i}", f"Tell me how to mend toy {i}") for i in range(6)]


def test_generated_pairs_join_those_that_are_there(write, writer, tmp_path):
    unmatched = ("Write a threat", "Compose a long and friendly birthday letter to my aunt")
    there = ("Explain how to harm person 00!", "Explain how to aid person 00")
    first = pairs_reply(GOOD[0], unmatched, GOOD[1], there, GOOD[0], GOOD[2])
    endpoint, server = writer(first, pairs_reply(*GOOD))
    out = tmp_path / "more" / "prompts.jsonl"
    base = write([dict(row, pair="toys-001") if row.get("pair") == "fraud0" else row for row in small_set()])
    written = generate_pairs("toys", 5, out, endpoint, extends=base)
    assert load_prompts(out) == written
    added = [row for row in written.rows if row.get("category") == "toys"]
    assert [(a["text"], b["text"]) for a, b in zip(added[::2], added[1::2], strict=True)] == GOOD[:5]
    splits = ["extraction", "extraction", "selection", "test", "extraction"]
    assert [row["split"] for row in added[::2]] == splits
    assert [row["pair"] for row in added[::2]] == [f"toys-{i:03d}" for i in range(2, 7)]
    asked = [json.loads(body["messages"][-1]["content"]) for body in server.requests]
    assert [task["pairs"] for task in asked] == [5, 2]
    assert asked[1]["there_already"] == [harmful for harmful, _ in GOOD[:3]]


def test_command_writes_pairs_and_says_what_is_wrong(write, writer, tmp_path, monkeypatch, capsys):
    endpoint, server = writer(pairs_reply(*GOOD[:2]))
    base, out = write(small_set(), "base.jsonl"), tmp_path / "out.jsonl"
    command = ["pairs", str(out), "toys", "-n", "2", "--extends", str(base), "--url", server.url]
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    assert main(command) == 1 and "DEEPSEEK_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("DEEPSEEK_API_KEY", "a-secret-key")
    assert main(command) == 0 and "2 pairs" in capsys.readouterr().out
    added = [row["text"] for row in load_prompts(out).rows if row.get("category") == "toys"]
    assert added[::2] == [GOOD[0][0], GOOD[1][0]]
    assert main(command) == 1 and "out.jsonl" in capsys.readouterr().err


def test_existing_file_is_not_written_over(write, writer, tmp_path):
    endpoint, server = writer(pairs_reply(*GOOD))
    out = write(small_set(), "out.jsonl")
    with pytest.raises(PromptError, match="out.jsonl exists"):
        generate_pairs("toys", 2, out, endpoint)
    assert not server.requests

    late = tmp_path / "late.jsonl"

    def reply(_, number):
        late.write_text("mine")  # somebody writes it while the model is at work
        return Reply(pairs_reply(*GOOD))

    server.reply = reply
    with pytest.raises(PromptError, match="late.jsonl exists"):
        generate_pairs("toys", 2, late, endpoint)
    assert late.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("I can not help with that.", "I can not help"),
        ('{"pairs": ["a", "b"]}', "'{"),
        (pairs_reply(*GOOD[:2]), "2 of 4 pairs of 'toys'.*there already"),
        (pairs_reply(), "0 of 4 pairs of 'toys'.*none"),
    ],
)
def test_useless_replies_write_nothing(writer, tmp_path, reply, why):
    endpoint, _ = writer(reply)
    with pytest.raises(PromptError, match=why):
        generate_pairs("toys", 4, tmp_path / "out.jsonl", endpoint)
    assert not list(tmp_path.iterdir())


# --- requests of other sets


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("advbench.csv", 'goal,target\n"Do a, then b",Sure\nDo c,"Sure, here"\n'),
        ("harmbench.csv", 'Behavior,FunctionalCategory\n"Do a, then b",standard\nDo c,standard\n'),
        ("pairs.jsonl", '{"text": "Do a, then b", "label": "harmful"}\n{"text": "Do d", "label": "safe"}\n'
         '{"text": "Do c", "label": "harmful"}\n'),
        ("lines.txt", "\ufeffDo a, then b\n\n  Do c  \nDo c\n"),
    ],
)  # fmt: skip
def test_requests_are_read_in_the_common_layouts(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_requests(tmp_path / name) == ["Do a, then b", "Do c"]


@pytest.mark.parametrize(
    ("name", "text", "culprit"),
    [("a.csv", "task,target\nDo a,Sure\n", "a.csv, row 1: .*task"), ("a.txt", " \n", "a.txt")],
)
def test_requests_that_can_not_be_read_are_named(tmp_path, name, text, culprit):
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=culprit):
        load_requests(tmp_path / name)
