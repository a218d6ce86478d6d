"""Run the encoding command repeatedly, in processes forked from one that has imported everything it needs.

python -m tests.helpers.encode_server CLIPS:SECONDS,CLIPS:SECONDS,… arguments of c2r.encode

One run for each CLIPS:SECONDS is killed by SIGKILL, SECONDS after --cache_dir has gained CLIPS clips; the number of
clips in it is printed then. The last run is not killed.
"""

import os
import signal
import sys
import time
from pathlib import Path

import c2r.encode
import c2r.encoding.encoding_pass
import c2r.training.engine
from c2r.cli import run


def start_encoding() -> int:
    """Fork a process that encodes; return its id."""
    process = os.fork()
    if process == 0:
        run(c2r.encode.main)
        os._exit(0)
    return process


def main():
    moments, sys.argv = sys.argv[1], ["encode", *sys.argv[2:]]
    cache_option = next(argument for argument in sys.argv if argument.startswith("--cache_dir="))
    cache = Path(cache_option.partition("=")[2])

    def count():
        return len(list(cache.glob("clips/*/*.safetensors")))

    for moment in moments.split(","):
        clips, seconds = moment.split(":")
        before, process = count(), start_encoding()
        ended = False
        while count() < before + int(clips) and not ended:
            time.sleep(0.002)
            ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        time.sleep(float(seconds))
        os.kill(process, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        print(f"killed at {count()} clips" if killed else "ended before", flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(start_encoding(), 0)[1])
    print(f"ended with {status}", flush=True)


if __name__ == "__main__":
    main()
