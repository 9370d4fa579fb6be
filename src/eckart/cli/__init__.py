"""The command line: reads arguments, shows progress on stderr, prints results on stdout. It decides nothing.

One module a verb; `program` has the options they share, `console` how things are printed.
"""

import logging

from eckart.cli import (  # noqa: F401 each adds its verbs to `app`
    apply,
    compress,
    evaluate,
    export,
    inspect,
    recover,
    run,
    search,
    serve,
)
from eckart.cli.program import app


def main() -> None:
    """Run the command line (the `eckart` program)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # torchao, where it is installed, tells on import which of its kernels this machine has none for.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app()
