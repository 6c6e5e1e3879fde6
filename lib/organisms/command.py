"""Train embedded models: `python -m lib organisms NAME [--seed N | --measure | --card]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lib import ROOT
from lib.organisms import cards, codi_gates, induction, refusal_gates, shipping

ORGANISMS = {
    organism.name: organism
    for organism in (induction.ORGANISM, *refusal_gates.ORGANISMS, *codi_gates.ORGANISMS)
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lib organisms",
        description="Train an embedded model and ship it to data/organisms. An interrupted run continues.",
    )
    parser.add_argument("name", choices=sorted(ORGANISMS))
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--seed", type=int, help="train this seed only, and ship nothing")
    part.add_argument("--measure", action="store_true", help="measure what is shipped again")
    part.add_argument("--card", action="store_true", help="write the cards anew from the records")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; the weights depend on it")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".cache" / "organisms", help="states and logs")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(arguments.threads)
    organism = ORGANISMS[arguments.name]
    if arguments.seed is not None:
        organism.train_seed(arguments.seed, arguments.scratch)
    elif arguments.card:
        print(cards.write_cards(organism.name))
    elif arguments.measure:
        print(shipping.measure_again(organism))
    else:
        for seed in organism.seeds:
            organism.train_seed(seed, arguments.scratch)
        print(shipping.publish(organism, arguments.scratch))
    return 0
