"""Entry point `python -m atlas_jax.serve`: answers over HTTP, and the explorer in a browser.

    python -m atlas_jax.serve --gin_file=runs/serve.gin \\
      --gin.INITIAL_CHECKPOINT_PATH=work/run/final --gin.STORE=work/store

Needs the extra: pip install 'atlas-jax[serve]'. It listens on http://127.0.0.1:8080 unless told
otherwise. docs/serving.md has the routes, and how to let others reach it.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from atlas_jax import from_gin
from atlas_jax.core.config import launch
from atlas_jax.core.errors import UserError

_NEEDED = ("starlette", "uvicorn", "prometheus_client")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; 0 when stopped, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="atlas-jax serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return launch(_run, parser, argv)


def _run(flags: argparse.Namespace) -> None:
    del flags
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"serving needs the package {name}: pip install 'atlas-jax[serve]'"
            ) from error
    from atlas_jax.serving.run import serve  # needs the extra

    serve(from_gin.serve_config(), from_gin.answer_run())


if __name__ == "__main__":
    sys.exit(main())
