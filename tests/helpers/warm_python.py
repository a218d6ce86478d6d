"""Stand in for Python: run a command line in a fork of the server beside this file (tests/helpers/forks.py).

Signals are passed on to the fork, and its exit status is returned; it dies with this process.
"""

import json
import os
import signal
import socket
import sys


def main():
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(os.path.dirname(__file__), "socket"))
    spaces = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts")]
    socket.send_fds(server, [b"."], [0, 1, 2, *spaces])
    request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    server.sendall(len(request).to_bytes(4, "big") + request)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
    status = int.from_bytes(server.recv(4), "big", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
