"""Kill a training run again and again, start it again each time, and compare its end with a run left in peace.

    python -m tests.crash --phase 1 --kills 30 --output crash.csv

Where each kill strikes is drawn from a seed: a time after start or resume, or the moment at which the run is seen to
write a checkpoint, to delete one or to write best/.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

#: What a kill waits for: a line of output or files in the output folder; and up to how many seconds it then waits.
MOMENTS = {
    "starting": ("kept ", 2.0),
    "encoding": (".c2r_cache", 0.5),
    "running": ("at step ", 1.5),
    "saving": (".checkpoint-*.tmp", 0.02),
    "pruning": (".checkpoint-*.removed", 0.002),
    "saving best": (".best.tmp", 0.02),
}
WEIGHTS = (0.1, 0.05, 0.4, 0.25, 0.1, 0.1)


def run_with_kills(command, out, kills, seed, environment, time_limit=60):
    """Start `command` until it ends by itself; the first `kills` times it is killed, its children too.

    Args:
        command: list of strings; resumes from the latest checkpoint.
        out: its output folder.
        kills: how often.
        seed: of the moments.
        environment: for the processes.
        time_limit: seconds for one start.

    Returns:
        list of dicts, one per kill: what it waited for, for how long, and what it found.

    Raises:
        AssertionError: a start that was not killed failed, or the run ended before all kills were used.
    """
    draw, log = random.Random(seed), []
    while True:
        moment = draw.choices(list(MOMENTS), WEIGHTS)[0] if len(log) < kills else None
        delay = draw.uniform(0, MOMENTS[moment][1]) if moment else None
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True, cwd=environment["PWD"]
            )
            killed = _kill_at(process, moment, delay, out, output, time_limit)
            if not killed:
                output.seek(0)
                assert process.wait(time_limit) == 0, output.read()[-3000:]
                if moment is None:
                    return log
                # It ended before the moment came, as when nothing is left to encode: not a kill.
                assert not (out / "final").exists(), f"ended after {len(log)} of {kills} kills"
                continue
        left = sorted(path.name for path in out.glob(".*") if path.name not in (".lock", ".c2r_cache"))
        steps = sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
        log.append({
            "kill": len(log) + 1,
            "moment": moment,
            "delay": round(delay, 4),
            "checkpoints": " ".join(map(str, steps)),
            "left behind": " ".join(left),
        })  # fmt: skip


def _kill_at(process, moment, delay, out, output, time_limit):
    """Whether the process lived until the moment, and was killed."""
    if moment is None:
        return False
    what, end = MOMENTS[moment][0], time.monotonic() + time_limit
    while process.poll() is None and time.monotonic() < end:
        if what.startswith("."):
            seen = any(out.glob(what))
        else:
            output.flush()
            seen = what in os.pread(output.fileno(), 100_000, 0).decode(errors="replace")
        if seen:
            time.sleep(delay)
            if process.poll() is not None:
                return False
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # Workers may hold the output folder's lock for a moment longer.
            time.sleep(0.2)
            return True
        time.sleep(0.0005)
    return False


def differences(out, reference):
    """What differs between two finished runs, as a list of names; empty if all is equal, bit for bit."""
    found = []
    last = max(reference.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])).name
    for path in [file for name in ("best", "final", last) for file in (reference / name).rglob("*.safetensors")]:
        name = path.relative_to(reference)
        a, b = load_file(out / name), load_file(path)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            found.append(str(name))
    for name in (f"{last}/state.json", "best/c2r.json", "final/c2r.json"):
        if json.loads((out / name).read_text()) != json.loads((reference / name).read_text()):
            found.append(name)
    if curves(out) != curves(reference):
        found.append("logs")
    if [path.name for path in sorted(out.glob("checkpoint-*"))] != [
        path.name for path in sorted(reference.glob("checkpoint-*"))
    ]:
        found.append("list of checkpoints")
    return found


def curves(out):
    """{tag: [(step, value)]} as TensorBoard shows them, but for what depends on the clock."""
    events = EventAccumulator(str(out / "logs"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "train/samples_per_second"
    }


def main():
    from tests.test_commands import crash_legs  # the same commands as in the test

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", type=int, choices=(1, 2), required=True)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="CSV, a line per kill")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log, found = crash_legs(Path(folder), args.phase, args.processes, args.kills, args.seed, steps=160)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, log[0].keys())
        writer.writeheader()
        writer.writerows(log)
    print(f"{len(log)} kills; differences from the uninterrupted run: {found or 'none'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
