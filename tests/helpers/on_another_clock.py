"""Run a script in another time zone and a day earlier: python tests/helpers/on_another_clock.py SCRIPT [OPTION …]"""

import os
import runpy
import sys
import time
from pathlib import Path

DAY = 24 * 60 * 60

if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]  # its modules would hide others
    os.environ["TZ"] = "Pacific/Kiritimati"  # UTC+14
    time.tzset()
    seconds, nanoseconds = time.time, time.time_ns
    time.time, time.time_ns = lambda: seconds() - DAY, lambda: nanoseconds() - DAY * 10**9
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
