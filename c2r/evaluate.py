"""Measure how well models follow their control and how real their videos look, on the same scenes and seeds.

    python -m c2r.evaluate --model outputs/phase2/best --dataset data/test
    python -m c2r.evaluate --model outputs/phase2/best outputs/other/best --dataset data/test \
        --real_dataset data/real --cg_dataset data/cg --control own shuffled none

Videos are kept as they are made: the same command continues after an interruption, and makes a video again only if
its model, prompt, control or settings have changed. --videos takes videos that were made elsewhere.

Modules that take seconds to import are imported inside functions: --help and bad options are then answered at once.
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2r import InputError, cli
from c2r.metrics.catalogue import MEASURES
from c2r.options import EVALUATE

if TYPE_CHECKING:
    import numpy as np
    import torch

    from c2r.metrics.metric import Metric, SetMetric
    from c2r.models.contract import PhaseContract
    from c2r.scoring.measuring import Source
    from c2r.scoring.results import Evaluation
    from c2r.scoring.run_datasets import CGLooks, ModelLosses, RunDatasets
    from c2r.scoring.scenes import ClipFormat, Scene

#: Kinds of control in names of sources.
CONTROL_NAMES = {"own": "own control", "shuffled": "another scene's control", "none": "no control"}


@dataclass(frozen=True)
class Model:
    """A model that generates videos.

    Attributes:
        name: for tables.
        args: options of c2r.generate, completed from the contract.
        contract: of the model.
        dtype: of its weights.
        controls: kinds of control that it generates with; a model of phase 1 takes none.
    """

    name: str
    args: Namespace
    contract: "PhaseContract"
    dtype: "torch.dtype"
    controls: tuple[str, ...]

    @property
    def description(self) -> dict[str, Any]:
        """Folder, step and fingerprints."""
        entries = ("phase", "step", "weights_sha256", "backbone_sha256")
        return {"folder": self.args.model} | {name: getattr(self.contract, name) for name in entries}

    def source_name(self, control: str) -> str:
        """Return the name of its videos with one kind of control."""
        alone = self.controls == ("own",)
        return self.name if alone else f"{self.name}, {CONTROL_NAMES[control]}"


@dataclass(frozen=True)
class Task:
    """One video that a model is to generate.

    Attributes:
        path: the file.
        key: digest of all that the video depends on.
        scene: gives the prompt.
        control: the scene that gives the control; None: no control.
        seed: of the noise.
    """

    path: Path
    key: str
    scene: "Scene"
    control: "Scene | None"
    seed: int

    @property
    def note(self) -> Path:
        """The file that holds the key of the finished video."""
        return self.path.with_name(f".{self.path.stem}.json")

    def is_done(self) -> bool:
        """Return True if the video is there, complete and made from this key."""
        from c2r.files import read_json

        try:
            noted = read_json(self.note)
            return noted == {"key": self.key, "bytes": self.path.stat().st_size}
        except (InputError, OSError):  # none yet, or damaged: the video is made again
            return False

    def write(self, frames: "np.ndarray", fps: float) -> None:
        """Write the video, then its note: whenever the process dies, a note belongs to its video."""
        import json

        from c2r.data.video_writer import write_video
        from c2r.files import write_atomic

        self.note.unlink(missing_ok=True)
        write_video(self.path, frames, fps)
        write_atomic(self.note, json.dumps({"key": self.key, "bytes": self.path.stat().st_size}).encode())


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    args = cli.parse(EVALUATE, argv)
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir}: is a file; give a folder")

    from accelerate import Accelerator
    from diffusers.utils.torch_utils import get_device

    from c2r.scoring.measuring import measure_videos
    from c2r.scoring.results import Evaluation
    from c2r.scoring.run_datasets import cg_look_unless
    from c2r.scoring.scenes import check_scenes, read_scenes

    # 1. Refuse early: nothing is loaded to the device yet.
    device = get_device()
    scenes = read_scenes(args.dataset, output_dir / ".cache", args.sequence_fps, args.max_clips)
    names = source_names([*(args.model or []), *(args.videos or [])])
    models = [find(args, path, names[path], device) for path in args.model or []]
    given = find_given_videos(args, names, scenes)
    form = common_format(args, models, given)
    check_scenes(scenes, form)
    check_given_videos(given, form)
    check_models(args, models, scenes, form)
    make_measures(args, "cpu")  # networks that cannot be loaded are named before videos are made

    # 2. The datasets of the training: their clips are encoded unless they are in the cache.
    accelerator = Accelerator(cpu=device == "cpu")
    datasets = read_run_datasets(args, models, form, accelerator)

    # 3. Generate and validate, one model at a time.
    sources: list[Source] = []
    losses: dict[str, ModelLosses] = {}
    for model in models:
        tasks = tasks_of(model, scenes, form, args, output_dir)
        found = run_model(model, tasks, form, datasets, device)
        if found is not None:
            losses[model.name] = found
        sources += sources_of(model, tasks, scenes)
    sources += given

    # 4. Measure. A measure against the coarse control rewards the CG look, so it needs the CG look beside it.
    looks, reason = cg_look_unless(datasets, lambda known: cg_looks_of(args, models, known))
    metrics, set_metrics, skipped = make_measures(args, device)
    if looks is None:
        against_control = [metric.name for metric in metrics if metric.against == "control"]
        metrics = [metric for metric in metrics if metric.against != "control"]
        skipped["CG look"] = reason
        if against_control:
            skipped[", ".join(against_control)] = (
                "left out, as measures against a coarse control also rise with the CG look, which is not known"
            )
    real_videos = [] if datasets is None else datasets.real_videos()
    scores = measure_videos(sources, scenes, form, metrics, set_metrics, looks, real_videos)
    scores.skipped = skipped | scores.skipped

    # 5. Write.
    settings = {name: value for name, value in vars(args).items() if value is not None and value is not False}
    described = {model.name: model.description for model in models}
    evaluation = Evaluation(form, args.num_seeds, scores, losses, settings, described)
    write_results(evaluation, sources, scenes, output_dir)
    for line in evaluation.lines():
        print(line, flush=True)
    print(f"{output_dir / 'report.html'}: open it in a browser", flush=True)


# --------------------------------------------------------------------------------------------------- models and videos


def source_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a short name for each model and folder of videos."""
    from c2r.reporting.run_folder import run_names

    names = run_names([*paths])
    # "best" alone tells a reader nothing.
    names = [
        "/".join(Path(path).parts[-2:]) if name in ("best", "final") else name for path, name in zip(paths, names)
    ]
    return dict(zip(paths, names))


def find(args: Namespace, path: str, name: str, device: str) -> Model:
    """Find a model and complete its options from its contract.

    Raises:
        InputError: see `c2r.generate.find_model`.
    """
    from c2r.generate import find_model

    own = Namespace(**vars(args) | {"model": path, "backbone": None, "control_video": None})
    contract, dtype = find_model(own, device, with_control=True)
    controls = tuple(args.control) if contract.phase == 2 else ("none",)
    return Model(name, own, contract, dtype, controls)


def find_given_videos(args: Namespace, names: Mapping[str, str], scenes: "Sequence[Scene]") -> "list[Source]":
    """Return the videos that were made elsewhere.

    Raises:
        InputError: one is missing.
    """
    from c2r.scoring.measuring import Source
    from c2r.scoring.scenes import find_videos

    return [
        Source(names[folder], {scene: [path] for scene, path in find_videos(folder, scenes).items()})
        for folder in args.videos or []
    ]


def common_format(args: Namespace, models: Sequence[Model], given: "Sequence[Source]") -> "ClipFormat":
    """Return the format of all videos: as the options say, as the models were trained, or as the given videos are.

    Raises:
        InputError: models were trained on different formats.
    """
    from c2r.scoring.scenes import ClipFormat, format_of

    forms = [ClipFormat(m.args.num_frames, m.args.height, m.args.width, float(m.args.fps)) for m in models]
    for model, form in zip(models, forms):
        if form != forms[0]:
            raise InputError(
                f"--model {model.args.model}: makes {form}, but {models[0].args.model} makes {forms[0]}; give "
                "--num_frames, --height, --width and --fps for both"
            )
    if forms:
        return forms[0]
    found = format_of(next(iter(given[0].videos.values()))[0])
    asked = {name: getattr(args, name) for name in ("num_frames", "height", "width", "fps")}
    return ClipFormat(**vars(found) | {name: value for name, value in asked.items() if value is not None})


def check_models(args: Namespace, models: Sequence[Model], scenes: "Sequence[Scene]", form: "ClipFormat") -> None:
    """Check the weights that the models need by their headers, and that the scenes have what they need.

    Raises:
        InputError: a model is incomplete, or a scene lacks its prompt or control.
    """
    from c2r.models.assembly import check_model
    from c2r.models.dinov3 import check_dinov3
    from c2r.models.parts import ENCODERS, check_pipeline_parts
    from c2r.scoring.scenes import other_controls

    controls = {control for model in models for control in model.controls}
    for scene in scenes if models else []:
        if not scene.prompt.strip():
            raise InputError(f"--dataset {args.dataset}: {scene.name} has no text to generate from; add its prompt")
        if scene.control is None and controls - {"none"}:
            raise InputError(
                f"--dataset {args.dataset}: {scene.name} has no control_name; name its coarse video, or give "
                "--control none"
            )
    if "shuffled" in controls:
        other_controls(scenes)
    for model in models:
        check_model(model.args.model, model.contract)
        if model.contract.phase == 2:
            check_dinov3(model.args.dinov3, [(form.height, form.width)])
        check_pipeline_parts(model.args.pretrained_model_name_or_path, [*ENCODERS, "scheduler"])


def check_given_videos(given: "Sequence[Source]", form: "ClipFormat") -> None:
    """Check the length, size and rate of videos that were made elsewhere.

    Raises:
        InputError: one has others.
    """
    from c2r.scoring.scenes import check_video

    for source in given:
        for (path,) in source.videos.values():
            check_video(path, form)


# ------------------------------------------------------------------------------------------------------------ generate


def tasks_of(
    model: Model, scenes: "Sequence[Scene]", form: "ClipFormat", args: Namespace, output_dir: Path
) -> dict[str, list[Task]]:
    """Return the videos that a model is to generate, by kind of control."""
    from dataclasses import asdict

    from c2r.encoding.cache import encoder_fingerprint
    from c2r.files import digest
    from c2r.models.hub import resolve_model_folder
    from c2r.scoring.scenes import other_controls

    given = model.args
    base = resolve_model_folder(given.pretrained_model_name_or_path, ["vae", "text_encoder", "tokenizer"])
    # The contract is in the model's fingerprint, and names those of the weights and of the backbone.
    common: list[Any] = [encoder_fingerprint(Path(given.model)), str(model.dtype), asdict(form)]
    common += [encoder_fingerprint(base / part) for part in ("vae", "text_encoder", "tokenizer")]
    common += [getattr(given, option.name) for option in EVALUATE.groups["sampling"]]
    common += [given.negative_prompt, given.window_frames, given.window_overlap, given.attention_backend]
    folders = _folder_names([model.source_name(control) for control in model.controls])
    tasks: dict[str, list[Task]] = {}
    for control, folder in zip(model.controls, folders):
        followed: list[Scene | None] = [None] * len(scenes)
        dinov3 = None
        if control != "none":
            followed = [*(scenes if control == "own" else other_controls(scenes))]
            dinov3 = encoder_fingerprint(resolve_model_folder(given.dinov3))
        tasks[control] = []
        for scene, other in zip(scenes, followed):
            file = None if other is None else [*other.control[1:], other.start]
            for seed in range(args.seed, args.seed + args.num_seeds):
                ending = f"-seed{seed}" if args.num_seeds > 1 else ""
                path = output_dir / "videos" / folder / f"{scene.name}{ending}.mp4"
                key = digest([*common, dinov3, scene.prompt, file, seed])
                tasks[control].append(Task(path, key, scene, other, seed))
    return tasks


def _folder_names(names: Sequence[str]) -> list[str]:
    """Return names of folders, all different, that sources' names can be told from."""
    from c2r.files import digest

    return [f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}-{digest(name)[:6]}" for name in names]


def run_model(
    model: Model,
    tasks: Mapping[str, Sequence[Task]],
    form: "ClipFormat",
    datasets: "RunDatasets | None",
    device: str,
) -> "ModelLosses | None":
    """Generate a model's videos that are not there yet, and validate it if there are datasets of its training.

    Raises:
        InputError: a model cannot be loaded, or a video or loss is not finite.
    """
    from accelerate.utils.memory import clear_device_cache

    from c2r.generate import load_models
    from c2r.pipeline import encode_prompts
    from c2r.scoring.run_datasets import model_losses

    args, every = model.args, [task for of_control in tasks.values() for task in of_control]
    missing = [task for task in every if not task.is_done()]
    print(f"{model.name}: {len(every) - len(missing)} of {len(every)} videos are there", flush=True)
    validated = datasets is not None and model.contract.phase in datasets.phases
    if not missing and not validated:
        return None
    prompts = list(dict.fromkeys(task.scene.prompt for task in missing))
    embeds = {}
    if missing:
        texts = [args.negative_prompt or "", *prompts]
        negative, *of_prompts = encode_prompts(args.pretrained_model_name_or_path, texts, device, model.dtype)
        embeds = dict(zip(prompts, of_prompts))
    dinov3 = args.dinov3 if model.contract.phase == 2 else None
    pipeline = load_models(args, device, model.dtype, [], dinov3=dinov3, tokenizer=None, text_encoder=None)
    try:
        if missing:
            make_videos(pipeline, args, missing, form, embeds, negative, model.name)
        if not validated:
            return None
        assert datasets is not None
        return model_losses(
            pipeline, model.contract.phase, datasets, args.flow_shift, args.conditioning_scale, model.dtype
        )
    finally:
        pipeline.maybe_free_model_hooks()
        pipeline.to("cpu")
        del pipeline
        clear_device_cache(garbage_collection=True)


def make_videos(
    pipeline: Any,
    args: Namespace,
    tasks: Sequence[Task],
    form: "ClipFormat",
    embeds: "Mapping[str, torch.Tensor]",
    negative: "torch.Tensor",
    name: str,
) -> None:
    """Generate videos and write each as soon as it is finished."""
    from c2r.bars import progress_bar
    from c2r.generate import Length, generate

    length = Length(form.num_frames, form.fps)
    pipeline.set_progress_bar_config(disable=True)
    with progress_bar(len(tasks), name, "video", shown=True) as bar:
        for task in tasks:
            control = None if task.control is None else task.control.read(task.control.control, form)
            own = Namespace(**vars(args) | {"seed": task.seed})
            prompt = {"prompt_embeds": embeds[task.scene.prompt], "negative_prompt_embeds": negative}
            task.write(generate(pipeline, own, length, control, task.path, **prompt), form.fps)
            bar.update()


def sources_of(model: Model, tasks: Mapping[str, Sequence[Task]], scenes: "Sequence[Scene]") -> "Iterator[Source]":
    """Yield a model's videos, those of each kind of control as a source."""
    from c2r.scoring.measuring import Source

    for control, of_control in tasks.items():
        paths: dict[str, list[Path]] = {scene.name: [] for scene in scenes}
        for task in of_control:
            paths[task.scene.name].append(task.path)
        seeds = tuple(task.seed for task in of_control if task.scene is of_control[0].scene)
        yield Source(model.source_name(control), paths, seeds)


# ------------------------------------------------------------------------------------------------------------- measure


def make_measures(args: Namespace, device: str) -> "tuple[list[Metric], list[SetMetric], dict[str, str]]":
    """Make the measures that the options name.

    Returns:
        measures of clips, of sets, and {names: why they are missing}.

    Raises:
        InputError: a network cannot be loaded.
    """
    from c2r.metrics.registry import make_metrics

    networks = dict(args.networks or [])
    names, skipped = args.metrics, {}
    if names is None:
        names = [measure.name for measure in MEASURES if measure.role is None or measure.role in networks]
        without = [measure.name for measure in MEASURES if measure.name not in names]
        if without:
            skipped[", ".join(without)] = "not computed, as --networks names none for them"
    metrics, set_metrics, missing = make_metrics(names, networks, device)
    return metrics, set_metrics, skipped | {entry.name: entry.reason for entry in missing}


def read_run_datasets(
    args: Namespace, models: Sequence[Model], form: "ClipFormat", accelerator: Any
) -> "RunDatasets | None":
    """Read --real_dataset and --cg_dataset; None if neither is given.

    Raises:
        InputError: no model names the encoders of their clips, or two models have different ones.
    """
    from c2r.data.buckets import Bucket
    from c2r.data.settings import ClipSettings
    from c2r.encoding.cache import CacheSettings
    from c2r.scoring.run_datasets import RunDatasets

    if not args.real_dataset and not args.cg_dataset:
        return None
    bases = [model.args.pretrained_model_name_or_path for model in models] or [args.pretrained_model_name_or_path]
    if bases[0] is None:
        raise InputError("--pretrained_model_name_or_path: missing; the CG look needs its VAE; give a Wan pipeline")
    settings = [
        ClipSettings(
            buckets=(Bucket(form.num_frames, form.height, form.width),),
            fps=form.fps,
            sequence_fps=args.sequence_fps,
            base_model=base,
            cache_dir=Path(args.cache_dir) if args.cache_dir else None,
        )
        for base in dict.fromkeys(bases)
    ]
    encoders = [CacheSettings.of(entry) for entry in settings]
    for base, found in zip(dict.fromkeys(bases), encoders):
        if found != encoders[0]:
            raise InputError(
                f"{base}: has other encoders than {bases[0]}; evaluate its models by a command of their own"
            )
    return RunDatasets.read(args.real_dataset, args.cg_dataset, args.num_validation_clips, settings[0], accelerator)


def cg_looks_of(args: Namespace, models: Sequence[Model], datasets: "RunDatasets") -> "CGLooks":
    """Load what measures the CG look: the DINOv3 of the first model that has one.

    Raises:
        InputError: no DINOv3 is named.
    """
    import torch

    from c2r.scoring.run_datasets import CGLooks

    found = [(model.args.dinov3, model.dtype) for model in models if model.args.dinov3 is not None]
    dinov3, dtype = found[0] if found else (args.dinov3, torch.float32)
    if dinov3 is None:
        raise InputError("--dinov3: missing; the CG look needs it; give the DINOv3 of the training")
    return CGLooks(datasets, datasets.settings.base_model, dinov3, dtype)


def write_results(
    evaluation: "Evaluation", sources: "Sequence[Source]", scenes: "Sequence[Scene]", output_dir: Path
) -> None:
    """Write results.json, clips.csv, plot.png, report.html and a video of each scene."""
    from c2r.files import write_atomic
    from c2r.scoring.page import evaluation_page
    from c2r.scoring.picture import draw_scores
    from c2r.scoring.results import PAGE, PICTURE
    from c2r.scoring.side_by_side import write_side_by_side

    evaluation.write(output_dir)
    picture = draw_scores(evaluation.scores)
    write_atomic(output_dir / PICTURE, picture)
    columns, videos = write_side_by_side(sources, scenes, evaluation.form, output_dir / "clips")
    prompts = {scene.name: scene.prompt for scene in scenes}
    page = evaluation_page(evaluation, picture, videos, columns, prompts)
    write_atomic(output_dir / PAGE, page.encode())


if __name__ == "__main__":
    cli.run(main)
