"""Try a model in the browser: coarse video and prompt in, realistic video out.

    python -m c2r.app outputs/phase2/best

The fields of the page make a command line of `c2r.generate`, which checks it as its own; the page shows that command.

Modules that take seconds to import are imported inside functions: --help and bad options are then answered at once.
"""

import logging
import os
import tempfile
import threading
from pathlib import Path

from c2r import cli
from c2r.options import APP, GENERATE
from c2r.panel.model import check_model, load_panel
from c2r.panel.server import LOCAL_HOSTS, require_free_port, require_gradio, served

logger = logging.getLogger("c2r.app")  # under python -m, __name__ is "__main__"


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    args = cli.parse(APP, cli.name_first_words("model", argv))
    given = {name: value for name, value in vars(args).items() if name in GENERATE.options}
    require_gradio()
    require_free_port(args.host, args.port)
    if args.host not in LOCAL_HOSTS:
        logger.warning(f"--host {args.host}: others can reach the page, and there is no password")

    from diffusers.utils.torch_utils import get_device

    device = get_device()
    contract, dtype = check_model(args, device)
    with tempfile.TemporaryDirectory(prefix="c2r-app-") as folder:
        # Apart from the videos of `c2r.panel.videos`: gradio serves files in its own folder itself, and copies others.
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/page"
        panel = load_panel(args, given, contract, Path(folder), device, dtype)
        with served(panel) as address:
            print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    cli.run(main)
