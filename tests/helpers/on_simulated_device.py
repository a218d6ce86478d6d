"""Run a script on the simulated device: python tests/helpers/on_simulated_device.py SCRIPT [OPTION …]"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).parent
    # Modules of this folder would hide others, such as `datasets`.
    sys.path[:] = [str(folder.parents[1]), *(path for path in sys.path if path != str(folder))]
    from tests.helpers.simulated_device import register

    register()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
