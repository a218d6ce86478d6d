"""Runs the encoding command again and again in processes forked from one that has imported all it needs.

python -m tests.encode_server SECONDS,SECONDS,… arguments of c2r.encode

The n-th run is ended by SIGKILL after the n-th number of seconds; then one runs to its end.
"""

import os
import signal
import sys
import time

import c2r.encode
from c2r.options import run


def encode():
    """The process id of a run."""
    if (process := os.fork()) == 0:
        run(c2r.encode.main)
        os._exit(0)
    return process


def main():
    moments, sys.argv = sys.argv[1], ["encode", *sys.argv[2:]]
    for seconds in map(float, moments.split(",")):
        process = encode()
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        print("killed" if killed else "ended before", flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(encode(), 0)[1])
    print(f"ended with {status}", flush=True)


if __name__ == "__main__":
    main()
