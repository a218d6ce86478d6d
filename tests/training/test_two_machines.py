"""Training over two machines, by ZeRO-3: two network namespaces with a link between them, and one process in each.

The second start continues both runs of the first: phase 2, and a long phase 1 that was ended by a cut link.
"""

import json
import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from c2r.training.resume import list_checkpoints
from c2r.training.watchdog import EXIT_HUNG
from tests.helpers.commands import CONFIGS, ENVIRONMENT, ROOT, phase1, phase2, scalars
from tests.helpers.forks import warm_python

pytestmark = pytest.mark.slow

STEPS, SAVED = 3, 2  # of a run, and of the checkpoint to resume from
SILENCE = 12  # seconds without an answer after which a machine counts as lost
CONFIG = CONFIGS / "deepspeed_zero3_multinode.yaml"


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


class Machine:
    """A network namespace with an address, whose processes see a host name of their own."""

    def __init__(self, number):
        self.number, self.name = number, f"c2r-{os.getpid()}-{number}"
        ip("netns", "add", self.name)

    def connect(self):
        ip("-n", self.name, "address", "add", f"10.77.0.{1 + self.number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", device, "up")

    def start(self, command, folder):
        """Start a Python command as docs/engines.md says; its output goes into a file in `folder`."""
        launcher = [
            *("-m", "accelerate.commands.launch", f"--config_file={CONFIG}", "--num_processes=2"),
            *("--main_process_ip=10.77.0.1", f"--machine_rank={self.number}"),
        ]
        rename = f'hostname machine{self.number} && exec "$@"'
        inside = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", rename, "sh", warm_python()]
        self.output = folder / f"machine{self.number}"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*inside, *launcher, *map(str, command)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "eth0"},
                cwd=ROOT,
            )

    @property
    def text(self):
        return self.output.read_text(errors="replace")

    @property
    def errors(self):
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    def kill(self):
        """Send SIGKILL to all its processes."""
        pids = ip("netns", "pids", self.name).split()
        subprocess.run(["kill", "-KILL", *pids], stderr=subprocess.DEVNULL)  # some have ended meanwhile

    @contextmanager
    def cut_off(self):
        """Cut its link for the body."""
        ip("-n", self.name, "link", "set", "eth0", "down")
        yield
        ip("-n", self.name, "link", "set", "eth0", "up")


@pytest.fixture(scope="module")
def machines():
    """Return two connected machines."""
    for program in ("ip", "unshare", "hostname"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    found = []
    try:
        found += [Machine(0)]
        found += [Machine(1)]
        ends = ("netns", found[0].name, "type", "veth", "peer", "name", "eth0", "netns", found[1].name)
        ip("link", "add", "eth0", *ends)
        for machine in found:
            machine.connect()
        yield found
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    finally:
        for machine in found:
            machine.kill()
            ip("netns", "delete", machine.name)  # and the link with it


@pytest.fixture(scope="module")
def done(machines, tiny_models, small_datasets, tmp_path_factory):
    """Start twice; return the folders of the runs and what was printed."""

    def legs(outs, copied, extra, long):
        """Return the arguments of `tests.helpers.engine_runs`."""
        short = ["--train_batch_size=1", "--num_validation_clips=1", f"--validation_steps={STEPS}"]
        backbone = tiny_models / "pipeline/transformer"
        commands = [
            phase2(tiny_models, small_datasets, backbone, outs[0], *short, *extra, "--num_samples=0", launcher=()),
            phase1(tiny_models, small_datasets, outs[1], *short, *long, "--validation_steps=1000", launcher=()),
        ]
        for folder, (script, *options) in zip(copied, commands):
            yield json.dumps([folder, script.removesuffix(".py"), *map(str, options)])

    folder = tmp_path_factory.mktemp("run")
    outs, again = ([folder / f"{start} {leg}" for leg in (2, "long")] for start in ("first", "second"))
    again[1] = outs[1]
    whole = [f"--max_train_steps={STEPS}", f"--checkpointing_steps={SAVED}"]
    long = ["--checkpointing_steps=2", f"--distributed_timeout_minutes={SILENCE / 60}"]

    # The first start. While the long run trains, the link is cut.
    arguments = legs(outs, [[]] * 2, whole, [*long, "--max_train_steps=1000"])
    command = ["-m", "tests.helpers.engine_runs", "[]", *arguments]
    for machine in machines:
        machine.start(command, folder)
    wait_until(lambda: list_checkpoints(outs[1]), machines)
    with machines[1].cut_off():
        lost_at = time.monotonic()
        statuses = [machine.process.wait(60) for machine in machines]
        seconds = time.monotonic() - lost_at
        errors, texts = ([getattr(m, name) for m in machines] for name in ("errors", "text"))
    last = list_checkpoints(outs[1])[-1][0]
    lost = SimpleNamespace(errors=errors, texts=texts, seconds=seconds, statuses=statuses, last=last)

    # The second start continues the long run for two steps, and the other from its checkpoint SAVED.
    copied = [str(outs[0] / f"checkpoint-{SAVED}"), str(again[0])]
    resume = "--resume_from_checkpoint=latest"
    arguments = legs(again, [copied, []], [*whole, resume], [*long, f"--max_train_steps={last + 2}", resume])
    command = ["-m", "tests.helpers.engine_runs", "[]", *arguments]
    for machine in machines:
        machine.start(command, folder)
    for machine in machines:
        assert machine.process.wait(200) == 0, machine.text[-3000:]
    return SimpleNamespace(outs=outs, again=again, lost=lost, text=machines[0].text)


def wait_until(condition, machines, seconds=200):
    until = time.monotonic() + seconds
    while not condition():
        for machine in machines:
            assert machine.process.poll() is None, machine.text[-3000:]
            assert time.monotonic() < until, machine.text[-3000:]
        time.sleep(0.1)


def test_phase_2_trains_saves_and_resumes_across_machines(done):
    out, again = done.outs[0], done.again[0]
    assert f"resumed from {again / f'checkpoint-{SAVED}'} at step {SAVED}" in done.text
    files = sorted(file.relative_to(out) for file in out.rglob("*.safetensors"))
    assert {path.parts[0] for path in files} == {"best", "final", f"checkpoint-{SAVED}", f"checkpoint-{STEPS}"}
    for kind in ("model/diffusion_pytorch_model", "optimizer-00000-of-00002", "optimizer-00001-of-00002"):
        file = f"checkpoint-{STEPS}/{kind}.safetensors"
        assert (again / file).read_bytes() == (out / file).read_bytes()
    assert scalars(again)["train/loss"] == scalars(out)["train/loss"][SAVED:]


def test_machines_without_a_link_name_each_other_within_the_time_out(done):
    lost = done.lost
    assert lost.seconds < SILENCE + 10  # a busy machine ends its processes late
    assert re.match(r"error: process 1 on machine1 no longer answers: it has ended, or the network", lost.errors[0][0])
    (named_here, named_there) = lost.errors
    assert len(named_here) == 1, lost.texts[0][-3000:]
    assert len(named_there) == 1, lost.texts[1][-3000:]
    assert named_there[0].startswith("error: process 0 on machine0 no longer answers")
    assert all(f"exitcode  : {EXIT_HUNG}" in text for text in lost.texts)
    assert 0 not in lost.statuses


def test_the_next_start_goes_on(done):
    last = done.lost.last
    assert f"resumed from {done.outs[1] / f'checkpoint-{last}'} at step {last}" in done.text
    assert list_checkpoints(done.outs[1])[-1][0] == last + 2
