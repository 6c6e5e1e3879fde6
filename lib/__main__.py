"""One door to all commands: `python -m lib COMMAND ...`; alone it lists them."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys

COMMANDS = {
    "run": "run the studies, on the embedded models or on another one",
    "models": "the models that the studies are meant for, what of them is on this disk, and where it lies",
    "get": "fetch a model of data/models.yaml, so that runs need no network",
    "compare": "what differs between two runs",
    "arrays": "other people's arrays through the measures and claims of the studies, without a model",
    "seeds": "headline numbers of a study for each of its trained seeds",
    "pairs": "have an API write pairs of requests of a further category, for study 3",
    "organisms": "train an embedded model again",
}
_MODULES = {
    "run": "tools.run",
    "models": "core.registry",
    "compare": "tools.compare",
    "arrays": "tools.artifacts",
    "seeds": "tools.seeds",
    "pairs": "refusal.prompts",
    "organisms": "organisms.command",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status, 2 for a command that is none."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:<{width}}  {does}" for command, does in COMMANDS.items()]
        print("\n".join(["python -m lib COMMAND ...", *lines, "`python -m lib COMMAND --help` says more."]))
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        print(f"python -m lib: no command {name!r}; {hint}", file=sys.stderr)
        return 2
    if name == "get":
        return _get(rest)
    return importlib.import_module(f"lib.{_MODULES[name]}").main(rest)


def _get(argv: list[str]) -> int:
    from lib.core import registry

    parser = argparse.ArgumentParser(prog="python -m lib get", description=COMMANDS["get"])
    parser.add_argument("name", help="of data/models.yaml; python -m lib models lists them")
    options = parser.parse_args(argv)
    try:
        print(registry.fetch(registry.find(options.name)))
    except registry.ModelError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what has arrived is kept for the next time", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
