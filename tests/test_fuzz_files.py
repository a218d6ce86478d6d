"""Mutated JSON and safetensors files and random command lines: each ends in success or in one line.

Subprocesses read them and print each input first, so that a crash or a hang can be traced to its input. The numbers in
the environment variables FUZZ_FILES and FUZZ_COMMANDS replace those of the short form.
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
from pathlib import Path

import torch
from torch.utils.data import default_collate

from c2r import cli
from c2r.data.manifest import read_manifest
from c2r.encoding.cache import CacheSettings, clip_path, prompt_path
from c2r.encoding.dataset import ClipDataset
from c2r.encoding.missing import find_missing
from c2r.files import save_tensors, write_atomic
from c2r.generate import check_files, complete_options
from c2r.models.assembly import load_controlnet, load_for_generation, load_transformer
from c2r.models.contract import PhaseContract, read_contract, save_phase
from c2r.models.controlnet import C2RControlNet
from c2r.models.dinov3 import DINOv3FeatureExtractor, check_dinov3
from c2r.models.parts import ENCODERS, check_pipeline_parts, load_pipeline_part
from c2r.models.vae import decode_latents, encode_frames
from c2r.options import GENERATE
from c2r.pipeline import encode_prompts, with_flow_shift
from c2r.training.resume import changed_options, find_checkpoint, require_resumable
from tests.helpers.datasets import write_dataset
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
    phase1 = PhaseContract(
        1, str(folder / "pipeline"), 4, 0.5, {"loss": 0.5}, height=32, width=48, num_frames=5, fps=8
    )
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
        require_resumable(path, built.run.accelerator, built.run.args, config, {"backbone": "a"})
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
    """Read `count` mutated files, the same number of each kind."""
    os.chdir(folder)
    readers = targets(write_originals(folder / "originals"))
    jobs = [(reader, file) for reader, found in readers.items() for file in found]
    failures, accepted = [], 0
    for reader, _ in {id(reader): (reader, None) for reader, _ in jobs}.values():
        announce("intact files")
        reader()
    for number in range(count):
        reader, file = jobs[number % len(jobs)]
        rng, whole = random.Random(number), file.read_bytes()
        mutate = mutated_safetensors if file.suffix == ".safetensors" else mutated_json
        content = mutate(whole if file.suffix == ".safetensors" else whole.decode(), rng)
        name = f"{number} {file.relative_to(folder)}"
        announce(name)
        (folder / "last").write_bytes(content)
        file.write_bytes(content)
        accepted += attempt(reader, failures, name)
        if failures and failures[-1][0] == name:
            write_atomic(folder / "failed" / str(number), content)
        file.parent.mkdir(parents=True, exist_ok=True)  # a cache that a library has replaced
        file.write_bytes(whole)
    report(count, accepted, failures)


def report(count, accepted, failures):
    for name, problem in failures:
        print(f"FAILED {name}: {problem}")
    print(f"{count} inputs, {accepted} accepted, {len(failures)} failures")


if __name__ == "__main__":
    kind, place, number = sys.argv[1:]
    {"files": read_files}[kind](Path(place), int(number))
    signal.alarm(0)
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most")
