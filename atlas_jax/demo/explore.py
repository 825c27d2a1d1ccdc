"""`make explore`: the demo's trained model in a browser, or the shipped nano pair."""

import argparse
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from atlas_jax import serve
from atlas_jax.core.terminal import expand_arguments
from atlas_jax.demo import factbook
from atlas_jax.demo.commands import JOINT, Place
from atlas_jax.demo.paths import bind, nano_checkpoint
from atlas_jax.training.config import FINAL

PORT = 8080


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; 0 when stopped, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="explore", description=__doc__)
    parser.add_argument("--demo", default="work/demo", help="folder of the demo")
    parser.add_argument("--out", default="work/explore", help="folder for what is prepared")
    parser.add_argument("--port", type=int, default=PORT, help="of the page")
    parser.add_argument("--no_browser", action="store_true", help="only print the address")
    parser.add_argument("bindings", nargs="*", metavar="--gin.NAME=value",
                        help="bindings for `atlas-jax serve`")  # fmt: skip
    arguments = expand_arguments(sys.argv[1:] if argv is None else argv)
    bindings = [one for one in arguments if one.startswith("--gin.")]
    flags = parser.parse_args([one for one in arguments if not one.startswith("--gin.")])
    told = command(Path(flags.demo), Path(flags.out))
    url = f"http://127.0.0.1:{flags.port}"
    print(f"the explorer is {url} (Ctrl-C ends it)", flush=True)
    if not flags.no_browser:
        threading.Timer(1.0, webbrowser.open, [url]).start()
    return serve.main([*told, f"--gin.PORT={flags.port}", *bindings])


def command(demo: Path, out: Path) -> list[str]:
    """The arguments of `atlas-jax serve`.

    Args:
      demo: folder of a demo run; its jointly trained model is served if it is there.
      out: without it, the Factbook is prepared here for the nano pair.
    """
    place = Place.under(demo, nano_checkpoint())
    trained = place.model_dir(JOINT) / FINAL
    if (trained / "config.json").is_file():
        bindings = [
            bind("INITIAL_CHECKPOINT_PATH", trained),
            bind("STORE", place.store),
            bind("INDEX", place.taught_index),
        ]
        data = place.data
    else:
        data = out / "data"
        if not (data / "test.jsonl").is_file():
            factbook.prepare(data)
        bindings = [
            bind("INITIAL_CHECKPOINT_PATH", place.checkpoint),
            bind("PASSAGES", data / "passages.jsonl"),
            bind("STORE", out / "store"),
        ]
    examples = bind("ServeConfig.examples", data / "test.jsonl")
    return ["--gin_file=runs/serve.gin", *bindings, examples]


if __name__ == "__main__":
    sys.exit(main())
