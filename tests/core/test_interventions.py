"""Interventions equal plain torch hooks on every family; sweeps equal one forward at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import FAMILIES, VOCABULARY, blocks, output_projection, save_tiny

from lib.core import sweeps
from lib.core.cache import Cache
from lib.core.families import shape
from lib.core.interventions import (
    Condition,
    Projection,
    Shift,
    ablation_conditions,
    layer_controls,
    mean_head_outputs,
)
from lib.core.models import load
from lib.core.sweeps import ablation_sweep, class_sums, word_probabilities

CONDITIONS = (
    Condition("baseline"),
    Condition("one late", [(2, 1)]),
    Condition("two layers", [(1, 0), (2, 3)]),
    Condition("one late, again", [(2, 1)]),
    Condition("first layer", [(0, 2), (2, 0)]),
)
N_CLASSES, LENGTH, LAYER = 5, 12, 2


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    return load(str(save_tiny(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(str(save_tiny("llama", tmp_path_factory.mktemp("llama"))))


def stimulus(n: int = 3) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, N_CLASSES, size=(n, LENGTH))
    ids = np.pad(labels + 2, ((0, 0), (1, 0)))
    return torch.from_numpy(ids), labels


def edited(x: torch.Tensor, edit: Projection | Shift) -> torch.Tensor:
    """One token behind the prefix at a time [sequence, token, d]."""
    x = x.clone()
    for row, t in itertools.product(range(len(x)), range(1, x.shape[1])):
        if isinstance(edit, Projection):
            basis, centre = (torch.tensor(array[row]).float() for array in (edit.basis, edit.centre))
            scale = edit.scale if np.isscalar(edit.scale) else float(edit.scale[row])
            x[row, t] -= scale * sum(((x[row, t] - centre) @ b) * b for b in basis)
        elif edit.nodes[row, t - 1] >= 0:
            x[row, t] += torch.tensor(edit.table[row, edit.nodes[row, t - 1]]).float()
    return x


def hooked_logits(module, ids, condition, fill=None):
    """Plain torch: logits, and what every block reads, the last entry what the last one puts out.

    Head slices at the input of the output projection are overwritten, and streams edited, by hooks.
    """
    n_heads = module.config.num_attention_heads
    captured, handles = {}, []
    for index, block in enumerate(blocks(module)):

        def overwrite(_, args, index=index):
            z = args[0].clone()
            d_head = z.shape[-1] // n_heads
            for layer, head in condition.heads:
                if layer == index:
                    z[..., head * d_head : (head + 1) * d_head] = 0 if fill is None else fill[layer, head]
            return (z,)

        def enter(_, args, index=index):
            edit = condition.edits.get(index)
            captured[index] = args[0] if edit is None else edited(args[0], edit)
            return captured[index], *args[1:]

        handles.append(output_projection(block).register_forward_pre_hook(overwrite))
        handles.append(block.register_forward_pre_hook(enter))

    def leave(_, args, output):
        captured[index + 1] = output if isinstance(output, torch.Tensor) else output[0]

    handles.append(block.register_forward_hook(leave))
    with torch.no_grad():
        logits = module(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, captured


def test_mean_head_outputs_equal_hooks(model):
    ids, _ = stimulus()
    means = mean_head_outputs(model, ids, batch_size=2)
    module, sizes = model._module, shape(model)
    for index, block in enumerate(blocks(module)):
        seen = []
        handle = output_projection(block).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            module(input_ids=ids, use_cache=False)
        handle.remove()
        naive = seen[0][:, 1:].reshape(-1, sizes.n_heads, sizes.d_head).mean(0)
        torch.testing.assert_close(means[index], naive, rtol=1e-4, atol=1e-6)


def edits(n: int = 3) -> tuple[Projection, Projection, Shift]:
    """Of every sequence its own: planes, lines of which a part is taken out, steps of some tokens."""
    rng, (_, labels) = np.random.default_rng(2), stimulus(n)
    planes = np.linalg.qr(rng.standard_normal((n, 32, 2)))[0].swapaxes(1, 2)
    lines = np.linalg.qr(rng.standard_normal((n, 32, 1)))[0].swapaxes(1, 2)
    return (
        Projection(planes, rng.standard_normal((n, 32))),
        Projection(lines, np.zeros((n, 32)), rng.uniform(0.5, 1.5, n)),
        Shift(rng.standard_normal((n, N_CLASSES, 32)), np.where(labels == 3, -1, labels)),
    )


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_sweep_equals_one_forward_at_a_time(model, mode):
    ids, labels = stimulus()
    fill = mean_head_outputs(model, ids) if mode == "mean" else None
    plane, line, shift = edits()
    conditions = [
        *CONDITIONS,
        Condition("plane", edits={2: plane}),
        Condition("line of a range", edits={1: line, 2: line}),
        Condition("other range", edits={1: line, 2: plane}),
        Condition("shift under ablation", [(1, 0), (2, 3)], edits={2: shift}),
        Condition("shift", edits={0: shift}),
    ]
    # Two groupings of the tokens; other words and positions than all.
    groupings = np.stack([np.where(labels == 4, -1, labels), N_CLASSES + labels[:, ::-1]])
    word_ids, positions = np.array([[2, 3, 9], [4, 5, 2], [6, 2, 3]]), [0, 7, 11]
    sweep = ablation_sweep(
        model, ids, conditions, word_ids=word_ids, positions=positions, labels=groupings,
        n_classes=2 * N_CLASSES, fill=fill, batch_size=4,
    )  # fmt: skip
    assert sweep.layers == (0, 1, 2, 3) and sweep.class_sums.shape == (10, 3, 4, 10, 32)
    assert sweep.positions.tolist() == positions and sweep.word_probabilities.shape == (10, 3, 3, 3)
    means, of_all = sweep.class_means(per_sequence=True), sweep.class_means()
    for c, condition in enumerate(conditions):
        logits, streams = hooked_logits(model._module, ids, condition, fill)
        for row in range(3):
            expected = logits.softmax(-1)[row, 1:, word_ids[row]][positions]
            np.testing.assert_allclose(sweep.word_probabilities[c, row], expected, rtol=1e-4, atol=1e-6)
        for layer, node in itertools.product(range(4), range(2 * N_CLASSES)):
            stream, here = streams[layer][:, 1:].numpy(), (groupings == node).any(0)
            if node == 4:
                assert np.isnan(of_all[c, layer, node]).all()
                continue
            np.testing.assert_allclose(of_all[c, layer, node], stream[here].mean(0), rtol=1e-4, atol=1e-4)
            for row in range(3):
                wanted = stream[row][here[row]].mean(0) if here[row].any() else np.full(32, np.nan)
                np.testing.assert_allclose(means[c, row, layer, node], wanted, rtol=1e-4, atol=1e-4)
    # Layers run, of ten times three: edits start where they are, others where heads are, a duplicate nowhere.
    assert sweep.work == pytest.approx((3 + 1 + 2 + 0 + 3 + 1 + 2 + 1 + 1 + 3) / 30)
    np.testing.assert_array_equal(sweep.word_probabilities[1], sweep.word_probabilities[3])
    np.testing.assert_array_equal(sweep.class_sums[1], sweep.class_sums[3])


def test_edits_in_bfloat16_are_made_in_float32(tmp_path):
    ids, labels = stimulus()
    model = load(str(save_tiny("llama", tmp_path)), dtype="bfloat16")
    plane, _, shift = edits()
    conditions = [Condition("plane", edits={1: plane}), Condition("shift", edits={2: shift})]
    sweep = ablation_sweep(model, ids, conditions, word_ids=range(2, 8), labels=labels, n_classes=N_CLASSES)
    for found, condition in zip(sweep.word_probabilities, conditions, strict=True):
        logits, _ = hooked_logits(model._module, ids, condition)
        expected = logits.float().softmax(-1)[:, 1:, 2:8]
        np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.01)


def test_nothing_is_run_that_nobody_reads(llama, monkeypatch):
    ids, labels = stimulus()
    calls, read = [], sweeps.word_probabilities
    modules = {"head": llama._module.lm_head, "block 2": llama._module.model.layers[2]}
    handles = [
        each.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, each in modules.items()
    ]

    def counted(model, stream, word_ids, max_logits=0):
        calls.append(tuple(stream.shape[:2]))
        return read(model, stream, word_ids, max_logits)

    monkeypatch.setattr(sweeps, "word_probabilities", counted)
    words = ablation_sweep(llama, ids, CONDITIONS[:1], word_ids=[2], positions=[3, 5])
    assert calls == ["block 2", (3, 2)] and words.class_sums.size == 0 and words.layers == ()
    calls.clear()
    sums = ablation_sweep(llama, ids, CONDITIONS, labels=labels, n_classes=N_CLASSES, layers=[1, 0])
    assert calls == [] and sums.word_probabilities.size == 0 and sums.layers == (0, 1)
    assert sums.work == (1 + 0 + 0 + 0 + 1) / 15, "what differs above block 1 is not run"
    for handle in handles:
        handle.remove()
    chosen = ablation_sweep(llama, ids, CONDITIONS, labels=labels, n_classes=N_CLASSES).select(layers=[1, 0])
    assert chosen.layers == (0, 1) and np.isnan(chosen.work)
    np.testing.assert_allclose(chosen.class_sums, sums.class_sums, rtol=1e-4, atol=1e-5)


def edit_of(at: int = 1, **arrays) -> dict:
    edit = Projection(**({"basis": np.zeros((3, 1, 32)), "centre": np.zeros((3, 32))} | arrays))
    return {"conditions": [Condition("bad", edits={at: edit})]}


def shift_of(nodes: np.ndarray) -> dict:
    return {"conditions": [Condition("bad", edits={1: Shift(np.zeros((3, 2, 32)), nodes)})]}


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"conditions": []}, "no condition"),
        ({"conditions": [Condition("bad", [(3, 0)])]}, r"'bad' ablates head 3\.0"),
        ({"ids": torch.zeros(0, 13, dtype=torch.long)}, "ids must be"),
        ({"ids": torch.zeros(3, 97, dtype=torch.long)}, "seq_len"),
        ({"ids": torch.full((3, 13), VOCABULARY)}, f"ids: {VOCABULARY}"),
        ({"n_prefix": 13}, "n_prefix 13"),
        ({"layers": [4]}, "layer 4"),
        ({"labels": np.zeros((3, 11), int)}, "labels must be"),
        ({"labels": np.full((3, 12), N_CLASSES)}, "labels: 5"),
        ({"word_ids": [], "layers": []}, "word_ids, or labels"),
        ({"positions": [0, 12]}, "positions: 12"),
        ({"word_ids": [[2], [3]]}, "word_ids must be"),
        ({"word_ids": [2, -1]}, "word_ids: -1"),
        ({"fill": torch.zeros(3, 1, 8)}, "fill must be"),
        (edit_of(at=3), "'bad', edit at layer 3"),
        (edit_of(basis=np.zeros((2, 1, 32))), "layer 1: basis"),
        (edit_of(centre=np.full((3, 32), np.nan)), "centre"),
        (shift_of(nodes=np.full((3, 12), 2)), "table"),
    ],
)
def test_what_does_not_fit_is_named_before_a_forward(llama, monkeypatch, changes, culprit):
    ids, labels = stimulus()
    what = dict(ids=ids, conditions=CONDITIONS, word_ids=[2], labels=labels, n_classes=N_CLASSES, layers=[1])
    monkeypatch.setattr(llama, "trace", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ValueError, match=culprit):
        ablation_sweep(llama, **(what | changes))


def test_sweep_of_a_model_that_overflows_names_the_dtype(tmp_path):
    ids, labels = stimulus()
    model = load(str(save_tiny("llama", tmp_path)), dtype="float16")
    model._module.model.embed_tokens.weight[7] = 6e4
    model._module.model.layers[0].mlp.down_proj.weight.mul_(1e4)
    ids[1, 3] = 7
    of_classes = {"labels": labels, "n_classes": N_CLASSES, "layers": [1]}
    for asked in (of_classes, {"word_ids": [2]}):
        with pytest.raises(ValueError, match="float16"):
            ablation_sweep(model, ids, CONDITIONS[:1], **asked)


def test_class_sums_ignore_negative_labels():
    stream = torch.randn(2, 6, 3)
    labels = torch.tensor([[0, 1, -1, 1, 0, -1], [1, 1, 1, -1, -1, -1]])
    sums = class_sums(stream, labels, 3)
    torch.testing.assert_close(sums[0, 1], stream[0, 1] + stream[0, 3])
    torch.testing.assert_close(sums[1, 1], stream[1, :3].sum(0))
    assert (sums[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_word_probabilities_do_not_depend_on_the_chunk(tmp_path, dtype):
    ids, _ = stimulus()
    model = load(str(save_tiny("llama", tmp_path)))
    model._module.to(getattr(torch, dtype))
    found = []
    for max_logits in (1, 7 * VOCABULARY, 10**9):
        with torch.no_grad(), model.trace(ids, use_cache=False):
            found.append(
                word_probabilities(model, model.norm.output, torch.tensor([2, 9]), max_logits).save()
            )
    expected = model._module(input_ids=ids).logits.float().softmax(-1)[..., [2, 9]]
    for probabilities in found:
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-6)


def test_word_probabilities_with_a_bias_and_of_logits_beyond_exp(tmp_path):
    ids, _ = stimulus()
    model = load(str(save_tiny("llama", tmp_path)))
    head = model._module.lm_head
    head.weight.mul_(100)
    head.bias = torch.nn.Parameter(100 * torch.randn(VOCABULARY), requires_grad=False)
    with torch.no_grad(), model.trace(ids, use_cache=False):
        found = word_probabilities(model, model.norm.output, torch.arange(VOCABULARY), 100).save()
    logits = model._module(input_ids=ids).logits
    assert logits.exp().isinf().any()
    torch.testing.assert_close(found, logits.softmax(-1), rtol=1e-3, atol=1e-6)


RANKED = {"a": [(0, 0), (0, 1), (2, 3), (1, 2)], "b": [(2, 3), (2, 0), (0, 0), (1, 1)]}


def test_controls_are_disjoint_sized_and_matched():
    conditions = ablation_conditions(RANKED, [1, 2, 3], n_draws=4, n_layers=3, n_heads=4, seed=1)
    assert conditions[0] == Condition("baseline")
    listed = {head for heads in RANKED.values() for head in heads[:3]}
    left = [4 - sum(head[0] == layer for head in listed) for layer in range(3)]
    for name, heads in RANKED.items():
        assert [c.heads for c in conditions if c.name == name] == [set(heads[:k]) for k in (1, 2, 3)]
        for k in (1, 2, 3):
            wanted = [sum(head[0] == layer for head in heads[:k]) for layer in range(3)]
            matched = [c for c in conditions if c.name == f"random like {name}" and len(c.heads) == k]
            possible = all(a <= b for a, b in zip(wanted, left, strict=True))
            assert len(matched) == 4 * possible
            for control in matched:
                assert [sum(head[0] == layer for head in control.heads) for layer in range(3)] == wanted
    for condition in conditions:
        assert condition.name in RANKED or not condition.heads & listed
    draws = [c.heads for c in conditions if c.name == "random"]
    assert sorted(map(len, draws)) == sorted([1, 2, 3] * 4) and len(set(draws)) > 3
    assert conditions == ablation_conditions(RANKED, [1, 2, 3], n_draws=4, n_layers=3, n_heads=4, seed=1)


def test_matched_control_is_missing_where_a_layer_has_too_few_heads_left():
    ranked = {"a": [(0, 0), (0, 1), (0, 2), (0, 3)], "b": [(1, 0), (2, 0), (1, 1), (2, 1)]}
    conditions = ablation_conditions(ranked, [1, 4], n_draws=2, n_layers=3, n_heads=4)
    assert not [c for c in conditions if c.name == "random like a"]
    assert len([c for c in conditions if c.name == "random like b"]) == 4


def test_k_beyond_the_heads_is_named():
    longer = {name: heads + [(1, 0), (1, 3), (0, 2)] for name, heads in RANKED.items()}
    for ranked, k_values, culprit in (
        (RANKED, [13], "k_values: 13 .*model has 12"),
        (longer, [7], "k_values: .*3 are left"),
        (RANKED | {"a": longer["a"]}, [7], "k_values: 7 .*'b' ranks 4"),
        (RANKED, [], "k_values is empty"),
    ):
        with pytest.raises(ValueError, match=culprit):
            ablation_conditions(ranked, k_values, n_draws=1, n_layers=3, n_heads=4)


def test_controls_by_layer():
    ranked = {"a": [(1, 0), (1, 1), (1, 2), (1, 3)], "b": [(2, 3), (2, 0), (0, 0), (0, 1)]}
    found = layer_controls(ranked, [1, 2, 4], n_draws=3, n_layers=3, n_heads=4, seed=1)
    for layer in range(3):
        [whole] = [c for c in found if c.name == f"layer {layer}"]
        assert whole.heads == {(layer, head) for head in range(4)}
    assert not [c for c in found if c.name == "random above 0"], "two heads are left above layer 0"
    usual = ablation_conditions(ranked, [1, 2, 4], n_draws=3, n_layers=3, n_heads=4, seed=1)
    for name, heads in ranked.items():
        for k in (1, 2, 4):
            rest = [c for c in found if c.name == f"rest like {name}" and len(c.heads) == k]
            like = [c for c in usual if c.name == f"random like {name}" and len(c.heads) == k]
            assert not (rest and like) and len({c.draw for c in rest}) == len(rest) in (0, 3)
            for control in rest:
                assert not control.heads & {head for each in ranked.values() for head in each[:k]}
                assert sorted(layer for layer, _ in control.heads) == sorted(layer for layer, _ in heads[:k])
    assert [c for c in found if c.name == "rest like a" and len(c.heads) == 2]
    assert not [c for c in found if c.name == "rest like a" and len(c.heads) == 4], "none is left in layer 1"
    fewer = layer_controls(ranked, [1, 2], 3, n_layers=3, n_heads=4)
    above = [c for c in fewer if c.name == "random above 0"]
    assert len(above) == 3 and all(len(c.heads) == 2 and min(c.heads)[0] > 0 for c in above)
    assert not any(c.heads & {(1, 0), (1, 1), (2, 3), (2, 0)} for c in above)


def test_cached_sweep_is_the_same_and_runs_nothing(llama, tmp_path):
    ids, labels = stimulus()
    arguments = dict(word_ids=[2, 3], labels=labels, n_classes=N_CLASSES, layers=[LAYER], batch_size=2)
    first = ablation_sweep(llama, ids, CONDITIONS, cache=Cache(tmp_path), **arguments)
    forwards = []
    handle = llama._module.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        again = ablation_sweep(llama, ids, CONDITIONS, cache=Cache(tmp_path), **arguments)
        assert forwards == []
        # Another question is not answered from the cache.
        for another in (
            {"word_ids": [2, 4]}, {"n_classes": N_CLASSES + 1}, {"positions": [1]}, {"layers": [0]},
            {"labels": labels[::-1].copy()},
        ):  # fmt: skip
            forwards.clear()
            ablation_sweep(llama, ids, CONDITIONS[:1], cache=Cache(tmp_path), **(arguments | another))
            assert forwards != [], another
        plane, line, shift = edits()
        other = Projection(line.basis, line.centre, 2 * line.scale)
        for edit in (plane, line, other, shift, Shift(-shift.table, shift.nodes)):
            forwards.clear()
            made = [Condition("edit", edits={1: edit})]
            ablation_sweep(llama, ids, made, cache=Cache(tmp_path), **arguments)
            assert forwards != [], edit
    finally:
        handle.remove()
    np.testing.assert_array_equal(first.word_probabilities, again.word_probabilities)
    np.testing.assert_array_equal(first.class_sums, again.class_sums)


def test_cache_tells_where_a_row_started(llama, tmp_path):
    """The same row starts elsewhere beside other conditions, and has sums of fewer layers of its own.

    Without a baseline as well, which need not be asked for, and in any order.
    """
    ids, labels = stimulus()
    arguments = dict(word_ids=[2, 3], labels=labels, n_classes=N_CLASSES, batch_size=1)
    whole = ablation_sweep(llama, ids, CONDITIONS, **arguments)
    for order in ([0, 1], [1], [4, 1, 3, 2], [0, 1, 2, 3, 4]):
        conditions = [CONDITIONS[i] for i in order]
        cached = ablation_sweep(llama, ids, conditions, cache=Cache(tmp_path), **arguments)
        plain = whole.select(order)
        assert cached.conditions == plain.conditions
        np.testing.assert_allclose(cached.class_sums, plain.class_sums, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(cached.word_probabilities, plain.word_probabilities, rtol=1e-5, atol=1e-7)
