"""Kill a training run again and again, start it again each time, and compare its end with a run left in peace.

    python -m tests.helpers.crash --phase 1 --kills 30 --output crash.csv

A run has two legs, the second with more steps and another --cg_ratio. What each kill waits for, and for how long it
then waits, is drawn from a seed. What it struck is read from what it left behind.
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

from tests.helpers.background import Background
from tests.helpers.commands import TORCHRUN, phase1, phase2
from tests.helpers.datasets import flat_video, write_dataset
from tests.helpers.tiny import save_tiny_dinov3, save_tiny_pipeline

CHECKPOINTING_STEPS, VALIDATION_STEPS, SAMPLE_STEPS = 4, 6, 12
OPTIONS = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 2,
    "prompt_dropout": 0.3,
    "lr_warmup_steps": 20,
    # So slow that the best validation is nearly always the last one.
    "learning_rate": 1e-4,
    "ema_decay": 0.9,
    "checkpointing_steps": CHECKPOINTING_STEPS,
    "checkpoints_total_limit": 2,
    "validation_steps": VALIDATION_STEPS,
    "resume_from_checkpoint": "latest",
}
#: The bound is below any CG look: the controller lowers the share at every sampling, down to its least.
PHASE2_OPTIONS = {
    "control_dropout": 0.3,
    "control_augmentation": 0.5,
    "adversarial_weight": 0.1,
    "real_weight": 2.0,
    "sample_steps": SAMPLE_STEPS,
    "monitor_bound": -9,
    "monitor_patience": 1,
    "cg_ratio_min": 0.125,
}
CG_RATIOS = (0.25, 0.5)  # of the two legs
#: What a kill waits for, and up to how many seconds it then waits.
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
#: How often each comes in a deck of kills; the last kill of each leg strikes while final/ is saved.
DECK = {"starting": 1, "encoding": 1, "training": 2, "validating": 2, "saving": 3, "pruning": 2, "saving best": 2}
DECKS = {1: DECK, 2: DECK | {"sampling": 2}}
#: A moment that has not come after so many steps, as a best validation may not, is waited for no longer.
PATIENCE = 16


class Scene(Background):
    """A run as it looks from outside: its output and the files that it writes.

    Args:
        command: list of arguments for Python.
        out: the run's output folder.
    """

    def __init__(self, command, out):
        self.out = out
        self.started = time.time()
        super().__init__(command)

    def writes(self, pattern):
        """Whether this run, not one before it, is seen to write or to remove such a file."""
        for path in self.out.glob(pattern):
            with suppress(FileNotFoundError):
                if path.stat().st_ctime > self.started:
                    return True
        return False

    def has_come(self, moment):
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
        """Whether this run has validated a step of phase 2 at which it also samples, and has not written these yet."""
        steps = self.steps
        if not steps or steps[-1] == steps[0] or steps[-1] % SAMPLE_STEPS:
            return False
        validated = f"step {steps[-1]}: validation loss" in self.text and "control gain" in self.text
        return validated and not self.writes(f"samples/step-{steps[-1]}/sheet.png")

    def struck(self):
        """What a kill has interrupted."""
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


def run_with_kills(command, out, moments, draw):
    """Start `command` until it ends by itself; the first times it is killed, with all its processes.

    Args:
        command: list of strings for Python; resumes from the latest checkpoint.
        out: its output folder.
        moments: what each kill waits for, keys of MOMENTS.
        draw: `random.Random`, for how long it then waits.

    Returns:
        list of dicts, one per kill.

    Raises:
        AssertionError: a start that was not killed failed, or the run ended before all kills were used.
    """
    log = []
    for moment in moments:
        delay = draw.uniform(0, MOMENTS[moment])
        if moment == "encoding":
            shutil.rmtree(out / ".c2r_cache", ignore_errors=True)
        with Scene(command, out) as scene:
            scene.wait_until(lambda scene=scene, moment=moment: scene.has_come(moment))
            time.sleep(delay)
            assert scene.process.poll() is None, f"{moment}: ended {delay:.4f} s later: {scene.text[-3000:]}"
            scene.kill()
            log.append({"kill": len(log) + 1, "waited for": moment, "then s": f"{delay:.4f}", **_found(scene)})
    with Scene(command, out) as scene:
        assert scene.end() == 0, scene.text[-3000:]
    return log


def _found(scene):
    steps = scene.steps
    checkpoints = sorted(int(path.name.split("-")[1]) for path in scene.out.glob("checkpoint-*"))
    left = sorted(path.name for path in scene.out.glob(".*") if path.name not in (".lock", ".c2r_cache"))
    return {
        "struck": scene.struck(),
        "from step": steps[0] if steps else "",
        "at step": steps[-1] if steps else "",
        "checkpoints": " ".join(map(str, checkpoints)),
        "left behind": " ".join(left),
    }


def differences(out, reference):
    """What differs between two finished runs, as a list of names; empty if all is equal, bit for bit."""
    found = []
    names = [sorted(path.name for path in run.iterdir() if path.name != "logs") for run in (out, reference)]
    if names[0] != names[1]:
        found.append(f"files {names[0]}, not {names[1]}")
    compared = [path for path in reference.iterdir() if path.name not in ("logs", ".c2r_cache", ".lock")]
    files = (file for path in compared for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    for path in sorted(files):
        name = path.relative_to(reference)
        if not (out / name).is_file() or _content(out / name) != _content(path):
            found.append(str(name))
    ours, theirs = curves(out), curves(reference)
    found += [f"curve {tag}" for tag in sorted(ours.keys() | theirs.keys()) if ours.get(tag) != theirs.get(tag)]
    return found


def _content(path):
    if path.suffix != ".json":
        return path.read_bytes()
    content = json.loads(path.read_text())
    content.get("loop", {}).get("logs", {}).pop("train/samples_per_second", None)
    return content


def curves(out):
    """{tag: [(step, value)]} as TensorBoard shows them, but for what depends on the clock."""
    events = EventAccumulator(str(out / "logs"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "train/samples_per_second"
    }


def crash_legs(folder, phase, processes, kills, seed):
    """Both runs, both legs.

    Args:
        folder: an empty one, to work in.
        phase: 1 or 2.
        processes: 1 or 2.
        kills: a list of moments for each leg.
        seed: of the delays.

    Returns:
        folder of the killed run, folder of the other, list of dicts: one per kill.
    """
    save_tiny_pipeline(folder / "models/pipeline")
    save_tiny_dinov3(folder / "models/dinov3")
    words = ["a street", "the city at night", "red brick", "", "two people on a street", "a street"]
    write_dataset(folder / "data/real", [f"r{i}.mp4" for i in range(6)], words)
    fine, coarse = ([f"{kind}{i}.mp4" for i in range(5)] for kind in "fc")
    # Of another look than the real ones: the CG monitor has something to say, and the controller to do.
    write_dataset(folder / "data/cg", fine, words[:5], coarse, video=flat_video)
    out, reference = folder / "killed", folder / "reference"
    draw, log, steps = random.Random(seed), [], 0
    for cg_ratio, moments in zip(CG_RATIOS, kills):
        steps += steps_of(moments)
        options = [f"--max_train_steps={steps}"] + ([f"--cg_ratio={cg_ratio}"] if phase == 2 else [])
        with Scene(command_of(folder, phase, processes, reference, *options), reference) as undisturbed:
            leg = run_with_kills(command_of(folder, phase, processes, out, *options), out, moments, draw)
            assert undisturbed.end() == 0, undisturbed.text[-3000:]
        log += [kill | {"kill": len(log) + i, "leg ends at": steps} for i, kill in enumerate(leg, start=1)]
    return out, reference, log


def command_of(folder, phase, processes, run, *extra):
    """The command of one run in the working folder of `crash_legs`."""
    arguments = [folder / "models", folder / "data"]
    options = [*(f"--{name}={value}" for name, value in OPTIONS.items()), f"--cache_dir={run / '.c2r_cache'}", *extra]
    launcher = TORCHRUN if processes == 2 else []
    if phase == 1:
        return phase1(*arguments, run, *options, launcher=launcher)
    backbone = folder / "models/pipeline/transformer"
    options += [f"--{name}={value}" for name, value in PHASE2_OPTIONS.items()]
    return phase2(*arguments, backbone, run, *options, launcher=launcher)


def steps_of(moments):
    """More than the kills of a leg use up, or it would end before them. On neither interval, but by chance."""
    return 2 * CHECKPOINTING_STEPS * len(moments) + PATIENCE + 1


def deal(phase, kills, seed):
    """The moments of so many kills in two legs, shuffled."""
    deck = [moment for moment, count in DECKS[phase].items() for _ in range(count)]
    draw, legs = random.Random(seed), []
    for count in (kills - kills // 2, kills // 2):
        moments = (deck * count)[: count - 1]
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
            Path(folder), args.phase, args.processes, deal(args.phase, args.kills, args.seed), args.seed
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
