"""The console script `atlas-jax`: one subcommand for each entry point."""

import gc
import importlib
import sys
from collections.abc import Sequence

from atlas_jax import __version__
from atlas_jax.core.errors import nearest
from atlas_jax.core.terminal import guarded

# Subcommand -> (module with `main(argv) -> int`, what it does). A module is imported only
# when its subcommand runs, so that `atlas-jax --help` answers at once.
COMMANDS = {
    "train": ("train", "train reader and retriever with retrieval in the loop"),
    "evaluate": ("evaluate", "answer a file of questions and score answers and retrieval"),
    "build_index": ("build_index", "turn a corpus into a passage store and an index"),
    "retrieve": ("retrieve", "write the passages found for a file of questions"),
    "plan": ("plan", "whether a run fits on a TPU slice, and how fast it can be at best"),
    "ask": ("ask", "type a question; see answer, passages and scores"),
    "serve": ("serve", "answer over HTTP, with the explorer in a browser"),
    "train_retriever": ("train_retriever", "pretrain the retriever, fine-tune it on labels"),
    "pretrain_encoder": ("pretrain_encoder", "pretrain an encoder on text: MLM, NSP, SOP, ELECTRA"),
    "train_classifier": (
        "train_classifier",
        "teach an encoder to classify texts",
    ),
    "self_train": ("self_train", "teach encoder or reader from unlabelled texts, too (LiST)"),
    "pet": ("pet", "teach a classifier by prompted models (PET)"),
    "train_tokenizer": ("train_tokenizer", "make the two tokenizers from text"),
    "prepare": ("prepare", "turn published data sets into the project's files"),
    "prepare_factbook": ("prepare_factbook", "write the demo's passages and questions"),
    "remove_leaks": ("remove_leaks", "take passages that leak evaluation questions out"),
    "convert": ("convert", "checkpoints of Hugging Face, T5X and Meta's Atlas, in and out"),
    "import_index": ("import_index", "passages and saved indices of Meta's Atlas"),
    "index": ("index_command", "look into a saved index, and change it version by version"),
    "mini": ("mini", "put the mini pair together: MiniLM, and a reader upon it"),
    "doctor": ("doctor", "whether the hosts of a run fit together"),
    "demo": ("demo.run", "index, learn from 64 questions, evaluate, swap the index"),
    "claims": ("claims.run", "the paper's claims at nano scale, as a table and a figure"),
}

USAGE_ERROR = 2


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_text}" for name, (_, help_text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: atlas-jax COMMAND [flags]",
            "",
            *lines,
            "",
            "atlas-jax COMMAND --help tells its flags",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code, or 2 when there is none of that name.

    A stream that fails is told in a line, see `terminal.guarded`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded("atlas-jax", lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(f"atlas-jax {__version__}")
        return 0
    name = arguments[0].replace("-", "_")
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        print(f"atlas-jax: error: no command is called {arguments[0]}{hint}", file=sys.stderr)
        return USAGE_ERROR
    module = importlib.import_module(f"atlas_jax.{COMMANDS[name][0]}")
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    return int(module.main(arguments[1:]))


def console_script() -> None:
    """What the installed `atlas-jax` calls.

    No garbage is collected while the modules are imported. What an import makes stays until the
    process ends; to look through all of it for garbage takes a fifth of a start.
    """
    gc.disable()
    sys.exit(main())
