"""Kill a training run many times, restart it each time, and compare its result with that of an uninterrupted run.

    python -m tests.helpers.crash --phase 1 --kills 30 --output crash.csv

A run has two legs, the second with more steps and another --cg_ratio. Each kill waits for a moment, such as "saving",
and then for a random time. The files and the output that the run leaves show what the kill interrupted.
"""

import argparse
import csv
import json
import random
import re
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from c2r.evaluation.monitor import MIN_SCENES
from tests.helpers.background import Background
from tests.helpers.commands import TORCHRUN, phase1, phase2
from tests.helpers.datasets import write_monitored_datasets
from tests.helpers.tiny import save_tiny_dinov3, save_tiny_pipeline

CHECKPOINTING_STEPS, VALIDATION_STEPS, SAMPLE_STEPS = 4, 6, 12
OPTIONS = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 2,
    "prompt_dropout": 0.3,
    "lr_warmup_steps": 20,
    # So low that nearly every validation is the best so far, and best/ is saved often.
    "learning_rate": 1e-4,
    "ema_decay": 0.9,
    "checkpointing_steps": CHECKPOINTING_STEPS,
    "checkpoints_total_limit": 2,
    "validation_steps": VALIDATION_STEPS,
    "resume_from_checkpoint": "latest",
}
#: Every sample exceeds this bound: the controller lowers the CG share at each sampling, down to cg_ratio_min.
PHASE2_OPTIONS = {
    "control_dropout": 0.3,
    "control_augmentation": 0.5,
    "adversarial_weight": 0.1,
    "real_weight": 2.0,
    "sample_steps": SAMPLE_STEPS,
    "num_samples": MIN_SCENES,
    "num_inference_steps": 1,
    "monitor_bound": -9,
    "monitor_patience": 1,
    "cg_ratio_min": 0.125,
}
CG_RATIOS = (0.25, 0.5)  # of the two legs
#: Moments that a kill waits for: {moment: largest number of seconds that it then waits}.
MOMENTS = {
    "starting": 10.0,
    "encoding": 0.3,
    "training": 0.3,
    "validating": 0.1,
    "sampling": 0.2,
    "saving": 0.02,
    "pruning": 0.0005,
    "saving best": 0.02,
    "saving final": 0.02,
}
#: {moment: its share of the kills}; the last kill of each leg waits for "saving final" instead.
SHARES = {"starting": 1, "encoding": 1, "training": 2, "validating": 2, "saving": 3, "pruning": 2, "saving best": 2}
SHARES_OF_PHASE = {1: SHARES, 2: SHARES | {"sampling": 2}}
#: Steps after which a kill no longer waits for its moment: there may be no further best validation.
PATIENCE = 16


class ObservedRun(Background):
    """A run observed from outside, by its output and the files that it writes.

    Args:
        command, fork: see `Background`.
        out: the run's output folder.
    """

    def __init__(self, command, out, fork):
        self.out = out
        self.started = time.time()
        super().__init__(command, fork)

    def writes(self, pattern):
        """Return True if such a file exists and has changed since this run started."""
        for path in self.out.glob(pattern):
            with suppress(FileNotFoundError):
                if path.stat().st_ctime > self.started:
                    return True
        return False

    def has_reached(self, moment):
        """Return True at the moment, or if it is waited for no longer."""
        if moment == "starting":
            return True
        if moment == "encoding":
            return self.writes(".c2r_cache/clips/*/*.safetensors")
        patterns = {
            "saving": ".checkpoint-*.tmp",
            "pruning": ".checkpoint-*.removed",
            "saving best": ".best.tmp",
            "saving final": ".final.tmp",
        }
        if moment in patterns:
            return self.writes(patterns[moment]) or (moment != "saving final" and self.trained(PATIENCE))
        steps = self.steps
        if moment == "sampling":
            return self.sampling or self.trained(PATIENCE)
        if moment == "validating":
            return any(count > steps[0] and count % VALIDATION_STEPS == 0 for count in steps)
        return self.trained(2)

    @property
    def sampling(self):
        """True after the validation of a step that also samples, until its sample videos are written."""
        steps = self.steps
        if not steps or steps[-1] == steps[0] or steps[-1] % SAMPLE_STEPS:
            return False
        validated = f"step {steps[-1]}: validation loss" in self.text and "control gain" in self.text
        return validated and not self.writes(f"samples/step-{steps[-1]}/sheet.png")

    def struck(self):
        """Return a name for the work that a kill has interrupted."""
        for name, suffix in (("checkpoint-*", "tmp"), ("best", "tmp"), ("final", "tmp"), ("checkpoint-*", "removed")):
            if self.writes(f".{name}.{suffix}"):
                return "pruning" if suffix == "removed" else f"saving {name.removesuffix('-*')}"
        steps, text = self.steps, self.text
        if not steps:
            if "kept " not in text or re.search(r"resumed from|starting at", text):
                return "starting"
            return "encoding or loading"
        last = steps[-1]
        if self.sampling:
            return "sampling"
        if last > steps[0] and last % VALIDATION_STEPS == 0 and f"step {last}: validation loss" not in text:
            return "validating"
        return "training"


def run_with_kills(command, out, moments, draw, fork):
    """Start `command` and kill all its processes, once for each moment; then start it and let it end.

    Args:
        command: list of strings for Python; resumes from the latest checkpoint.
        out: its output folder.
        moments: keys of MOMENTS, one per kill.
        draw: `random.Random` for the waiting times.
        fork: see `Background`.

    Returns:
        list of dicts, one per kill.

    Raises:
        AssertionError: the run failed, or ended before a kill.
    """
    log = []
    for moment in moments:
        delay = draw.uniform(0, MOMENTS[moment])
        if moment == "encoding":
            shutil.rmtree(out / ".c2r_cache", ignore_errors=True)
        with ObservedRun(command, out, fork) as run:
            run.wait_until(lambda run=run, moment=moment: run.has_reached(moment))
            time.sleep(delay)
            run.suspend()
            # Before it samples, a run may save best/, which can take longer than the delay.
            while moment == "sampling" and run.struck() == "saving best":
                run.resume()
                time.sleep(0.01)
                run.suspend()
            assert run.is_running(), f"{moment}: ended {delay:.4f} s later: {run.text[-3000:]}"
            run.kill()
            log.append({"kill": len(log) + 1, "waited for": moment, "then s": f"{delay:.4f}", **_found(run)})
    with ObservedRun(command, out, fork) as run:
        assert run.end() == 0, run.text[-3000:]
    return log


def _found(run):
    steps = run.steps
    checkpoints = sorted(int(path.name.split("-")[1]) for path in run.out.glob("checkpoint-*"))
    left = sorted(path.name for path in run.out.glob(".*") if path.name not in (".lock", ".c2r_cache"))
    return {
        "struck": run.struck(),
        "from step": steps[0] if steps else "",
        "at step": steps[-1] if steps else "",
        "checkpoints": " ".join(map(str, checkpoints)),
        "left behind": " ".join(left),
    }


def differences(out, reference):
    """Return the names of files and curves that differ between two finished runs; [] if all are equal bit for bit."""
    found = []
    names = [sorted(path.name for path in run.iterdir() if path.name != "logs") for run in (out, reference)]
    if names[0] != names[1]:
        found.append(f"files {names[0]}, not {names[1]}")
    # run.json tells how each run was last started.
    compared = [path for path in reference.iterdir() if path.name not in ("logs", ".c2r_cache", ".lock", "run.json")]
    files = (file for path in compared for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    for path in sorted(files):
        name = path.relative_to(reference)
        if not (out / name).is_file() or _content(out / name) != _content(path):
            found.append(str(name))
    ours, theirs = curves(out), curves(reference)
    found += [f"curve {tag}" for tag in sorted(ours.keys() | theirs.keys()) if ours.get(tag) != theirs.get(tag)]
    return found


def _content(path):
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: n for name, n in line.items() if name != "train/samples_per_second"} for line in lines]
    if path.suffix != ".json":
        return path.read_bytes()
    content = json.loads(path.read_text())
    content.get("progress", {}).get("logs", {}).pop("train/samples_per_second", None)
    content.get("options", {}).pop("cache_dir", None)  # each run has its own
    return content


def curves(out):
    """Return {tag: [(step, value)]} as TensorBoard shows them, without the speed, which depends on the clock."""
    events = EventAccumulator(str(out / "logs"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "train/samples_per_second"
    }


def crash_legs(folder, phase, processes, kills, seed, fork=False):
    """Train a killed and an uninterrupted run side by side, leg by leg.

    Args:
        folder: an empty folder to work in.
        phase: 1 or 2.
        processes: 1 or 2.
        kills: a list of moments for each leg.
        seed: of the waiting times.
        fork: see `Background`; for one process only.

    Returns:
        folder of the killed run, folder of the uninterrupted run, a list of dicts, one per kill.
    """
    save_tiny_pipeline(folder / "models/pipeline")
    save_tiny_dinov3(folder / "models/dinov3")
    write_monitored_datasets(folder / "data")
    out, reference = folder / "killed", folder / "reference"
    draw, log, steps = random.Random(seed), [], 0
    for cg_ratio, moments in zip(CG_RATIOS, kills):
        steps += steps_of(moments)
        options = [f"--max_train_steps={steps}"] + ([f"--cg_ratio={cg_ratio}"] if phase == 2 else [])
        with ObservedRun(command_of(folder, phase, processes, reference, *options), reference, fork) as undisturbed:
            leg = run_with_kills(command_of(folder, phase, processes, out, *options), out, moments, draw, fork)
            assert undisturbed.end() == 0, undisturbed.text[-3000:]
        log += [kill | {"kill": len(log) + i, "leg ends at": steps} for i, kill in enumerate(leg, start=1)]
    return out, reference, log


def command_of(folder, phase, processes, run, *extra):
    """Return the command of one run in the working folder of `crash_legs`."""
    arguments = [folder / "models", folder / "data"]
    options = [*(f"--{name}={value}" for name, value in OPTIONS.items()), f"--cache_dir={run / '.c2r_cache'}", *extra]
    launcher = TORCHRUN if processes == 2 else []
    if phase == 1:
        return phase1(*arguments, run, *options, launcher=launcher)
    backbone = folder / "models/pipeline/transformer"
    options += [f"--{name}={value}" for name, value in PHASE2_OPTIONS.items()]
    return phase2(*arguments, backbone, run, *options, launcher=launcher)


def steps_of(moments):
    """Return a number of steps in which all kills of a leg find their moment."""
    return 2 * CHECKPOINTING_STEPS * len(moments) + PATIENCE + 1


def draw_moments(phase, kills, seed):
    """Return the moments of `kills` kills, shuffled, as a list for each of two legs."""
    in_order = [moment for moment, count in SHARES_OF_PHASE[phase].items() for _ in range(count)]
    draw, legs = random.Random(seed), []
    for count in (kills - kills // 2, kills // 2):
        moments = (in_order * count)[: count - 1]
        draw.shuffle(moments)
        legs.append([*moments, "saving final"])
    return legs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", type=int, choices=(1, 2), required=True)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="CSV, a line per kill")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out, reference, log = crash_legs(
            Path(folder), args.phase, args.processes, draw_moments(args.phase, args.kills, args.seed), args.seed
        )
        found = differences(out, reference)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, log[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
    print(f"{len(log)} kills; differences from the uninterrupted run: {found or 'none'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
