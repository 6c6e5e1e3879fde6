from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from lib import ROOT
from lib.core.parameters import ParameterError, StudyParameters, check, schemas
from lib.induction.parameters import Emergence, InductionAblation, MixingTheory
from lib.refusal.api import Endpoint
from lib.refusal.parameters import RefusalInstrument, RefusalLowRank

PARAMETERS_CELL = "seq_len: int = 400  # tokens\nk_values: list[int] = [1, 2]  # heads"


def namespace(*cells: str, **values):
    return {"In": ["", *cells], **values}


def problems(schema=InductionAblation, *cells, **values) -> list[str]:
    with pytest.raises(ParameterError) as caught:
        check(schema, namespace(*cells, **values))
    return str(caught.value).splitlines()


def test_defaults_are_valid():
    for study, schema in schemas().items():
        assert check(schema, {}).study == study


@pytest.mark.parametrize(
    ("name", "received", "meant"),
    [
        ("k_values", "[1,2]", [1, 2]),  # papermill -p k_values "[1,2]"
        ("k_values", [1, 2], [1, 2]),  # papermill -y
        ("words", str([*"abcdefghijklmnop"]), [*"abcdefghijklmnop"]),
        ("seq_len", 3e2, 300),  # papermill -p seq_len 3e2
        ("seq_len", "3e2", 300),  # papermill -y "seq_len: 3e2"
        ("remote", "false", False),
        ("model_id", 1234, "1234"),
    ],
)
def test_values_as_papermill_passes_them_are_read_as_meant(name, received, meant):
    assert getattr(check(InductionAblation, {name: received}), name) == meant


def test_float_reads_what_yaml_leaves_a_string():
    assert check(MixingTheory, {"self_weight": "1e-4"}).self_weight == 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq_len": "abc"}, "seq_len: got 'abc'; a whole number is needed"),
        ({"seq_len": 300.7}, "seq_len: got 300.7; a whole number is needed"),
        ({"seq_len": True}, "seq_len: got True; a number is needed"),
        ({"n_layouts": 0}, "n_layouts: got 0; at least 4 is needed"),
        ({"k_values": 4}, "k_values: got 4; a list is needed, as in -p k_values '[1, 2]'"),
        ({"k_values": [1, "two"]}, "k_values[1]: got 'two'; a whole number is needed"),
        ({"remote": "perhaps"}, "remote: got 'perhaps'; true or false is needed"),
        ({"dtype": "int8"}, "dtype: got 'int8'; allowed: 'auto', 'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_wrong_value_is_named_with_what_is_allowed(values, message):
    assert problems(**values) == [message]


@pytest.mark.parametrize(
    ("values", "name", "culprit"),
    [
        ({"window": 400}, "window", "400 tokens of seq_len = 400"),
        ({"words": ["apple"] * 16}, "words", "apple"),
        ({"edges": ["apple-bird"]}, "edges", "'grid'"),
        ({"rows": 3}, "graph", "12 nodes and 16 words"),
        ({"graph": "edges"}, "edges", "empty"),
        ({"graph": "edges", "edges": ["apple-brd"]}, "edges", "did you mean 'bird'"),
    ],
)
def test_parameters_that_do_not_go_together_are_named(values, name, culprit):
    [line] = problems(**values)
    assert line.startswith(f"{name}: ") and culprit in line


def test_number_that_is_not_finite_is_refused():
    [line] = problems(MixingTheory, noise="nan")
    assert line.startswith("noise: got ")


def test_edge_list_uses_the_words_that_it_names():
    graph = check(InductionAblation, {"graph": "edges", "edges": '["bird-apple", "bird-car"]'}).word_graph()
    assert graph.words == ("apple", "bird", "car")


def test_misspelt_name_is_named_with_the_nearest():
    lines = problems(InductionAblation, PARAMETERS_CELL, "# Parameters\nseqlen = 200\n")
    assert lines == ["seqlen: no such parameter; did you mean seq_len?"]
    lines = problems(InductionAblation, PARAMETERS_CELL.replace("k_values", "k_value"))
    assert lines == ["k_value: no such parameter; did you mean k_values?"]
    [line] = problems(InductionAblation, PARAMETERS_CELL, "# Parameters\nzzz = 1\n")
    assert line.startswith("zzz: no such parameter; there are out_dir, use_cache, model_id, revision")


def test_all_problems_come_at_once():
    injected = "# Parameters\nseqlen = 200\nn_layout = 2\n"
    lines = problems(InductionAblation, PARAMETERS_CELL, injected, layer="x", dtype="int8")
    assert [line.split(":")[0] for line in lines] == ["seqlen", "n_layout", "dtype", "layer"]


def test_setup_cell_can_be_rerun_after_other_cells():
    later = ["walks = make_walks()", "for seed_ in range(3):\n    x = seed_", "seed = 3\nhistory = []"]
    cells = [PARAMETERS_CELL, "# Parameters\nseq_len = 300\n", "study = Study()", *later, "%pwd"]
    assert check(InductionAblation, namespace(*cells, seq_len=300, walks=1, history=[])).seq_len == 300


def test_misspelling_that_was_corrected_is_forgotten():
    wrong, right = PARAMETERS_CELL.replace("seq_len", "seqlen"), PARAMETERS_CELL
    assert check(InductionAblation, namespace(wrong, "setup", right, seq_len=400)).seq_len == 400
    injected = ["# Parameters\nseqlen = 200\n", "setup", "# Parameters\nseq_len = 300\n"]
    assert check(InductionAblation, namespace(right, *injected, seq_len=300)).seq_len == 300


def test_notebook_shows_the_message_alone():
    assert ParameterError("seqlen: no")._render_traceback_() == ["ParameterError: seqlen: no"]


def test_nothing_heavy_loads_before_the_check():
    code = (
        "import sys; from lib.induction.parameters import InductionAblation\n"
        "from lib.core.record import Study\n"
        "try: Study(InductionAblation, {'seq_len': 'abc'})\n"
        "except ValueError: pass\n"
        "print(sorted({'torch', 'transformers', 'nnsight', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


CHAT = {"model_id": "Qwen/Qwen3-1.7B", "judge": "openai"}
TWO_JUDGES = CHAT | {"second_judge": "openai"}


@pytest.mark.parametrize(
    ("values", "name", "culprit"),
    [
        ({"model_id": "Qwen/Qwen3-1.7B"}, "judge", "'rule'"),
        ({"judge": "openai"}, "judge", "'openai'"),
        ({"judge_model": "some-model"}, "judge", "judge_model"),
        (CHAT | {"second_judge_model": "b"}, "second_judge", "second_judge_model is given"),
        (TWO_JUDGES, "second_judge_model", "the same"),
        (TWO_JUDGES | {"second_judge_model": Endpoint().model}, "second_judge_model", "the same"),
        (TWO_JUDGES | {"judge_model": f"{Endpoint().model} "}, "second_judge_model", "the same"),
        ({"n_prompts": 3}, "n_prompts", "3"),
        ({"strengths": [0.5, 0]}, "strengths[1]", "0"),
        ({"compare_with": ["a/x", "./b/x/."]}, "compare_with", "'x'"),
        ({"model_id": "organism/refusal-x", "compare_with": ["mine/x//"]}, "compare_with", "'x'"),
    ],
)
def test_parameters_of_the_refusal_study_that_do_not_go_together(values, name, culprit):
    [line] = problems(RefusalInstrument, **values)
    assert line.startswith(f"{name}: ") and culprit in line


def test_two_judges_of_different_models_go_together():
    values = TWO_JUDGES | {"second_judge_model": "another", "strengths": "[0.5, 1]"}
    assert check(RefusalInstrument, values).strengths == [0.5, 1.0]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"judge": "rule"}, "judge"),
        ({"model_id": "organism/x", "judge": "openai"}, "judge"),
        ({"model_id": "organism/x", "requests": "a.csv"}, "requests"),
        ({"judge_model": "m"}, "judge"),
        ({"n_prompts": 7}, "n_prompts"),
    ],
)
def test_parameters_of_study_3_that_do_not_go_together(values, name):
    [line] = problems(RefusalLowRank, **values)
    assert line.startswith(f"{name}: ")


def test_judge_of_study_3_goes_by_the_model():
    assert check(RefusalLowRank, {}).grader == "phrases"
    assert check(RefusalLowRank, {"model_id": "organism/refusal-single"}).grader == "rule"
    assert check(RefusalLowRank, {"judge": "openai", "judge_url": "http://localhost"}).grader == "openai"


@pytest.mark.parametrize("study", [name for name, s in schemas().items() if issubclass(s, StudyParameters)])
def test_notebook_loads_its_model_at_the_revision_asked_for(study):
    [path] = (ROOT / "notebooks").rglob(f"{study}.ipynb")
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    calls = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    first = next(call for call in calls if ast.unparse(call.func) in ("models.load", "load_codi"))
    [given] = [ast.unparse(keyword.value) for keyword in first.keywords if keyword.arg == "revision"]
    assert given in ("p.revision", "p.revision if name == focus else ''"), "not that of the models beside it"


def test_default_read_layer_is_as_deep_as_the_published_one():
    assert [Emergence().read_layer(n) for n in (32, 5)] == [26, 4]
    assert Emergence(layer=0).read_layer(32) == 0
