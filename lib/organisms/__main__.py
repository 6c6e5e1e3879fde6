"""Train embedded models: `python -m lib.organisms NAME [--seed N] [--publish | --card] [--threads N]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lib import ROOT
from lib.organisms import codi_cards, induction, refusal_cards
from lib.organisms.shipping import Organism

ORGANISMS = {
    "induction": Organism(induction.SEEDS, induction.train_seed, induction.publish),
    **refusal_cards.ORGANISMS,
    **codi_cards.ORGANISMS,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lib.organisms",
        description="Train an embedded model and ship it to data/organisms. An interrupted run continues.",
    )
    parser.add_argument("name", choices=sorted(ORGANISMS))
    parser.add_argument("--seed", type=int, help="train this seed only, and ship nothing")
    parser.add_argument("--publish", action="store_true", help="ship what is trained, without training")
    parser.add_argument("--card", action="store_true", help="measure what is shipped again, write its cards")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; the weights depend on it")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".cache" / "organisms", help="states and logs")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    organism = ORGANISMS[arguments.name]
    if arguments.card:
        if organism.write_cards is None:
            parser.error(f"--card: the cards of {arguments.name} are written by --publish alone")
        print(organism.write_cards())
        return
    if arguments.seed is not None:
        organism.train_seed(arguments.seed, arguments.scratch)
        return
    if not arguments.publish:
        for seed in organism.seeds:
            organism.train_seed(seed, arguments.scratch)
    print(organism.publish(arguments.scratch))


if __name__ == "__main__":
    main()
