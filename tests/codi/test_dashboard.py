"""The dashboard: its numbers are those of the reading, and in a real browser texts stay texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from browser import chromium
from playwright.sync_api import Browser, Page, expect
from tiny_codi import N_LAYERS

from lib.codi.dashboard import dashboard_data, expression_trees, page
from lib.codi.decoding import attended
from lib.codi.explorer import codi_explorer
from lib.codi.latents import Answers
from lib.codi.problems import Equation, Problem
from lib.codi.readings import number_positions, read_thoughts

HOSTILE = [
    "</script><script>window.hit = 1</script>",
    "<script>window.hit = 2</script>",
    '<img src="x" onerror="window.hit = 3">',
    "\"quotes\" 'single' `ticks` ${window.hit = 4}",
    "&lt;b&gt; &amp; <b>bold</b> &#60;",
    "<!-- <script> -->",
    "{{DATA}} {{SCRIPT}} \\u003c \\",
    "\u2028\u202e\U0001f95a",  # the second one turns the direction of writing
]
Z2 = 2  # row of z_2


@pytest.fixture(scope="module")
def thoughts(thoughts):
    """Of the random model, with answers as a trained one writes them; a, b and d are right."""
    answers = ["The answer is : 19", "The answer is : 7", "The answer is : 15", "26", "?"]
    values = np.array([[19.0, 7.0, 15.0, 26.0, np.nan]])
    return replace(thoughts, answers=Answers(thoughts.answers.variants, [answers], values))


@pytest.fixture(scope="module")
def reading(codi, problems, thoughts):
    return read_thoughts(codi, problems, thoughts.z, layers=range(N_LAYERS), k=4)


@pytest.fixture(scope="module")
def data(codi, problems, thoughts, reading):
    return dashboard_data(codi, problems, thoughts, reading)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page in a window of its own; it must fetch nothing and run without an error."""
    contexts, errors, requests = [], [], []

    def open_page(html: str, *, scheme: str = "light", width: int = 1200) -> Page:
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        context.set_default_timeout(120_000)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        assert requests.pop(0) == path.as_uri()
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert requests == [], "the page needs more than itself"


def button(tab: Page, name: str, side: int = 0):
    return tab.get_by_role("button", name=name, exact=True).nth(side)


def menu(tab: Page, name: str):
    return tab.get_by_role("combobox", name=name)


def heats(tab: Page, side: int = 0) -> np.ndarray:
    """Share of the full colour of every token."""
    script = "(panel) => [...panel.querySelectorAll('.token')].map((t) => +t.style.getPropertyValue('--m'))"
    return np.array(tab.locator(".panel").nth(side).evaluate(script))


def texts(tab: Page, selector: str) -> list[str]:
    return tab.locator(selector).evaluate_all("(found) => found.map((element) => element.textContent)")


# -- numbers ---------------------------------------------------------------------------------------


def test_data_are_the_reading(codi, problems, reading, data):
    top = attended(reading, 5).positions
    for i, shown in enumerate(data["problems"]):
        assert shown["tokens"] == reading.texts[i]
        for row in range(len(reading.rows)):
            seen = reading.kinds[i][row] >= 0
            assert seen[: len(shown["attention"][row])].all() and seen.sum() == len(shown["attention"][row])
            np.testing.assert_allclose(
                np.array(shown["attention"][row]) / 1000, reading.attention[i][row][seen], atol=5.01e-4
            )
            kinds = [data["categories"][int(digit, 36)] for digit in shown["kinds"][row]]
            assert kinds == [reading.categories[kind] for kind in reading.kinds[i][row][seen]]
            assert shown["top"][row] == top[i, row].tolist()
            for layer in range(N_LAYERS):
                pairs = shown["lens"][layer][row]
                words = [data["words"][word] for word in pairs[::2]]
                assert words == [codi.token_texts[token] for token in reading.tokens[i, layer, row]]
                np.testing.assert_allclose(
                    np.array(pairs[1::2]) / 1000, reading.probabilities[i, layer, row], atol=5.01e-4
                )
    assert [problem["correct"] for problem in data["problems"]] == [True, True, False, True, False]
    assert [problem["twin"] for problem in data["problems"]] == [None, 2, 1, None, None]
    assert data["problems"][3]["results"] == ["16", "13", "26"]


def test_same_numbers_give_the_same_bytes(codi, problems, thoughts, reading, data):
    noise = np.float32(1e-7)
    again = replace(reading, attention=[a + noise for a in reading.attention])
    assert page(dashboard_data(codi, problems, thoughts, again)) == page(data)
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_what_does_not_belong_together_is_said_so(codi, problems, thoughts, reading):
    with pytest.raises(ValueError, match="4 problems"):
        dashboard_data(codi, problems[:4], thoughts, reading)
    with pytest.raises(ValueError, match="layers"):
        dashboard_data(codi, problems, thoughts, read_thoughts(codi, problems, thoughts.z, layers=[2, 0]))


def test_tree_goes_from_the_result_down_to_the_question(codi, problems):
    d = problems[3]  # "a box holds 12 nuts . Ann has 6 . she buys 10 more . he loses 3 pears . ?"
    positions = number_positions(codi, d)
    words = d.question.split()
    leaf = {n: {"value": n, "at": [words.index(n)]} for n in ("6", "10", "3")}
    first = {"step": 0, "text": "6+10", "value": "16", "of": [leaf["6"], leaf["10"]]}
    second = {"step": 1, "text": "16-3", "value": "13", "of": [first, leaf["3"]]}
    root = {"step": 2, "text": "13*2", "value": "26", "of": [second, {"value": "2", "at": []}]}
    assert expression_trees(d, positions) == [root]


def test_tree_shows_a_result_once_and_what_nothing_takes():
    steps = ("<<2+3=5>>", "<<5*5=25>>", "<<2*1.5=3>>")
    problem = Problem("x", "2 and 3 and 2", tuple(map(Equation.parse, steps)), 3.0)
    squared, last = expression_trees(problem, [[0], [2], [4]])
    assert [node["value"] for node in squared["of"]] == ["5", "5"]
    assert "of" in squared["of"][0] and squared["of"][1] == {"value": "5", "step": 0}
    assert last["of"] == [{"value": "2", "at": [0, 4]}, {"value": "1.5", "at": []}]


# -- in a browser ----------------------------------------------------------------------------------


def hostile_data(codi, problems, thoughts, reading) -> dict:
    """Every text that a model or a file of problems can bring in is markup."""
    n = len(codi.token_texts)
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        vocabulary = [f"{HOSTILE[token % len(HOSTILE)]} {token}" for token in range(n)]
        context.setitem(codi.__dict__, "token_texts", vocabulary)
        marked = [
            replace(
                problem,
                id=f"{HOSTILE[i]} {problem.id}",
                twin=f"{HOSTILE[3 - i]} {problem.twin}" if problem.twin else None,
                equations=(replace(problem.equations[0], left=HOSTILE[i + 1]), *problem.equations[1:]),
            )
            for i, problem in enumerate(problems)
        ]
        answers = replace(thoughts.answers, texts=[HOSTILE[2 : 2 + len(problems)]])
        shown = [[HOSTILE[j % len(HOSTILE)] for j in range(len(tokens))] for tokens in reading.texts]
        found = dashboard_data(
            codi, marked, replace(thoughts, answers=answers), replace(reading, texts=shown)
        )
    for problem, original in zip(found["problems"], problems, strict=True):  # questions that are markup
        problem["label"] = f"{HOSTILE[0]} {original.id}"
    return found | {"model": HOSTILE[1]}


@pytest.fixture(scope="module")
def hostile(codi, problems, thoughts, reading):
    found = hostile_data(codi, problems, thoughts, reading)
    assert found["problems"][1]["twin"] == 2
    return found


def check_texts(tab, hostile: dict, numbers: list[int]) -> None:
    """What the data say stands in the page as it is, and none of it ran."""
    shown = [hostile["problems"][i] for i in numbers]
    visible = [text.strip() for problem in shown for text in problem["tokens"]]
    assert texts(tab, ".token .word") == visible
    for problem, heading in zip(shown, texts(tab, "h2"), strict=True):
        assert heading.endswith(problem["id"])
    heads = tab.locator(".head")
    for problem, head in zip(shown, heads.all(), strict=True):
        assert f"wrote “{problem['wrote']}”" in head.text_content()
    trees = texts(tab, ".tree")
    for problem, tree in zip(shown, trees, strict=True):
        step = problem["tree"][0]
        while step.get("step"):
            step = step["of"][0]
        assert f" = {step['text']}" in tree
    words = {hostile["words"][word].strip() for word in shown[0]["lens"][-1][Z2][::2]}
    z2 = tab.get_by_role("row").filter(has=tab.get_by_role("button", name="z_2", exact=True)).first
    decoded = z2.get_by_role("cell").first.locator(".chip .word")
    assert set(decoded.evaluate_all("(found) => found.map((word) => word.textContent)")) == words
    x = "getBoundingClientRect().x"
    turned = f"(found) => found.filter((s) => s.{x} < s.previousSibling.{x}).length"
    assert tab.locator(".chip small").evaluate_all(turned) == 0, "a text turned the number behind it"
    assert tab.locator("main :is(script, img, style, iframe, a), main b").count() == 0
    assert tab.locator("script").count() == 2
    assert tab.evaluate("window.hit") is None


def test_markup_in_texts_is_text(visit, hostile):
    tab = visit(page(hostile))
    assert texts(tab, "option")[:5] == [problem["label"] for problem in hostile["problems"]]
    assert hostile["model"] in tab.locator("#about").text_content()
    check_texts(tab, hostile, [0])
    tab.keyboard.press("ArrowRight")
    tab.get_by_label("compare with twin").check()
    for name in ("layers of z_0", "layers of z_2"):
        button(tab, name).click()
    tab.locator(".token").nth(2).hover()
    assert HOSTILE[2] in tab.locator(".readout").first.text_content()
    check_texts(tab, hostile, [1, 2])
    assert tab.locator(".token").nth(1).get_attribute("title").endswith(HOSTILE[1])


def test_markup_in_texts_is_text_in_the_notebook(visit, hostile):
    *menus, frame = codi_explorer(hostile).children
    menus[2].value = 1
    tab = visit(f"<!doctype html><body>{frame.value}</body>")
    inner = tab.frames[1]
    inner.get_by_label("compare with twin").check()
    check_texts(inner, hostile, [1, 2])
    assert tab.evaluate("window.hit") is None
    assert tab.evaluate("document.body.childNodes.length") == 1
    reach = "() => { try { return Boolean(parent.document) } catch { return false } }"
    assert not inner.evaluate(reach), "the frame could reach the notebook"


def test_policy_stops_a_script_that_is_not_the_pages_own(browser, data):
    tab = browser.new_page()
    refused = []
    tab.on("console", lambda message: refused.append(message.text))
    tab.set_content(page(data).replace("</main>", "</main><script>window.hit = 1</script>"))
    assert tab.evaluate("window.hit") is None and "Content Security Policy" in refused[0]
    tab.close()


def test_heat_follows_the_state_under_the_mouse_and_the_focus(visit, data):
    tab = visit(page(data))
    problem = data["problems"][0]
    mean = np.zeros(len(problem["tokens"]))
    for row in range(7):
        mean[: len(problem["attention"][row])] += np.array(problem["attention"][row]) / 7
    np.testing.assert_allclose(heats(tab), mean / mean.max(), atol=1e-6)

    tab.locator("tr").filter(has=button(tab, "z_2")).hover()
    attention = np.array(problem["attention"][Z2], dtype=float)
    np.testing.assert_allclose(heats(tab)[: len(attention)], attention / attention.max(), atol=1e-6)
    assert (heats(tab)[len(attention) :] == 0).all()

    tab.mouse.move(0, 0)
    np.testing.assert_allclose(heats(tab), mean / mean.max(), atol=1e-6)
    button(tab, "z_2").focus()
    np.testing.assert_allclose(heats(tab)[: len(attention)], attention / attention.max(), atol=1e-6)


def test_rows_show_top_words_and_top_tokens(visit, data):
    tab = visit(page(data))
    menu(tab, "problem").select_option("1")
    problem = data["problems"][1]
    row = tab.locator("tr").filter(has=button(tab, "z_2"))
    decoded, attended_ = (row.get_by_role("cell").nth(i).locator(".chip .word") for i in (0, 1))
    lens = problem["lens"][-1][Z2]
    assert decoded.all_text_contents() == [data["words"][word] for word in lens[::2]]
    assert attended_.all_text_contents() == [problem["tokens"][i] for i in problem["top"][Z2][:4]]
    button(tab, "layers of z_2").click()
    layers = row.locator(".lens tr")
    assert layers.count() == N_LAYERS
    for layer in range(N_LAYERS):
        words = [data["words"][word] for word in problem["lens"][layer][Z2][::2]]
        assert layers.nth(layer).locator(".chip .word").all_text_contents() == words


def test_sink_can_be_left_out_and_is_reported(visit, data):
    tab = visit(page(data))
    found = ((i, z) for i, each in enumerate(data["problems"]) for z in range(7) if 0 in each["top"][z][:4])
    i, z = next(found)  # a state of the random model that has the first token among its four
    menu(tab, "problem").select_option(str(i))
    problem = data["problems"][i]
    button(tab, f"z_{z}").focus()
    attention = np.array(problem["attention"][z], dtype=float)
    sink = f".{int(attention[0]):03}"
    assert f"{sink} of it on the first token (sink)" in tab.locator(".readout").text_content()
    tab.get_by_label("leave out the first token (sink)").check()
    rest = attention.copy()
    rest[0] = 0
    np.testing.assert_allclose(heats(tab)[: len(rest)], rest / rest.max(), atol=1e-6)
    assert f"the first token (sink), {sink}, left out" in tab.locator(".readout").text_content()


def test_filters_choose_by_answer_and_steps(visit, data):
    tab = visit(page(data))
    chosen = menu(tab, "problem").locator("option")

    def ids() -> list[str]:
        return [text.split()[1].rstrip(":") for text in chosen.all_text_contents()]

    assert ids() == ["a", "b", "c", "d", "e"]
    menu(tab, "answers").select_option("correct")
    assert ids() == ["a", "b", "d"]
    menu(tab, "steps").select_option("2")
    assert ids() == ["b"] and tab.locator("h2").text_content() == "Problem b"
    menu(tab, "answers").select_option("incorrect")
    menu(tab, "steps").select_option("1")
    assert ids() == [] and "No problem" in tab.locator("main").text_content()


def test_twins_stand_side_by_side(visit, data):
    tab = visit(page(data))
    twin = tab.get_by_label("compare with twin")
    expect(twin).to_be_disabled()  # a has none
    button(tab, "next →").click()
    twin.check()
    assert texts(tab, "h2") == ["Problem b", "Twin c"]
    left, right = (tab.locator(".panel").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert texts(tab, ".token.differs .word") == ["8", "3", "4", "20", "2", "6"]
    largest = [[max(data["problems"][i]["attention"][row]) for i in (1, 2)] for row in range(7)]
    row = next(row for row, (one, other) in enumerate(largest) if one != other)
    full = max(largest[row])
    for order in ((1, 2), (2, 1)):  # one scale, whichever has the larger mass
        menu(tab, "problem").select_option(str(order[0]))
        button(tab, f"z_{row}", 1).focus()
        for side, i in enumerate(order):
            mine = np.array(data["problems"][i]["attention"][row]) / full
            np.testing.assert_allclose(heats(tab, side)[: len(mine)], mine, atol=1e-6)


def test_everything_goes_by_keyboard(visit, data):
    tab = visit(page(data))
    focused = "document.activeElement.textContent"
    tab.keyboard.press("ArrowRight")
    assert tab.locator("h2").text_content() == "Problem b"
    menu(tab, "problem").focus()
    seen = []
    while "mean" not in seen and len(seen) < 20:
        tab.keyboard.press("Tab")
        seen.append(tab.evaluate(focused) or tab.evaluate("document.activeElement.type"))
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert outline == "3px", f"no visible focus on {seen[-1]}"
    assert {"← previous", "next →", "checkbox", "dark colours", "mean"} <= {s.strip() for s in seen}
    assert any(text.strip().startswith("Bob") for text in seen), "the tokens are reached"
    for _ in range(3):
        tab.keyboard.press("ArrowDown")
    assert tab.evaluate(focused) == "z_2"
    assert button(tab, "z_2").get_attribute("aria-pressed") == "true"
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert tab.locator(".lens tr").count() == N_LAYERS


# -- in the notebook -------------------------------------------------------------------------------


def test_explorer_filters_and_shows_one_problem_with_its_twin(data):
    answers, steps, menu, _, frame = codi_explorer(data).children
    assert menu.value == 0 and frame.value.startswith("<iframe")
    drawn = []
    frame.observe(lambda change: drawn.append(change.new), names="value")
    menu.value = 1
    assert len(drawn) == 1 and menu.index == 1
    answers.value = True
    assert [label.split()[1] for label, _ in menu.options] == ["a:", "b:", "d:"]
    assert menu.value == 1 and len(drawn) == 1, "the chosen problem stays without another picture"
    answers.value = False
    assert menu.value == 2 and menu.index == 0 and len(drawn) == 2
    steps.value = 3
    assert menu.value is None and "No problem" in frame.value
    answers.value = None
    assert menu.value == 3 and frame.value.startswith("<iframe")
    right = {"problems": [{**problem, "twin": None} for problem in data["problems"] if problem["correct"]]}
    assert len(codi_explorer(data | right).children) == 4, "without wrong answers there is nothing to choose"


def test_page_of_one_problem_has_its_twin_and_no_menus(visit, data):
    tab = visit(page(data, only=2))
    assert tab.locator("select").count() == 0 and tab.locator("h2").text_content() == "Problem c"
    tab.get_by_label("compare with twin").check()
    assert texts(tab, "h2") == ["Problem c", "Twin b"]
    expect(visit(page(data, only=3)).get_by_label("compare with twin")).to_be_disabled()
