"""Parameters of studies 1 and 2 and of their appendices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lib.core.parameters import REAL, Dtype, NotebookParameters, Real, StudyParameters, Whole, Wholes, Words

if TYPE_CHECKING:
    from lib.induction.walks import Graph

# Park-25 (arXiv 2501.00070), row by row.
GRID_WORDS = tuple(
    "apple bird car egg house milk plane opera box sand sun mango rock math code phone".split()
)


class _GraphParameters(NotebookParameters):
    """A study on a graph."""

    graph: Literal["grid", "ring", "hexagonal", "edges"] = "grid"
    rows: Whole = Field(4, ge=1)
    cols: Whole = Field(4, ge=1)
    edges: Words = []

    def word_graph(self) -> Graph:
        """The graph that these parameters describe, without words."""
        from lib.induction import walks  # networkx: only when there is a graph to build

        if self.graph == "grid":
            return walks.grid_graph(self.rows, self.cols)
        if self.graph == "hexagonal":
            return walks.hexagonal_graph(self.rows, self.cols)
        if self.graph == "ring":
            return walks.ring_graph(self.rows * self.cols)
        return walks.graph_from_edges(self.edges)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.edges and self.graph != "edges":
            yield f"edges: given, but graph is {self.graph!r}; set graph to 'edges', or edges to []"
            return
        try:
            self.word_graph()
        except ValueError as error:
            yield f"{'edges' if self.graph == 'edges' else 'graph'}: {error}"


class _WordGraphParameters(_GraphParameters, StudyParameters):
    """A study of a model that reads walks on a graph of words."""

    model_id: str = Field(REAL, min_length=1)
    dtype: Dtype = "auto"
    bos: str = Field("auto", min_length=1)
    words: Words = list(GRID_WORDS)

    def word_graph(self) -> Graph:
        from lib.induction import walks  # networkx: only when there is a graph to build

        if self.graph == "grid":
            return walks.grid_graph(self.rows, self.cols, self.words)
        if self.graph == "hexagonal":
            return walks.hexagonal_graph(self.rows, self.cols, self.words)
        if self.graph == "ring":
            return walks.ring_graph(len(self.words), self.words)
        named = {word.strip() for edge in self.edges for word in edge.split("-")}
        nodes = [word for word in self.words if word in named] if named <= set(self.words) else self.words
        return walks.graph_from_edges(self.edges, nodes)

    def faults(self) -> Iterator[str]:
        if repeated := [word for word, n in Counter(self.words).items() if n > 1]:
            yield f"words: each may stand once; repeated: {' '.join(repeated)}"
        else:
            yield from super().faults()
        most = self.seq_len - self.seq_len // 5  # accuracy's rise is measured from the second tenth on
        if self.window > most:
            yield f"window: {self.window} tokens of seq_len = {self.seq_len}; at most {most} leave a start"


class InductionAblation(_WordGraphParameters):
    """Study 1: which heads carry the in-context grid, and whether the model uses it."""

    study: ClassVar[str] = "01_induction_ablation"
    embedded: ClassVar[dict[str, Any]] = {"model_id": "organism/induction", "k_values": [1, 2, 4, 8]}

    seq_len: Whole = Field(400, ge=88)  # a token is read in each of six stretches of context
    window: Whole = Field(200, ge=1)
    n_layouts: Whole = Field(8, ge=4)
    n_selecting: Whole = Field(4, ge=1)
    k_values: Wholes = [1, 2, 5, 10, 20, 32]
    n_random_sets: Whole = Field(3, ge=2)
    layer: Whole = Field(-1, ge=-1)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)


class NeighborMixing(_WordGraphParameters):
    """Study 2: whether averaging with neighbours is what a model does."""

    study: ClassVar[str] = "02_neighbor_mixing"
    embedded: ClassVar[dict[str, Any]] = {"model_id": "organism/induction", "n_heads": 8, "layer": 4}
    stays_here: ClassVar[str] = "it computes with the weights, which are not sent"

    seq_len: Whole = Field(400, ge=40)
    window: Whole = Field(200, ge=1)
    n_layouts: Whole = Field(8, ge=4)
    n_selecting: Whole = Field(4, ge=1)
    layer: Whole = Field(-1, ge=-1)
    n_heads: Whole = Field(32, ge=1)
    dim: Whole = Field(4096, ge=2)
    n_seeds: Whole = Field(20, ge=2)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)


class HeadsInLanguage(_WordGraphParameters):
    """Appendix 1a: the heads of the grid task in natural text, and further checks of study 1."""

    study: ClassVar[str] = "1a_heads_in_language"
    appendix: ClassVar[bool] = True
    embedded: ClassVar[dict[str, Any]] = {"model_id": "organism/induction", "n_heads": 8}

    seq_len: Whole = Field(400, ge=40)
    window: Whole = Field(200, ge=1)
    n_layouts: Whole = Field(8, ge=4)
    n_heads: Whole = Field(32, ge=1)
    n_texts: Whole = Field(16, ge=4)
    layer: Whole = Field(-1, ge=-1)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)


class Emergence(_WordGraphParameters):
    """Appendix 1b: an embedded model, and how its circuit appears in training."""

    study: ClassVar[str] = "1b_emergence"
    appendix: ClassVar[bool] = True

    model_id: str = Field("organism/induction", pattern="^organism/")
    seq_len: Whole = Field(400, ge=40)
    window: Whole = Field(100, ge=1)
    n_walks: Whole = Field(16, ge=4)
    n_layouts: Whole = Field(20, ge=4)
    k_values: Wholes = [1, 2, 4, 8]
    layer: Whole = Field(-1, ge=-1)
    batch_size: Whole = Field(0, ge=0)
    n_bootstrap: Whole = Field(2000, ge=100)

    def read_layer(self, n_layers: int) -> int:
        """The block at whose input word means are read; by default as deep as Arditi-26's, 26 of 32."""
        return self.layer if self.layer >= 0 else round(0.81 * n_layers)


class MixingTheory(_GraphParameters):
    """Appendix 2a: spectrum, steps, noise and rank in the toy of study 2."""

    study: ClassVar[str] = "2a_mixing_theory"
    appendix: ClassVar[bool] = True

    dim: Whole = Field(4096, ge=2)
    steps: Whole = Field(1, ge=0)
    self_weight: Real = 1.0
    noise: Real = Field(0.0, ge=0)
    n_seeds: Whole = Field(20, ge=2)
    ranks: Wholes = [1, 2, 4, 8, 16, 32, 64, 128]
    dims: Wholes = [16, 64, 256, 1024, 4096]
    seed: Whole = Field(0, ge=0, lt=2**32)
