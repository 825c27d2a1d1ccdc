"""`make explore`: the demo's trained model in a browser, or the shipped nano pair."""

import argparse
import json
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from atlas_jax import serve
from atlas_jax.build_index import main as build_index_main
from atlas_jax.core.terminal import expand_arguments
from atlas_jax.demo import factbook
from atlas_jax.demo.commands import Place
from atlas_jax.demo.corpora import ASKED
from atlas_jax.demo.paths import bind, nano_checkpoint
from atlas_jax.demo.recipes import JOINT

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
    out = Path(flags.out)
    told = command(Path(flags.demo), out)
    kept = bind("CompilerConfig.cache", out / "compiled")  # of both, which are one process
    indexing = index_command(told)
    if indexing:
        code = build_index_main([*indexing, kept])
        if code:
            return code
    url = f"http://127.0.0.1:{flags.port}"
    print(f"the explorer is {url} (Ctrl-C ends it); it answers when all is compiled, which takes "
          "a minute or more the first time", flush=True)  # fmt: skip
    threading.Thread(target=_tell_when_ready, args=(url,), daemon=True).start()
    if not flags.no_browser:
        threading.Timer(1.0, webbrowser.open, [url]).start()
    # One person asks: questions come one at a time.
    settings = [kept, "--gin.ServeConfig.batch_rows=(1,)", f"--gin.PORT={flags.port}"]
    return serve.main([*told, *settings, *bindings])


def index_command(told: Sequence[str]) -> list[str]:
    """The arguments of `atlas-jax build_index` for what is to be served; none if it is there."""
    index = next((one.partition("=")[2] for one in told if one.startswith("--gin.INDEX=")), "")
    if (Path(index.strip('"')) / "index.json").is_file():
        return []
    names = ("INITIAL_CHECKPOINT_PATH", "PASSAGES", "STORE", "INDEX")
    given = [one for one in told if one.startswith(tuple(f"--gin.{name}=" for name in names))]
    return ["--gin_file=runs/build_index.gin", "--gin.EMBED_BATCH_SIZE=16", *given]


def _tell_when_ready(url: str) -> None:
    """Say on the terminal how far the server is, until it answers."""
    said = ""
    while said != "ready":
        time.sleep(1)
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as reply:
                raw = reply.read()
        except urllib.error.HTTPError as error:
            raw = error.read()
        except OSError:
            continue
        state = json.loads(raw)["status"]
        if state != said:
            print(f"{state}: {url}" if state == "ready" else state, flush=True)
        said = state


def command(demo: Path, out: Path) -> list[str]:
    """The arguments of `atlas-jax serve`.

    Args:
      demo: folder of a demo run; its jointly trained model is served if it is there.
      out: without it, the Factbook is prepared here for the nano pair.
    """
    place = Place(demo, nano_checkpoint())
    trained = place.trained(JOINT)
    if (trained / "config.json").is_file():
        bindings = [
            bind("INITIAL_CHECKPOINT_PATH", trained),
            bind("STORE", place.store),
            bind("INDEX", place.index_of(JOINT)),
        ]
        if place.states.is_dir():
            bindings.append(bind("CorpusConfig.reader_states", place.states))
        examples = place.data / ASKED
    else:
        data = out / "data"
        if not (data / "test.jsonl").is_file():
            factbook.prepare(data)
        bindings = [
            bind("INITIAL_CHECKPOINT_PATH", place.checkpoint),
            bind("PASSAGES", data / "passages.jsonl"),
            bind("STORE", out / "store"),
            bind("INDEX", out / "index"),
        ]
        examples = data / "test.jsonl"
    told = bind("ServeConfig.examples", examples)
    return ["--gin_file=runs/serve.gin", *bindings, told]


if __name__ == "__main__":
    sys.exit(main())
