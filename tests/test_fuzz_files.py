"""Mutated JSON and safetensors files and random command lines: each ends in success or in one line.

A subprocess reads them and prints each input first, so that a crash or a hang can be traced to its input. The numbers
in the environment variables FUZZ_FILES and FUZZ_LINES, of all files and of the lines of each command, replace those of
the short form.
"""

import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import default_collate

from c2r import cli
from c2r.data.manifest import read_manifest
from c2r.encoding.cache import CacheSettings, clip_path, prompt_path
from c2r.encoding.dataset import ClipDataset
from c2r.encoding.missing import find_missing
from c2r.files import save_tensors, write_atomic
from c2r.generation.models import check_files
from c2r.generation.options import complete_options
from c2r.models.assembly import load_for_generation
from c2r.models.backbone import load_transformer
from c2r.models.contract import PhaseContract, read_contract, save_phase
from c2r.models.controlnet import C2RControlNet
from c2r.models.controlnet_files import load_controlnet
from c2r.models.dinov3 import DINOv3FeatureExtractor, check_dinov3
from c2r.models.parts import ENCODERS, check_pipeline_parts, load_pipeline_part
from c2r.models.vae import decode_latents, encode_frames
from c2r.options import ENCODE, GENERATE, PHASE1, PHASE2, QUICKSTART, STUDY, TOY
from c2r.options.types import Choice, Number
from c2r.pipeline import encode_prompts, with_flow_shift
from c2r.toy.folder import Scene, Toy, read_toy, toy_version
from c2r.training.resume import changed_options, find_checkpoint, require_resumable
from tests.helpers.commands import SIZE
from tests.helpers.datasets import write_dataset
from tests.helpers.forks import fork
from tests.helpers.runs import build_run, load, save, train_one_step
from tests.helpers.settings import clip_settings as tiny_settings
from tests.helpers.tiny import FEATURE_DIM, LATENT_CHANNELS, TEXT_DIM, save_tiny_dinov3, save_tiny_pipeline

SECONDS_PER_INPUT = 10
MAX_BYTES = 2 * 2**30

# ------------------------------------------------------------------------------------------------------------ mutation

#: Values of every kind that JSON can hold, and of sizes that nothing real has.
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**9, 10**30, -(10**9), 0.5, -0.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), "", "a", "1", "..", "/", "\0", "é\ud800", "a\nb", "x" * 5000, "/dev/zero"),
    *([], [[]], [1], [None], ["a"], [0.0] * 3, [1, 2, 2], list(range(100)), {}, {"a": 1}, {"a": {"a": []}}),
]


def mutated_json(text, rng):
    """Return the text of a JSON document with one to three changes."""
    if rng.random() < 0.15:
        return mutated_bytes(text.encode(), rng)
    document = {"": json.loads(text)}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(document))
        container, key = rng.choice(places[1:] or places) if rng.random() < 0.95 else places[0]
        kind = rng.randrange(6)
        if kind == 0 and isinstance(container, dict) and container is not document:
            del container[key]
        elif kind == 1 and isinstance(container, dict) and container is not document:
            container[rng.choice([f"{key}_", key.upper(), "", "auto_map", "quantization_config"])] = container.pop(key)
        elif kind == 2 and isinstance(container, list):
            container.insert(key, copy.deepcopy(rng.choice(VALUES)))
        elif kind == 3 and isinstance(container, dict) and container is not document:
            container[rng.choice(["colour", "auto_map", "_attn_implementation"])] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 4 and type(container[key]) in (int, float):
            container[key] = rng.choice([-1, 10, 10**6, 1e6, 0.1]) * container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(document[""]).encode()


def _places(value):
    """Yield (container, key) of every entry, nested ones too."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def mutated_bytes(content, rng):
    """Return bytes that are cut, flipped, exchanged or nested."""
    content, place, kind = bytearray(content), rng.randrange(max(1, len(content))), rng.randrange(5)
    if kind == 0:
        del content[place:]
    elif kind == 1:
        content[place : place + 1] = bytes([content[place] ^ 1 << rng.randrange(8)]) if content else b""
    elif kind == 2:
        content[place:place] = rng.choice([b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b"\0", b'{"a":' * 500])
    elif kind == 3:
        del content[place : place + rng.randrange(1, 64)]
    else:
        content = bytearray(
            rng.choice([b"", b"null", b"[]", b"{}", b"1", b'"a"', b"NaN", b"1e999", b"{", b"[" * 10**6])
        )
    return bytes(content)


def mutated_safetensors(content, rng):
    """Return a safetensors file whose header, or any byte, is changed."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = rng.randrange(4)
    if kind == 0:
        return mutated_bytes(content, rng)
    if kind == 1:
        changed = mutated_json(header.decode(), rng)
    else:
        entries = json.loads(header)
        name = rng.choice([name for name in entries if name != "__metadata__"])
        entry = entries[name]
        if kind == 2:
            entry["shape"] = rng.choice([entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1], [0], []])
            entry["dtype"] = rng.choice([entry["dtype"], "I32", "U32", "F16", "I64"])
        elif "__metadata__" in entries:
            metadata = entries["__metadata__"]
            key = rng.choice(list(metadata))
            metadata[key] = mutated_json(metadata[key], rng).decode(errors="replace") if key == "c2r" else "[]"
        changed = json.dumps(entries).encode()
    return len(changed).to_bytes(8, "little") + changed + data


# ------------------------------------------------------------------------------------------------------------- targets


def write_originals(folder):
    """Write one file of every kind that the commands read into a new folder."""
    save_tiny_pipeline(folder / "pipeline")
    save_tiny_dinov3(folder / "dinov3")
    shutil.copytree(folder / "pipeline", folder / "sharded")
    for part, load_part in (
        ("transformer", lambda: load_transformer(folder / "pipeline")),
        ("text_encoder", lambda: load_pipeline_part(folder / "pipeline", "text_encoder")),
    ):
        for file in (folder / "sharded" / part).glob("*.safetensors"):
            file.unlink()
        load_part().save_pretrained(folder / "sharded" / part, max_shard_size="10KB")
    backbone = load_transformer(folder / "pipeline")
    size = SIZE | {"fps": float(SIZE["fps"])}
    phase1 = PhaseContract(1, str(folder / "pipeline"), 4, 0.5, {"loss": 0.5}, **size)
    phase1 = save_phase(folder / "phase1", backbone, phase1)
    phase2 = PhaseContract(
        **vars(phase1)
        | {"phase": 2, "backbone": str(folder / "phase1"), "backbone_sha256": phase1.weights_sha256}
        | {"dinov3": str(folder / "dinov3"), "flow_shift": 3.0, "conditioning_scale": 1.0}
    )
    save_phase(folder / "phase2", C2RControlNet.from_transformer(backbone, 2, 1, feature_dim=FEATURE_DIM), phase2)
    built = build_run(folder / "run", "--ema_decay=0.9")
    train_one_step(built)
    built.run.progress.add_validation({"loss": 0.5})
    built.run.progress.record_best()
    save(built)
    dataset = write_dataset(folder / "data", ["a.mp4", "b.mp4"], ["a street", "rain"])
    write_dataset(folder / "cg", ["a.mp4", "b.mp4"], ["a street", "rain"], ["c.mp4", "d.mp4"])
    settings = tiny_settings(base_model=str(folder / "pipeline"))
    manifest = read_manifest(dataset, "real", settings)
    cache = CacheSettings.of(settings)
    for clip in manifest.clips:
        latents = torch.zeros(LATENT_CHANNELS, *clip.bucket.latent_grid)
        tensors = {"latents_mean": latents, "latents_logvar": latents.half()}
        tensors["prompt_embeds"] = torch.zeros(3, TEXT_DIM)
        save_tensors(clip_path(manifest.cache_dir, clip, cache), tensors, {"file": clip.name})
    for text in ("", "a street", "rain"):
        tensors = {"prompt_embeds": torch.zeros(3, TEXT_DIM)}
        save_tensors(prompt_path(manifest.cache_dir, text, cache), tensors, {"max_sequence_length": 16})
    find_missing(manifest.clips, settings)
    scene = Scene(seed=0, prompt="a", control_video="a.mp4", truth="a.mp4")
    write_atomic(folder / "toy/toy.json", json.dumps(Toy(version=toy_version(), **SIZE, test=[scene])).encode())
    note = {"file": ["c.mp4", 1, 2], "reason": "unreadable", "detail": "c.mp4: broken", "settings": vars(cache)}
    write_atomic(manifest.cache_dir / "failures/a.json", json.dumps(note).encode())
    return folder


def targets(folder):
    """Return {reader: [files that it reads]}."""
    (checkpoint,) = (folder / "run").glob("checkpoint-*")
    pipeline, cache = folder / "pipeline", folder / "data/.c2r_cache"
    settings = tiny_settings(base_model=str(pipeline))

    def generate(model):
        def read():
            options = [f"--model={folder / model}", "--prompt=a", "--output=out.mp4"]
            args = cli.parse(GENERATE, options)
            contract = read_contract(args.model)
            complete_options(args, contract)
            check_files(args, contract)
            load_for_generation(args.model)

        return read

    def vae():
        check_pipeline_parts(str(pipeline))
        model = load_pipeline_part(pipeline, "vae")
        encode_frames(model, torch.zeros(1, 5, 3, 32, 48, dtype=torch.uint8))
        decode_latents(model, torch.zeros(1, LATENT_CHANNELS, 2, 4, 6))

    def prompts(name):
        def read():
            check_pipeline_parts(str(folder / name))
            encode_prompts(folder / name, ["", "a street"], "cpu", torch.float32)

        return read

    def scheduler():
        check_pipeline_parts(str(pipeline), [*ENCODERS, "scheduler"])
        scheduler = with_flow_shift(load_pipeline_part(pipeline, "scheduler"), 3.0)
        scheduler.set_timesteps(2)
        for timestep in scheduler.timesteps:
            scheduler.step(torch.zeros(1, 4, 1, 2, 2), timestep, torch.zeros(1, 4, 1, 2, 2))

    def transformer(name):
        def read():
            load_transformer(folder / name, folder / name)

        return read

    def dinov3():
        check_dinov3(folder / "dinov3", [(32, 48)])
        DINOv3FeatureExtractor.from_pretrained(folder / "dinov3")(torch.zeros(1, 1, 3, 32, 48))

    def resume():
        path, _ = find_checkpoint(folder / "run", "latest")
        load_controlnet(path / "model")
        built = build_run(folder / "resumed", "--ema_decay=0.9", checkpoint=path)
        config = {"injection_layers": [0, 1]}
        require_resumable(path, built.run.accelerator, built.run.args, C2RControlNet, config, {"backbone": "a"})
        changed_options(path, built.run.args)
        load(built)

    def dataset():
        manifest = read_manifest(folder / "data", "real", settings, lambda: vars(CacheSettings.of(settings)))
        missing = find_missing(manifest.clips, settings)
        if not missing.count and not missing.prompts:
            clips = ClipDataset(manifest.clips, settings)
            default_collate([clips[index] for index in range(len(clips))])
            assert clips.empty_prompt_embeds.shape[1] == TEXT_DIM

    def files(*patterns):
        found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        assert found, patterns
        return found

    return {
        generate("phase2"): files("phase2/*"),
        generate("phase1"): files("phase1/*"),
        vae: files("pipeline/vae/*"),
        prompts("pipeline"): files("pipeline/tokenizer/*", "pipeline/text_encoder/*"),
        prompts("sharded"): files("sharded/text_encoder/*.index.json"),
        scheduler: files("pipeline/scheduler/*"),
        transformer("pipeline"): files("pipeline/transformer/*"),
        transformer("sharded"): files("sharded/transformer/*.index.json"),
        dinov3: files("dinov3/*"),
        resume: [checkpoint / "state.json", checkpoint / "model/config.json"],
        lambda: read_toy(folder / "toy"): files("toy/*"),
        dataset: [path for path in sorted(cache.rglob("*")) if path.suffix in (".json", ".safetensors")],
    }


# ------------------------------------------------------------------------------------------------------------- reading


def announce(name):
    """Print the next input's name and start its time limit, which also ends library code."""
    print(name, flush=True)
    signal.alarm(SECONDS_PER_INPUT)


def attempt(call, failures, name):
    """Call a reader as a command does; note everything but success and one line. Return True if it succeeded."""
    try:
        cli.run(call)
        return True
    except SystemExit as ended:
        message = str(ended.code)
        if not (message.startswith("error: ") and message.isprintable()):
            failures.append((name, f"ended with {message!r}"))
    except BaseException as error:  # a panic of a library in Rust is no Exception
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "/c2r/" in f.filename]
        failures.append((name, f"{type(error).__name__}: {str(error)[:200]!r} at {ours}"))
    return False


def read_files(folder, count):
    """Read `count` mutated files, the same number of each kind; return a list of (name, problem)."""
    readers = targets(folder)
    jobs = [(reader, file) for reader, found in readers.items() for file in found]
    failures, accepted = [], 0
    for reader in readers:
        announce("intact files")
        reader()
    for number in range(count):
        reader, file = jobs[number % len(jobs)]
        rng, whole = random.Random(number), file.read_bytes()
        if file.suffix == ".safetensors":
            content = mutated_safetensors(whole, rng)
        else:
            content = mutated_json(whole.decode(), rng)
        name = f"{number} {file.relative_to(folder)}"
        announce(name)
        file.write_bytes(content)
        accepted += attempt(reader, failures, name)
        if failures and failures[-1][0] == name:
            write_atomic(folder / "failed" / str(number), content)
        file.parent.mkdir(parents=True, exist_ok=True)  # a cache that a library has replaced
        file.write_bytes(whole)
    signal.alarm(0)
    print(f"{accepted} of {count} mutated files were accepted")
    return failures


# ------------------------------------------------------------------------------------------------------- command lines

#: Words that options may or may not expect, some of which a shell would have to be asked for.
NUMBERS = ["0", "1", "2", "3", "5", "16", "48", "-1", "0.5", "1.5", "1e-9", "1e9", "1e999", "nan", "9" * 5000, "1_0"]
#: None of them names a folder in which a command could leave anything.
PATHS = [
    *("~", "/dev/null", "/dev/zero", "fifo", "loop", "missing", "missing/deep", "a.mp4", "x" * 5000, "x" * 300, "a/b"),
    *("memory://none", "file:///proc/none", "none://none", "simplecache::file:///proc/none", "://", "a/b/c", "é"),
    *("a.mp4/b", "\ud800", "a\nb", "data=2", "data=nan", "a.yaml", "a.safetensors", "/dev/null/a", "/proc/none"),
]
WORDS = [
    *("", " ", "0x1", "--", "-", "---", "=", "{}", "[]", "5x32x48", "1x2", "5x32x48x", "null", "true", "None", "%s"),
    *NUMBERS,
    *PATHS,
]


def word_for(option, rng):
    """Return a word that the option's parser will mostly accept."""
    if isinstance(option.type, Choice):
        return rng.choice(option.type.words)
    return rng.choice(NUMBERS if isinstance(option.type, Number) else PATHS)


def command_lines(command, options, rng):
    """Yield random lines for a command: `options` with some options changed, left out, added or misspelt."""
    names = list(command.options)
    while True:
        line = dict(options)
        extra = []
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            name, word = rng.choice([*names, *options]), rng.choice([*WORDS, *map(str, options.values())])
            kind = rng.choice([0, 1, 2, 3, 4, 4, *[5] * 12])
            if kind == 0:
                line.pop(rng.choice([*options]), None)
            elif kind == 1:
                extra.append(rng.choice([f"--{name[:-1]}", f"--{name}", f"-{name}", word, f"--{name}={word}={word}"]))
            elif kind == 2:
                extra += [f"--{name}", word, rng.choice(WORDS)]
            elif kind == 3:
                extra.append(f"--no-{name}")
            else:
                line[name] = word if kind == 4 else word_for(command.options[name], rng)
        arguments = [f"--{name}={value}" for name, value in line.items()]
        rng.shuffle(arguments)
        yield arguments + extra if rng.random() < 0.5 else extra + arguments


def run_lines(folder, count):
    """Run `count` random lines of each command; return a list of (line, problem).

    Those that pass the parser run as a whole, in a fork, unless the command takes minutes.
    """
    import train_phase1
    import train_phase2
    from c2r import encode, generate
    from c2r.toy import __main__ as toy

    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    shutil.copy(folder / "data/a.mp4", "a.mp4")
    shutil.copy(next((folder / "phase1").glob("*.safetensors")), "a.safetensors")
    Path("a.yaml").write_text("seed: 1\nwidth: 48\n")
    models = {"pretrained_model_name_or_path": folder / "pipeline"}
    size = {name: str(value) for name, value in SIZE.items()}
    training = models | size | {"real_dataset": folder / "data", "output_dir": "out", "mixed_precision": "no"}
    training |= {"train_batch_size": "1", "dataloader_num_workers": "0", "num_validation_clips": "1"}
    control = {
        "cg_dataset": folder / "cg",
        "dinov3": folder / "dinov3",
        "resume_backbone_from": folder / "phase1",
        "control_layers": "2",
    }
    one_step = ["--max_train_steps=1", "--gradient_accumulation_steps=1", "--dataloader_num_workers=0"]
    generation = size | {"model": folder / "phase2", "control_video": "a.mp4", "prompt": "a", "output": "o.mp4"}
    commands = [
        (PHASE1, train_phase1.main, training, one_step),
        (PHASE2, train_phase2.main, training | control, [*one_step, "--num_samples=0"]),
        (ENCODE, encode.main, models | size | {"dataset": folder / "data", "domain": "real"}, ["--dry_run"]),
        (GENERATE, generate.main, generation, ["--num_inference_steps=1"]),
        (TOY, toy.main, {"output_dir": "toy", "num_real": "1", "num_cg": "1"}, ["--output_dir=/dev/null/toy"]),
        (QUICKSTART, None, {"output_dir": "out"}, []),
        (STUDY, None, {"output_dir": "out"}, []),
    ]
    failures, total, whole = [], 0, 0
    for command, main, options, last in commands:
        lines = command_lines(command, options, random.Random(command.prog))
        for line in islice(lines, count):
            name = f"{command.prog} {line}"
            announce(ascii(name))
            parsed = attempt(partial(cli.parse, command, line), failures, name)
            if main is not None and parsed:
                whole += 1
                if (problem := run_in_fork(main, [command.prog, *line, *last])) is not None:
                    failures.append((name, problem))
            print(*(f"FAILED: {problem}" for failed, problem in failures if failed == name), sep="\n")
            shutil.rmtree("out", ignore_errors=True)
            total += 1
    signal.alarm(0)
    print(f"{total} command lines, {whole} of them run as a whole")
    return failures


def run_in_fork(main, argv):
    """Run a command with these arguments in a fork; return what is wrong with its end, or None."""
    process = os.fork()
    if process == 0:
        os.setsid()
        signal.alarm(SECONDS_PER_INPUT)
        for descriptor in (1, 2):
            os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), descriptor)
        sys.argv, status = argv, 99
        try:
            cli.run(main)
            status = 0
        except SystemExit as ended:
            status = ended.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
    signal.alarm(0)
    _, status, used = os.wait4(process, 0)
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    output = Path("output").read_text(errors="replace")
    last = (output.rstrip("\n").splitlines() or [""])[-1]
    if used.ru_maxrss * 1024 > MAX_BYTES:
        return f"{used.ru_maxrss / 2**20:.1f} GiB"
    if os.WIFSIGNALED(status) and not (os.WTERMSIG(status) == signal.SIGALRM and "preflight: " in output):
        return f"ended by signal {os.WTERMSIG(status)} at {last[:300]!r}"
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0 and ("error: " not in output or "Traceback" in output):
        return f"ended with {os.WEXITSTATUS(status)}: {output[-1500:]}"
    return None


def test_mutated_files_and_random_command_lines_end_in_success_or_one_line(tmp_path):
    counts = [os.environ.get("FUZZ_FILES", "60"), os.environ.get("FUZZ_LINES", "4")]
    done = fork("-m", "tests.test_fuzz_files", tmp_path, *counts)
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"ended with {done.returncode} at {last}: {done.stderr[-3000:]}"
    print(done.stdout[-300:])


if __name__ == "__main__":
    place, files, lines = sys.argv[1:]
    warnings.simplefilter("ignore")
    os.chdir(place)
    originals = write_originals(Path(place) / "originals")
    found = read_files(originals, int(files)) + run_lines(originals, int(lines))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{most / 2**30:.2f} GiB at most")
    assert most < MAX_BYTES
    assert not found, "\n".join(f"FAILED {name}: {problem}" for name, problem in found)
