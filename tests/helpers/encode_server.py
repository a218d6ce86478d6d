"""Runs the encoding command again and again in processes forked from one that has imported all it needs.

python -m tests.helpers.encode_server CLIPS:SECONDS,CLIPS:SECONDS,… arguments of c2r.encode

Each run but the last is ended by SIGKILL so many seconds after --cache_dir has got so many clips more; of each it
prints how many there were. The last one runs to its end.
"""

import os
import signal
import sys
import time
from pathlib import Path

import c2r.encode
from c2r.cli import run


def encode():
    """The process id of a run."""
    if (process := os.fork()) == 0:
        run(c2r.encode.main)
        os._exit(0)
    return process


def main():
    moments, sys.argv = sys.argv[1], ["encode", *sys.argv[2:]]
    cache = Path(next(a.partition("=")[2] for a in sys.argv if a.startswith("--cache_dir=")))

    def count():
        return len(list(cache.glob("clips/*/*.safetensors")))

    for moment in moments.split(","):
        clips, seconds = moment.split(":")
        before, process = count(), encode()
        ended = False
        while count() < before + int(clips) and not ended:
            time.sleep(0.002)
            ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        time.sleep(float(seconds))
        os.kill(process, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        print(f"killed at {count()} clips" if killed else "ended before", flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(encode(), 0)[1])
    print(f"ended with {status}", flush=True)


if __name__ == "__main__":
    main()
