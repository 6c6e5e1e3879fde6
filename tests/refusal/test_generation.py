"""Generation in batches equals transformers' own under plain torch hooks, on every family."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from tiny import CHAT_MODELS, FAMILIES, WORDS, blocks, output_projection, save_chat, save_tiny
from transformers import DynamicCache

from lib.core.cache import Cache
from lib.core.interventions import remove_subspace
from lib.core.models import ModelError, load
from lib.core.tokens import end_tokens
from lib.refusal import forwards
from lib.refusal.generation import (
    answer_loss,
    chat_ids,
    first_token_kl,
    first_token_log_probabilities,
    first_token_share,
    generate,
    last_token_streams,
    tail_streams,
    with_fixed_date,
)
from lib.refusal.removal import SITES, Ablation

D, NEW = 32, 7
PROMPTS = [[0, 5, 9, 4], [0, 7, 3, 8, 6, 2, 30], [0, 11, 4, 4], [0, 2, 12, 9, 30], [0, 6, 5, 4, 3, 2, 30]]

OPENING = [0, 3, 9, 27, 14, 5, 20, 31, 8]


def random_basis(k: int, seed: int = 0) -> torch.Tensor:
    normal = torch.randn(D, k, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(normal).Q.T.contiguous()


def vector(seed: int, length: float) -> torch.Tensor:
    return length * torch.randn(D, generator=torch.Generator().manual_seed(seed))


CONDITIONS = (
    Ablation("intact", torch.zeros(0, D)),
    Ablation("one direction", random_basis(1)),
    Ablation("three", random_basis(3)),
    Ablation("half", random_basis(2, 1), strength=0.5),
    Ablation("reflected", random_basis(1, 2), strength=2.0),
    Ablation("affine", random_basis(2, 3), center=vector(4, 1.0)),
    Ablation("block input", random_basis(3, 5), sites=("block_input",)),
    Ablation("writers", random_basis(3, 6), sites=("attention", "mlp")),
    Ablation("upper", random_basis(4, 7), layers=range(1, 3)),
    Ablation("last", random_basis(4, 8), layers=range(2, 3)),
    Ablation("shifted", torch.zeros(0, D), shift=(2, vector(9, 1.0))),
    Ablation("shifted and ablated", random_basis(2, 10), layers=range(1, 2), shift=(1, vector(11, 1.0))),
    Ablation("three again", random_basis(3)),
)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    return load(str(save_tiny(request.param, tmp_path_factory.mktemp(request.param), chat=True)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(str(save_tiny("llama", tmp_path_factory.mktemp("llama"), chat=True)))


@contextmanager
def hooks(module, condition: Ablation):
    """Plain torch: the condition as hooks on a transformers model, one projection matrix at a time."""
    projection = condition.basis.T @ condition.basis
    center = torch.zeros(D) if condition.center is None else condition.center
    layers = range(3) if condition.layers is None else condition.layers
    handles = []

    def without(x, center=0.0):
        return x - condition.strength * (x - center) @ projection

    def before_block(_, args, index):
        x = args[0]
        if "block_input" in condition.sites and index in layers:
            x = without(x, center)
        if condition.shift and condition.shift[0] == index:
            x = x + condition.shift[1]
        return (x, *args[1:])

    for index, block in enumerate(blocks(module)):
        handles.append(
            block.register_forward_pre_hook(lambda m, args, index=index: before_block(m, args, index))
        )
        for site, written in (("attention", output_projection(block)), ("mlp", block.mlp)):
            if site in condition.sites and index in layers:
                handles.append(written.register_forward_hook(lambda _, __, output: without(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def one_by_one(model, prompts, condition: Ablation, new: int = NEW) -> list[list[int]]:
    """transformers' `generate` under hooks, a prompt at a time."""
    answers, ends = [], sorted(end_tokens(model))
    with hooks(model._module, condition), torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            whole = model._module.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                eos_token_id=ends, pad_token_id=0,
            )  # fmt: skip
            answer = whole[0, len(prompt) :].tolist()
            answers.append(answer[: next((i for i, t in enumerate(answer) if t in ends), new)])
    return answers


def hooked_log_probabilities(model, prompt, condition: Ablation) -> torch.Tensor:
    with hooks(model._module, condition), torch.no_grad():
        return model._module(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1)


@contextmanager
def counted_rows(model, layer: int = 0):
    """Rows of every forward through a block; one that is skipped does not run its parts."""
    seen, part = [], model.layers[layer].self_attn.o_proj._module
    handle = part.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


def test_answer_loss_and_its_gradient_are_those_of_plain_torch(model):
    answers, start = [[8, 4, 1], [12, 1], [6, 9, 11, 3, 1], [1], [7, 7, 1]], random_basis(2)
    losses, plain = [], start.clone().requires_grad_(True)
    with hooks(model._module, Ablation("removed", plain)):
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer]])
            scores = model._module(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
            losses += [-scores[place, token] for place, token in zip(places, answer, strict=True)]
    expected = torch.stack(losses).mean()
    ours = start.clone().requires_grad_(True)
    found = answer_loss(model, PROMPTS, answers, ours)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, basis)[0] for loss, basis in ((found, ours), (expected, plain))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert gradients[1].norm() > 1e-3


@pytest.mark.parametrize("batch_size", [0, 8], ids=["one batch, padded", "batches of one length"])
def test_generation_equals_transformers_under_hooks(model, batch_size):
    answers = generate(model, PROMPTS, CONDITIONS, max_new_tokens=NEW, batch_size=batch_size)
    for condition, found in zip(CONDITIONS, answers, strict=True):
        assert found == one_by_one(model, PROMPTS, condition), condition.name
    changed = [found != answers[0] for found in answers]
    assert sum(changed) >= len(CONDITIONS) - 3  # the conditions did something, each to its own answers
    assert answers[2] == answers[-1]


def test_common_opening_is_read_once_a_condition_and_changes_nothing(model):
    opened = [[*OPENING, *prompt[1:]] for prompt in PROMPTS]
    with counted_rows(model) as rows:
        answers = generate(model, opened, CONDITIONS[:4], max_new_tokens=1)
    assert rows == [4, 4 * len(PROMPTS)], "the opening of four conditions, then the rest of all rows"
    answers = generate(model, opened, CONDITIONS, max_new_tokens=NEW)
    for condition, found in zip(CONDITIONS, answers, strict=True):
        assert found == one_by_one(model, opened, condition), condition.name
    assert generate(model, [*opened, opened[0][:9]], CONDITIONS[:3], max_new_tokens=NEW)[2][:-1] == answers[2]


def test_batch_size_and_company_change_nothing(llama):
    expected = generate(llama, PROMPTS, CONDITIONS, max_new_tokens=NEW)
    assert generate(llama, PROMPTS, CONDITIONS, max_new_tokens=NEW, batch_size=4) == expected
    order = [3, 0, 4, 1, 2]
    shuffled = generate(llama, [PROMPTS[i] for i in order], CONDITIONS[::-1], max_new_tokens=NEW)
    assert shuffled == [[answers[i] for i in order] for answers in expected[::-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_ended_rows_changes_nothing(family, tmp_path, monkeypatch):
    """Where many tokens end an answer, rows leave the batch at many steps, and the others do not notice."""
    model = load(str(save_tiny(family, tmp_path, chat=True, tied=False)))  # tied ones repeat their input
    free = generate(model, PROMPTS, CONDITIONS, max_new_tokens=20)
    counts = Counter(token for answers in free for answer in answers for token in set(answer))
    rare = [token for token, _ in counts.most_common()[-20:]]
    monkeypatch.setattr(model._module.generation_config, "eos_token_id", rare)
    with counted_rows(model) as rows:
        answers = generate(model, PROMPTS, CONDITIONS, max_new_tokens=20, batch_size=256)
    assert len(set(rows)) > 1 and rows == sorted(rows, reverse=True), "rows leave, none comes back"
    for condition, found in zip(CONDITIONS, answers, strict=True):
        assert found == one_by_one(model, PROMPTS, condition, 20), condition.name
    assert len({len(answer) for found in answers for answer in found}) > 5


def test_blocks_below_the_first_touched_one_read_each_prompt_once(llama):
    conditions = [c for c in CONDITIONS if c.name in ("last", "shifted")]
    for layer, expected in ((0, 5), (1, 5), (2, 10)):
        with counted_rows(llama, layer) as rows:
            generate(llama, PROMPTS, conditions, max_new_tokens=1)
        assert sum(rows) == expected
    with counted_rows(llama) as rows:
        generate(llama, PROMPTS, [CONDITIONS[1], *conditions], max_new_tokens=1)
    assert sum(rows) == 15, "one of them touches block 0"


def test_conditions_that_do_the_same_run_once(llama):
    basis = random_basis(2)
    same = [
        Ablation("a", basis),
        Ablation("b", basis.clone(), center=torch.zeros(D), layers=range(0, 3), sites=SITES[::-1]),
        Ablation("nothing", torch.zeros(0, D)),
        Ablation("no strength", basis, strength=0.0),
        Ablation("no layer", basis, layers=range(2, 2)),
        Ablation("no shift", torch.zeros(0, D), shift=(1, torch.zeros(D))),
    ]
    with counted_rows(llama) as rows:
        answers = generate(llama, PROMPTS, same, max_new_tokens=1)
    assert sum(rows) == 2 * len(PROMPTS)
    assert answers[0] == answers[1] and answers[2] == answers[3] == answers[4] == answers[5]
    assert answers[0] != answers[2]


def test_first_token_measures_equal_hooks(model):
    kl = first_token_kl(model, PROMPTS, CONDITIONS, batch_size=7)
    known = first_token_log_probabilities(model, PROMPTS, CONDITIONS, batch_size=7)
    assert kl.shape == known.shape[:2] == (len(CONDITIONS), len(PROMPTS))
    for c, condition in enumerate(CONDITIONS):
        for j, prompt in enumerate(PROMPTS):
            before = hooked_log_probabilities(model, prompt, CONDITIONS[0])
            after = hooked_log_probabilities(model, prompt, condition)
            divergence = (before.exp() * (before - after)).sum()
            assert kl[c, j] == pytest.approx(float(divergence), rel=1e-3, abs=1e-5)
            np.testing.assert_allclose(known[c, j], after.numpy(), atol=1e-3)
    assert (kl[0] < 1e-6).all() and (kl[1:].max(1) > 1e-3).all()
    share = first_token_share(model, PROMPTS, CONDITIONS, [9, 4, 9])
    np.testing.assert_allclose(share, np.exp(known[..., [4, 9]]).sum(-1), rtol=1e-3, atol=1e-5)


def cosines(streams: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(streams, reference, dim=-1)  # [prompt, layer + 1]


def test_masked_left_padding_reads_what_single_prompts_hold(model):
    alone = last_token_streams(model, PROMPTS, padding="none")
    assert alone.shape == (len(PROMPTS), 4, D)
    with torch.no_grad():
        for j, prompt in enumerate(PROMPTS):
            out = model._module(input_ids=torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
            for layer in range(3):  # the last hidden state is after the final norm
                torch.testing.assert_close(alone[j, layer], out.hidden_states[layer][0, -1])
    for batch_size in (0, 2):
        left = last_token_streams(model, PROMPTS, padding="left", batch_size=batch_size)
        assert cosines(left, alone).min() > 0.9999
        torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-4)
    opened = [[*OPENING, *prompt[1:]] for prompt in PROMPTS]
    shared, alone = (last_token_streams(model, opened, padding=padding) for padding in ("left", "none"))
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["right", "left-unmasked"])
def test_wrong_padding_reads_something_else(llama, padding):
    alone = last_token_streams(llama, PROMPTS, padding="none")
    short = [len(prompt) < 7 for prompt in PROMPTS]
    for batch_size in (0, 2):  # the frame is that of the longest prompt, whatever the batches
        cosine = cosines(last_token_streams(llama, PROMPTS, padding=padding, batch_size=batch_size), alone)
        assert (cosine[short, -1] < 0.99).all()
        assert (cosine[~torch.tensor(short)] > 0.9999).all()


def test_removal_twice_is_removal_once():
    stream = torch.randn(2, 5, D)
    basis = torch.stack([random_basis(3), torch.nn.functional.pad(random_basis(1, 1), (0, 0, 0, 2))])
    center = torch.randn(2, 1, D)
    once = stream.clone()
    remove_subspace(once, basis, torch.ones(2, 1, 1), center)
    assert (once - stream).abs().max() > 0.1
    torch.testing.assert_close((once - center) @ basis.mT, torch.zeros(2, 5, 3), rtol=0, atol=1e-5)
    twice = once.clone()
    remove_subspace(twice, basis, torch.ones(2, 1, 1), center)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-5)


def test_removal_in_half_precision_rounds_once():
    basis = random_basis(3)
    stream = torch.randn(4, 6, D).bfloat16()
    expected = stream.float() - stream.float() @ basis.T @ basis
    remove_subspace(stream, basis)
    torch.testing.assert_close(stream.float(), expected, rtol=2**-8, atol=1e-6)


def test_generation_in_bfloat16(tmp_path):
    model = load(str(save_tiny("llama", tmp_path, chat=True)), dtype="bfloat16")
    answers = generate(model, PROMPTS, CONDITIONS, max_new_tokens=3)
    assert [len(a) for a in answers] == [len(PROMPTS)] * len(CONDITIONS)
    streams = last_token_streams(model, PROMPTS)
    assert streams.dtype == torch.float32 and streams.isfinite().all()


def test_batch_halves_when_memory_runs_out(llama):
    expected = generate(llama, PROMPTS, CONDITIONS, max_new_tokens=NEW)
    streams = last_token_streams(llama, PROMPTS)
    sizes = []

    def refuse(_, args):
        sizes.append(len(args[0]))
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    handle = llama._module.model.layers[2].register_forward_pre_hook(refuse)
    try:
        assert generate(llama, PROMPTS, CONDITIONS, max_new_tokens=NEW, batch_size=16) == expected
        assert max(sizes) > 8 and min(sizes) <= 2
        torch.testing.assert_close(last_token_streams(llama, PROMPTS), streams, rtol=1e-4, atol=1e-5)
    finally:
        handle.remove()


# -- cache -----------------------------------------------------------------------------------------


def test_cached_results_are_the_same_and_run_nothing(llama, tmp_path):
    cache = Cache(tmp_path)

    def everything(conditions=CONDITIONS, prompts=PROMPTS, new=NEW):
        return (
            generate(llama, prompts, conditions, max_new_tokens=new, batch_size=16, cache=cache),
            first_token_kl(llama, prompts, conditions, batch_size=16, cache=cache).tolist(),
        )

    first = everything()
    with counted_rows(llama) as rows:
        assert everything() == first and rows == []
        renamed = [Ablation("another name", c.basis, c.strength, c.center, c.sites, c.layers, c.shift)
                   for c in CONDITIONS]  # fmt: skip
        assert everything(renamed) == first and rows == []
        other = [*CONDITIONS[:1], Ablation("one direction", random_basis(1), strength=0.9), *CONDITIONS[2:]]
        changed = everything(other)
        assert rows != [] and changed[1] != first[1]
        rows.clear()
        everything(prompts=[[0, 5, 9, 3], *PROMPTS[1:]])
        assert rows != []
        rows.clear()
        generate(llama, PROMPTS, CONDITIONS, max_new_tokens=NEW + 1, batch_size=16, cache=cache)
        assert rows != []


# -- chat models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CHAT_MODELS if "Llama-3.2" not in name])
def test_chat_layouts_of_the_published_table_run(name, tmp_path):
    model = load(str(save_chat(name, tmp_path)))
    texts = ["apple bird", "car egg house milk", "sun"]
    prompts = chat_ids(model, texts)
    tokens = [model.tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts]
    for text, found in zip(texts, tokens, strict=True):
        assert found[-1] in ("\n", "\n\n") and "<unk>" not in found
        at = found.index(text.split()[0])
        assert found[at : at + len(text.split())] == text.split(), "the whole text, once"
    assert [t for t in tokens[0] if "think" in t] == (["<think>", "</think>"] if "Qwen3" in name else [])
    assert {model.tokenizer.convert_ids_to_tokens(t) for t in end_tokens(model)} >= set(
        CHAT_MODELS[name].ends
    )

    # The template's last token is the same for all prompts: what tells them apart came by attention.
    streams = last_token_streams(model, prompts)
    assert torch.equal(streams[0, 0], streams[1, 0]) and not torch.allclose(streams[0, -1], streams[1, -1])

    conditions = [CONDITIONS[0], CONDITIONS[2], CONDITIONS[8]]
    answers = generate(model, prompts, conditions, max_new_tokens=12)
    for condition, found in zip(conditions, answers, strict=True):
        assert found == one_by_one(model, prompts, condition, 12)


def test_sliding_window_is_the_models_own(tmp_path):
    """Phi-3 attends to a window; prompts that are longer than it, padded, shared and dropped all the same."""
    model = load(str(save_chat("Phi-3-mini-4k-instruct", tmp_path)))
    window = model._module.config.sliding_window
    long = [[0, *(2 + i % 37 for i in range(seed, seed + n))] for seed, n in ((0, 70), (5, 50), (9, 75))]
    assert len(long[0]) > window > len(long[1])
    for conditions in ([CONDITIONS[0], CONDITIONS[2]], [CONDITIONS[8], CONDITIONS[9]]):
        answers = generate(model, long, conditions, max_new_tokens=12)
        for condition, found in zip(conditions, answers, strict=True):
            assert found == one_by_one(model, long, condition, 12), condition.name
    alone = last_token_streams(model, long, padding="none")
    torch.testing.assert_close(last_token_streams(model, long), alone, rtol=1e-4, atol=1e-4)


def test_prompt_is_rendered_as_the_template_says(llama):
    assert chat_ids(llama, ["apple bird", "egg"]) == [[0, 2, 3, 30], [0, 5, 30]]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%A, %B %-d, %y') }}", "Friday, July 26, 24"),
        ("{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}{{ day() }}", "26"),
        # Llama 3.2's way
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
            "{{ date_string }}",
            "26 Jul 2024",
        ),
    ],
)
def test_template_that_prints_the_date_prints_the_same_every_day(tmp_path, template, expected):
    model = load(str(save_tiny("llama", tmp_path, chat=True)))
    model.tokenizer.chat_template = (
        f"{{% set printed %}}{template}{{% endset %}}{{{{ 'apple' if printed == {expected!r} else 'bird' }}}}"
    )
    assert chat_ids(model, [""]) == [[WORDS.index("apple") + 2]]


def test_template_is_rendered_as_before_but_for_the_date(tmp_path):
    tokenizer = load(str(save_tiny("llama", tmp_path, chat=True))).tokenizer
    for template in (
        "\n\n  {% if strftime_now is defined %}\n  {{ messages[0].content }}\n{% endif %}\n",
        "  {{ messages[0].content }}{# strftime_now #}",
    ):
        render = partial(tokenizer.apply_chat_template, [{"role": "user", "content": "egg"}], tokenize=False)
        assert render(chat_template=with_fixed_date(template)) == render(chat_template=template)
    assert with_fixed_date("{{ messages[0].content }}") == "{{ messages[0].content }}"


# -- errors ----------------------------------------------------------------------------------------


def test_tokenizer_without_chat_template_or_pad_token_is_refused(tmp_path):
    model = load(str(save_tiny("llama", tmp_path)))
    with pytest.raises(ModelError, match="chat_template"):
        chat_ids(model, ["apple"])
    model.tokenizer.chat_template = "{{ messages[0].content }}"
    for call in (
        lambda: chat_ids(model, ["apple"]),
        lambda: generate(model, PROMPTS, CONDITIONS, max_new_tokens=2),
        lambda: last_token_streams(model, PROMPTS),
    ):
        with pytest.raises(ModelError, match="pad_token"):
            call()


@pytest.mark.parametrize(
    ("condition", "culprit"),
    [
        (Ablation("deep", random_basis(1), layers=range(1, 4)), "'deep': layer 3"),
        (Ablation("below", random_basis(1), layers=range(-1, 2)), "'below': layer -1"),
        (Ablation("push", random_basis(1), shift=(5, torch.ones(D))), "'push': layer 5"),
        (Ablation("wide", torch.eye(64)[:2]), "'wide': basis"),
        (Ablation("far", random_basis(1), shift=(1, torch.ones(8))), "'far': shift"),
    ],
)
def test_condition_that_does_not_fit_the_model_is_named(llama, condition, culprit):
    with pytest.raises(ValueError, match=culprit):
        generate(llama, PROMPTS, [CONDITIONS[0], condition], max_new_tokens=1)


def test_condition_that_is_none_is_named():
    basis = random_basis(1)
    for name, rows in {"long": 2 * basis, "skew": basis.repeat(2, 1), "nan": basis * torch.nan}.items():
        with pytest.raises(ValueError, match=f"'{name}': .*orthonormal"):
            Ablation(name, rows)
    for options, culprit in (
        ({"basis": torch.ones(D)}, "basis"),
        ({"sites": ("attn",)}, "'attn'"),
        ({"center": torch.ones(D), "sites": ("mlp",)}, "center"),
        ({"strength": float("inf")}, "strength"),
    ):
        with pytest.raises(ValueError, match=f"'bad': .*{culprit}"):
            Ablation("bad", **{"basis": basis} | options)


def test_prompts_that_do_not_fit_are_named(llama):
    long = [2] * 90
    with pytest.raises(ValueError, match="prompt 1 .* max_new_tokens"):
        generate(llama, [PROMPTS[0], long], CONDITIONS[:1], max_new_tokens=7)
    assert len(generate(llama, [long], CONDITIONS[:1], max_new_tokens=6)[0]) == 1
    with pytest.raises(ValueError, match="prompt 1"):
        generate(llama, [[2], []], CONDITIONS[:1], max_new_tokens=1)
    with pytest.raises(ValueError, match="no prompts"):
        first_token_kl(llama, [], CONDITIONS[:1])


def test_other_mistakes_are_named(llama):
    with pytest.raises(ValueError, match="padding 'rihgt'"):
        last_token_streams(llama, PROMPTS, padding="rihgt")
    with pytest.raises(ValueError, match="no conditions"):
        generate(llama, PROMPTS, [], max_new_tokens=1)
    with pytest.raises(ValueError, match="n = 5"):
        tail_streams(llama, PROMPTS, 1, 5)
    for name, edit in {"basis": {"basis": random_basis(1)}, "center": {"center": vector(4, 1.0)},
                       "shift": {"shift": (1, vector(4, 1.0))}}.items():  # fmt: skip
        bad = Ablation("overflown", **{"basis": random_basis(1)} | edit)
        (bad.shift[1] if name == "shift" else getattr(bad, name)).view(-1)[3] = torch.nan
        with pytest.raises(ValueError, match=f"'overflown': {name}"):
            first_token_kl(llama, PROMPTS, [bad])


def test_overflow_is_no_answer(llama):
    along = torch.full((1, D), D**-0.5)
    huge = Ablation("huge", along, strength=-5.0, shift=(0, torch.full((D,), 3e38)))
    for measure in (first_token_kl, first_token_log_probabilities, partial(generate, max_new_tokens=3)):
        with pytest.raises(ModelError, match="float32"):
            measure(llama, PROMPTS, [huge])


def test_nothing_outlives_its_batch(llama, monkeypatch):
    """Keys and values go with their batch, not when garbage is collected: on a GPU they fill the memory."""
    caches = []
    monkeypatch.setattr(
        forwards, "DynamicCache", lambda **k: caches.append(weakref.ref(c := DynamicCache(**k))) or c
    )
    gc.disable()
    try:
        generate(llama, PROMPTS, CONDITIONS, max_new_tokens=3, batch_size=16)
        first_token_kl(llama, PROMPTS, CONDITIONS[8:10])
        assert len(caches) > 5 and not any(reference() for reference in caches)
    finally:
        gc.enable()
