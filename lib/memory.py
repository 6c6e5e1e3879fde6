"""How much memory study 1 takes, stage by stage, before it runs: `python -m lib.memory MODEL`.

`plan` needs a configuration and no weights. The forwards of every stage are rehearsed (`lib.rehearsal`): the
functions of `lib` run as they are on tensors without contents, so that what counts is what they allocate: the
residual stream, the MLP's and attention's intermediates, attention scores where they are formed, masks, the
logits of `word_probabilities`, sums by class. Added by count: the streams that the sweep keeps for other
conditions (from its own plan; in host memory), the arrays of results, and what earlier stages left behind.

Left out: the numpy analyses between the stages, which copy a quarter of the class sums at most; the
checkpoints of the embedded models, which are loaded one at a time beside the model; and what an allocator
keeps of the memory that is freed (on a CPU the C library does, for tensors of up to 32 MB).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig

from lib import attention, interventions, models, registry
from lib.batches import auto_batch_size, free_memory, rows_that_fit
from lib.interventions import Condition
from lib.kernel import PlainError
from lib.models import TransformersModel
from lib.parameters import InductionAblation
from lib.rehearsal import Peak, Rehearsal

# Interpreter, thread pools and the packed blocks of the CPU's matrix products: what grows in a first trace.
HOST_OVERHEAD = 8 * 2**20
# cuBLAS takes its workspace from the same allocator: 32 MiB on Hopper, 8 MiB before.
DEVICE_OVERHEAD = 32 * 2**20
# Context and kernels, which a CUDA process loads beside all tensors.
CUDA_CONTEXT = 500 * 10**6


class MemoryShortage(PlainError, RuntimeError):
    """A stage that does not fit; the message says by how much, and what makes it smaller."""


@dataclass(frozen=True)
class Stage:
    """Peak of one stage above the weights, what earlier stages left behind included (bytes)."""

    name: str
    device: int
    host: int


@dataclass(frozen=True)
class MemoryPlan:
    """What study 1 will need.

    Attributes:
        stages: in the order of the notebook.
        weights: bytes of the weights.
        device: kind of device; on "cpu" all is host memory, of "NDIF" the host keeps the results alone.
        rows: rows of a batch in the sweep.
    """

    stages: tuple[Stage, ...]
    weights: int
    device: str
    rows: int

    @property
    def where(self) -> str:
        """Which memory holds weights and activations: "host" or "device"."""
        return "host" if self.device == "cpu" else "device"

    @property
    def largest(self) -> Stage:
        """The stage that needs most where the model lies."""
        return max(self.stages, key=lambda stage: getattr(stage, self.where))

    @property
    def peak(self) -> int:
        """Most bytes above the weights where the model lies."""
        return getattr(self.largest, self.where)

    @property
    def total(self) -> int:
        """Bytes that a card or a machine of its own needs: weights, peak and, on a GPU, the CUDA context."""
        return self.weights + self.peak + (0 if self.device == "cpu" else CUDA_CONTEXT)

    def check(self, device: int | None = None, host: int | None = None) -> None:
        """Stop before a run that cannot end.

        Args:
            device, host: bytes that are free, above the weights; None is not checked.

        Raises:
            MemoryShortage: naming stage, need, what is free and remedies.
        """
        for where, free in (("device", device), ("host", host)):
            stage = max(self.stages, key=lambda stage: getattr(stage, where))
            need = getattr(stage, where)
            if free is not None and need > free:
                elsewhere = ", device 'cpu'" if where == "device" else ""
                raise MemoryShortage(
                    f"{stage.name} needs {_amount(need)} of {where} memory beside the weights, and "
                    f"{_amount(free)} are free: take a smaller batch_size (now {self.rows}), seq_len or "
                    f"k_values, dtype 'bfloat16'{elsewhere}, or a larger machine"
                )

    def __str__(self) -> str:
        lines = []
        for stage in self.stages:
            amounts = _amount(stage.host)
            if self.device != "cpu":
                amounts = f"{self.device} {_amount(stage.device)}, host {amounts}"
            lines.append(f"{stage.name:28s}{amounts}")
        lines.append(f"most: {_amount(self.peak)} above the weights, in: {self.largest.name}")
        lines.append(f"weights: {_amount(self.weights)}")
        return "\n".join(lines)


def plan(
    model: TransformersModel | PreTrainedConfig,
    conditions: Sequence[Condition],
    *,
    n_walks: int,
    seq_len: int,
    n_words: int,
    window: int,
    layer: int,
    n_layouts: int = InductionAblation.model_fields["n_layouts"].default,
    batch_size: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    free: int = 0,
) -> MemoryPlan:
    """Estimate the peak memory of every stage of study 1.

    Args:
        model: loaded, or its configuration alone.
        conditions: of the sweep.
        n_walks: random walks.
        seq_len: tokens of a walk, without BOS.
        n_words: words of the graph.
        window: last tokens of a walk whose streams are compared.
        layer: whose input is read.
        n_layouts: of the words, over which word means are taken at every layer.
        batch_size: rows a forward; 0 chooses as the run will.
        dtype, device: of a configuration, as in `lib.models.load`; a loaded model has its own.
        free: bytes of device memory that are left beside the weights of a configuration, for the choice of
            the batch size on a GPU.
    """
    remote = False
    if isinstance(model, PreTrainedConfig):
        config = model
        choose = partial(rows_that_fit, config, dtype, device, free)
    else:
        config, dtype = model._module.config, next(model._module.parameters()).dtype
        remote = models.is_remote(model)
        device = "NDIF" if remote else model.device.type
        choose = partial(auto_batch_size, model)
    rehearsal = Rehearsal(config, dtype, device)
    sizes = models.shape(rehearsal.model)
    length = 1 + seq_len
    rows = batch_size or choose(length)
    stages, held = [], 0  # what earlier stages left in host memory

    def add(name: str, peak: Peak, host: int = 0) -> None:
        on_device = 0 if device == "cpu" else peak.device + DEVICE_OVERHEAD
        stages.append(Stage(name, on_device, peak.host + host + held + HOST_OVERHEAD))

    def ids(tokens: int, most: int = n_walks) -> torch.Tensor:
        """One batch."""
        return torch.zeros(min(rows, most), tokens, dtype=torch.long)

    n_bins = 8  # stretches of a walk in which the notebook takes the word means
    classes = np.zeros((len(ids(length)), seq_len), dtype=np.int64)
    fill = torch.zeros(sizes.n_layers, sizes.n_heads, sizes.d_head)
    sweep = partial(_sweep, rehearsal, n_words=n_words, layer=layer, shared=not remote)
    results = 4 * n_walks * n_words * (seq_len + sizes.d_model)  # of one condition

    scored = torch.zeros(min(batch_size or 32, 32), 65, dtype=torch.long)
    add("head scores", rehearsal.peak(lambda m: attention.attention_spectra(m, scored, n_prefix=1)))
    add("one walk, all logits", rehearsal.peak(lambda m: _all_logits(m, ids(length, 1))))
    add(
        "mean head outputs",
        rehearsal.peak(lambda m: interventions.mean_head_outputs(m, ids(length), batch_size=rows)),
    )
    # Zero and mean ablation: the second runs beside the results of the first.
    held = 2 * (len(conditions) + 1) * results
    add("ablation sweeps", sweep(conditions, n_walks, length, rows, fill))
    held += 2 * len(conditions) * 4 * n_walks * seq_len  # accuracies
    streams = 4 * n_walks * window * sizes.d_model
    # Batches and the tensor that they are joined to.
    add(
        "streams of the last window",
        rehearsal.peak(lambda m: _window_stream(m, ids(length), layer, window)),
        2 * streams,
    )
    held += streams
    # By node, by the node before and by stretch, layout by layout.
    groups, n_classes = np.stack([classes] * 3), (2 + n_bins) * n_words
    forward = rehearsal.peak(
        lambda m: interventions.layer_class_sums(m, ids(length), groups, n_classes, batch_size=rows)
    )
    of_layers = 4 * (sizes.n_layers + 1) * n_words * sizes.d_model
    kept = 2 * n_layouts * of_layers
    # Three more conditions, which start from streams of the first; the sums of two batches are added.
    entries = len(classes) * length * sizes.d_model * dtype.itemsize
    forward = Peak(forward.device + 3 * entries, forward.host + 3 * entries)
    add("class sums of all layers", forward, kept + 7 * (2 + n_bins) * of_layers)
    held += kept + 3 * n_layouts * of_layers  # a product of each, and one of both
    if trained := getattr(config, "training_length", None):
        twice = min(sizes.n_positions, 2 * trained)
        rows_twice = batch_size or choose(twice)
        baseline = sweep([Condition("baseline")], n_walks, twice, rows_twice, None)
        add("twice the training length", baseline, 2 * 4 * n_walks * n_words * (twice + sizes.d_model))
    return MemoryPlan(tuple(stages), rehearsal.weights, device, rows)


def free(model: TransformersModel) -> dict[str, int]:
    """Bytes that are free for a loaded model, as `MemoryPlan.check` takes them, where that can be known."""
    found, devices = {}, {p.device for p in model._module.parameters() if p.device.type == "cuda"}
    if devices:
        found["device"] = min(free_memory(device) for device in devices)
    with suppress(OSError, KeyError):  # Linux has these files
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found["host"] = int(fields["MemAvailable"].split()[0]) * 1024
        # A container may have less than its machine.
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            used = int((group / "memory.current").read_text())
            found["host"] = min(found["host"], int(limit) - used + _reclaimable(group))
    return found


def _reclaimable(group: Path) -> int:
    """Bytes of files that the kernel keeps for a container and would drop."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat["inactive_file"])


# -- stages ----------------------------------------------------------------------------------------


def _all_logits(model: TransformersModel, ids: torch.Tensor) -> None:
    """The notebook's ablation by hand."""
    with torch.no_grad(), model.trace(ids.to(model.device), use_cache=False):
        model.lm_head.output[0, 1:].float().softmax(-1)


def _window_stream(model: TransformersModel, ids: torch.Tensor, layer: int, window: int) -> None:
    """The notebook's reading of single activations."""
    with torch.no_grad(), model.trace(ids.to(model.device), use_cache=False) as tracer:
        model.layers[layer].input[:, -window:].float().cpu()
        tracer.stop()


def _sweep(
    rehearsal: Rehearsal,
    conditions: Sequence[Condition],
    n_walks: int,
    length: int,
    rows: int,
    fill: torch.Tensor | None,
    *,
    n_words: int,
    layer: int,
    shared: bool,
) -> Peak:
    """Of `ablation_sweep`, without its results."""
    sizes = models.shape(rehearsal.model)
    stream = length * sizes.d_model * next(rehearsal.model._module.parameters()).element_size()

    @cache
    def forward(n: int) -> Peak:
        """n rows from the first block on, with heads ablated in every layer; nothing is kept."""
        masks = torch.zeros(2, sizes.n_layers, sizes.n_heads, dtype=torch.bool)
        masks[1, :, 0] = True
        batch = [(1, sequence) for sequence in range(n)]
        reader = interventions.SweepReader(
            rehearsal.model,
            torch.zeros(n, length, dtype=torch.long),
            word_ids=torch.arange(n_words),
            labels=torch.zeros(n, length - 1, dtype=torch.long),
            n_classes=n_words,
            layer=layer,
            n_prefix=1,
            fill=fill,
            plan=interventions.SweepPlan(masks),
            batch_size=n,
        )
        reader.begin([batch])
        return rehearsal.peak(lambda _: reader.run(batch))

    _, masks = interventions.distinct_heads(conditions, sizes)
    device = host = 0
    for n, entered, kept in _batches(interventions.SweepPlan(masks, shared), min(n_walks, rows, 16), rows):
        entry = n * stream if entered else 0
        at = forward(n)
        device = max(device, at.device + entry)
        host = max(host, at.host + entry + kept * stream)
    return Peak(device, host)


def _batches(plan: interventions.SweepPlan, n_sequences: int, rows: int) -> list[tuple[int, bool, int]]:
    """Of every batch of the sweep over a group of sequences: rows, whether they start from streams of other
    conditions, and how many streams are kept at its end. A tensor of streams stays while one is needed."""
    batches = plan.batches(range(n_sequences), rows)
    at = {row: index for index, batch in enumerate(batches) for row in batch}
    tensor = {  # where the stream is that a row starts from: (batch, layer)
        (i, sequence): (at[plan.parents[i], sequence], plan.starts[i]) for i, sequence in at if plan.starts[i]
    }
    users, size = Counter(tensor.values()), Counter()
    for i, sequence in at:
        for layer in plan.wanted[i]:
            size[at[i, sequence], layer] += 1
    found, kept = [], 0
    for index, batch in enumerate(batches):
        kept += sum(n for (of, _), n in size.items() if of == index)
        found.append((len(batch), batch[0] in tensor, kept))
        for row in batch:
            if row in tensor:
                users[tensor[row]] -= 1
                kept -= 0 if users[tensor[row]] else size[tensor[row]]
    return found


def _amount(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 999.5e6 else f"{n / 1e6:.0f} MB"


# -- command line ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan of study 1 for a model whose configuration is on this disk; needs no weights."""
    parser = argparse.ArgumentParser(prog="python -m lib.memory", description=main.__doc__)
    parser.add_argument("model", help="name in data/models.yaml, hub id in the cache, organism or folder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; of data/models.yaml, else bfloat16")
    parser.add_argument("--card", type=float, default=24.0, help="memory of the device (GB)")
    parser.add_argument("--seq-len", type=int, help="tokens of a walk")
    parser.add_argument("--batch-size", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        config, settings = _settings(given.model)
        dtype = models.float_dtype(given.dtype or settings.pop("dtype", "bfloat16"))
        study = InductionAblation(**settings | ({"seq_len": given.seq_len} if given.seq_len else {}))
        made = plan_study(config, study, dtype, given.device, int(given.card * 1e9), given.batch_size)
        print(made)
        print(f"together {_amount(made.total)}, with {made.rows} rows a batch in the sweeps")
        made.check(**{made.where: int(given.card * 1e9) - made.total + made.peak})
    except (ValueError, MemoryShortage) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def plan_study(
    config: PreTrainedConfig,
    study: InductionAblation,
    dtype: torch.dtype,
    device: str,
    card: int,
    batch_size: int = 0,
) -> MemoryPlan:
    """The plan for a model that has not run yet, on a device of `card` bytes.

    Its heads are not known: they are drawn at random, which spreads the sets over more layers than real ones.
    """
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    order = np.random.default_rng(0).permutation(n_layers * n_heads)
    heads = [(int(i) // n_heads, int(i) % n_heads) for i in order]
    most = max(study.k_values)
    conditions = interventions.ablation_conditions(
        {"induction": heads[:most], "previous token": heads[most : 2 * most]},
        study.k_values, study.n_random_sets, n_layers=n_layers, n_heads=n_heads,
    )  # fmt: skip
    reserved = weights_of(config, dtype) + CUDA_CONTEXT
    return plan(
        config, conditions, n_walks=study.n_walks, seq_len=study.seq_len, n_words=study.word_graph().n_nodes,
        window=study.window, layer=study.read_layer(n_layers), n_layouts=study.n_layouts,
        batch_size=batch_size or study.batch_size, dtype=dtype, device=device, free=max(0, card - reserved),
    )  # fmt: skip


def weights_of(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's weights, from its configuration."""
    return Rehearsal(config, dtype, "cuda").weights


def _settings(name: str) -> tuple[PreTrainedConfig, dict]:
    """Configuration of a model, and what data/models.yaml says of it for study 1."""
    settings, where = {}, Path(name).expanduser()
    if name.startswith("organism/"):
        where = models.ORGANISMS / name.removeprefix("organism/")
    elif not where.is_dir():
        with suppress(registry.RegistryError):
            known = registry.find(name)
            name = known.id
            settings = known.parameters(InductionAblation.study)
        where = registry.snapshot(name, registry.pinned(name)) or where
    if not (where / "config.json").is_file():
        raise ValueError(
            f"no config.json of {name!r} is on this disk: name a folder that holds one, or fetch it by "
            f"`hf download {name} config.json` (a gated model asks for its licence first)"
        )
    return AutoConfig.from_pretrained(str(where), local_files_only=True), settings


if __name__ == "__main__":
    sys.exit(main())
