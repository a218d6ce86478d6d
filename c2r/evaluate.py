"""Measure how well models follow their control and how real their videos look, on the same scenes and seeds.

    python -m c2r.evaluate --model outputs/phase2/best --dataset data/test
    python -m c2r.evaluate --model outputs/phase2/best outputs/other/best --dataset data/test \
        --real_dataset data/real --cg_dataset data/cg --control own shuffled none

Videos, and the validation of each model, are kept as they are made: the same command continues after an interruption,
and makes a video again only if its model, prompt, control or settings have changed. --videos takes videos that were
made elsewhere.

Modules that take seconds to import are imported inside functions: --help and bad options are then answered at once.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2r import InputError, cli
from c2r.options import EVALUATE

if TYPE_CHECKING:
    import torch

    from c2r.scoring.measuring import Source
    from c2r.scoring.models import Model
    from c2r.scoring.run_datasets import ModelLosses, RunDatasets
    from c2r.scoring.scenes import ClipFormat, Scene
    from c2r.scoring.videos import Task


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    args = cli.parse(EVALUATE, argv)
    for option, folders in (("dataset", [args.dataset]), ("videos", args.videos or [])):
        for folder in folders:
            if "://" not in folder and not Path(folder).is_dir():
                found = "is a file; give its folder" if Path(folder).exists() else "no such folder; check the path"
                raise InputError(f"--{option} {folder}: {found}")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir}: is a file; give a folder")

    from accelerate import Accelerator
    from diffusers.utils.torch_utils import get_device

    from c2r.scoring.chosen_measures import make_measures, require_measurable
    from c2r.scoring.measuring import measure_videos
    from c2r.scoring.models import agree_on_guidance, check_models, find_model_to_evaluate, source_names
    from c2r.scoring.page import write_results
    from c2r.scoring.results import Evaluation, earlier_scenes
    from c2r.scoring.run_datasets import CGLooks
    from c2r.scoring.scenes import check_scenes, common_format, read_scenes
    from c2r.scoring.side_by_side import require_own_files
    from c2r.scoring.videos import check_given_videos, find_given_videos, followed_scenes, sources_of

    # 1. Refuse early: nothing is loaded to the device yet.
    device = get_device()
    scenes = read_scenes(args.dataset, output_dir / ".cache", args.sequence_fps, args.max_clips)
    require_own_files(output_dir, scenes, earlier_scenes(output_dir))
    names = source_names([*(args.model or []), *(args.videos or [])])
    models = [find_model_to_evaluate(args, path, names[path], device) for path in args.model or []]
    agree_on_guidance(models)
    given = find_given_videos({folder: names[folder] for folder in args.videos or []}, scenes)
    form = common_format(
        {model.args.model: model.form for model in models},
        [path for source in given for (path,) in source.videos.values()],
        {name: getattr(args, name) for name in ("num_frames", "height", "width", "fps")},
        encoded=bool(args.real_dataset or args.cg_dataset),
    )
    check_scenes(scenes, form)
    check_given_videos(given, form)
    require_measurable(args, scenes)
    check_models(args, models, scenes, form)

    # 2. The datasets of the training: their clips are encoded unless they are in the cache.
    accelerator = Accelerator(cpu=device == "cpu")
    datasets = read_run_datasets(args, models, form, accelerator)

    # 3. Generate and validate, one model at a time.
    sources: list[Source] = []
    losses: dict[str, ModelLosses] = {}
    followed: dict[str, dict[str, Scene]] = {}
    remarks: dict[str, str] = {}
    for model in models:
        tasks = plan_videos(model, scenes, form, output_dir)
        remark, validated = how_validated(model, datasets)
        if remark is not None:
            remarks[f"validation of {model.name}"] = remark
        run_model(model, tasks, form, device, datasets if validated else None, losses)
        sources += sources_of(model.name, model.source_names, tasks, scenes)
        followed |= {model.source_names[control]: of_one for control, of_one in followed_scenes(tasks).items()}
    sources += given
    followed |= {source.name: {scene.name: scene for scene in scenes} for source in given}

    # 4. Measure. A measure against the coarse control rewards the CG look, so it needs the CG look beside it.
    looks, reason = CGLooks.load(datasets, *dinov3_of(args, models, device), followed)
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
    scores.skipped = skipped | scores.skipped | remarks

    # 5. Write.
    settings = vars(args) | (models[0].guidance if models else {})  # which all of them have
    settings = {name: value for name, value in settings.items() if value is not None and value is not False}
    if args.networks:
        settings["networks"] = [f"{role}={network}" for role, network in args.networks]
    described = {model.name: model.description for model in models}
    evaluation = Evaluation(form, args.num_seeds, scores, losses, settings, described)
    write_results(evaluation, sources, scenes, output_dir)
    for line in evaluation.lines():
        print(line, flush=True)
    print(f"{output_dir / 'report.html'}: open it in a browser", flush=True)


# ------------------------------------------------------------------------------------------------------------ generate


def plan_videos(
    model: "Model", scenes: "Sequence[Scene]", form: "ClipFormat", output_dir: Path
) -> "dict[str, list[Task]]":
    """Return the videos that a model is to generate, by kind of control."""
    from c2r.scoring.videos import tasks_of

    return tasks_of(model.args, model.dtype, model.other_backbone, model.controls, scenes, form, output_dir)


def how_validated(model: "Model", datasets: "RunDatasets | None") -> tuple[str | None, bool]:
    """Return why a model's validation is not that of its training, or None; and whether it is validated at all."""
    from c2r.scoring.scenes import ClipFormat

    if datasets is None:
        return "left out, as there is no --real_dataset and no --cg_dataset", False
    trained = ClipFormat(**model.contract.format)
    if model.form != trained:
        return f"left out, as videos are {model.form}, but it was trained on {trained}", False
    return datasets.not_validated(model.contract.phase), model.contract.phase in datasets.phases


def run_model(
    model: "Model",
    tasks: "Mapping[str, Sequence[Task]]",
    form: "ClipFormat",
    device: str,
    datasets: "RunDatasets | None",
    losses: "dict[str, ModelLosses]",
) -> None:
    """Generate a model's videos and validate it, unless they are there already.

    Args:
        model: from `find_model_to_evaluate`.
        tasks: from `plan_videos`.
        form: of the videos.
        device: where the model runs.
        datasets: those that it is validated on; None: it is not.
        losses: gets {name of the model: its validation}.

    Raises:
        InputError: a model cannot be loaded, or a video or loss is not finite.
    """
    from c2r.pipeline import encode_prompts
    from c2r.scoring.losses_file import losses_file

    every = [task for of_control in tasks.values() for task in of_control]
    missing = [task for task in every if not task.is_done()]
    print(f"{model.name}: {len(every) - len(missing)} of {len(every)} videos are there", flush=True)
    if outdated := sum(task.path.exists() for task in missing):
        print(
            f"{model.name}: makes again those of other weights, prompts, controls or settings, or incomplete: "
            f"{outdated}",
            flush=True,
        )
    kept = None if datasets is None else losses_file(model, datasets)
    if kept is not None and (found := kept.read()) is not None:
        print(f"{model.name}: its validation is there", flush=True)
        losses[model.name], datasets = found, None
    if not missing and datasets is None:
        return
    args, embeds = model.args, {}
    if missing:  # the text encoder is the largest model: it is gone before the others are loaded
        texts = [*dict.fromkeys([args.negative_prompt or "", *(task.scene.prompt for task in missing)])]
        embeds = dict(zip(texts, encode_prompts(args.pretrained_model_name_or_path, texts, device, model.dtype)))
    with loaded_pipeline(model, device) as pipeline:
        make_videos(pipeline, model, missing, form, embeds)
        if datasets is not None:
            losses[model.name] = validate(model, pipeline, datasets)
            kept.write(losses[model.name])


@contextmanager
def loaded_pipeline(model: "Model", device: str) -> Iterator[Any]:
    """Yield the pipeline of a model without its text encoder, and free the device's memory at the end."""
    from accelerate.utils.memory import clear_device_cache

    from c2r.generation.models import load_models

    dinov3 = model.args.dinov3 if model.contract.phase == 2 else None
    pipeline = load_models(model.args, device, model.dtype, [], dinov3=dinov3, tokenizer=None, text_encoder=None)
    try:
        yield pipeline
    finally:
        pipeline.maybe_free_model_hooks()
        pipeline.to("cpu")
        clear_device_cache(garbage_collection=True)


def make_videos(
    pipeline: Any, model: "Model", tasks: "Sequence[Task]", form: "ClipFormat", embeds: "Mapping[str, torch.Tensor]"
) -> None:
    """Generate videos and write each as soon as it is finished.

    Args:
        pipeline: from `loaded_pipeline`.
        model: of the pipeline.
        tasks: the videos.
        form: of the videos.
        embeds: {prompt: embeddings}, the negative prompt's too.
    """
    from c2r.bars import progress_bar
    from c2r.generation.control import Length
    from c2r.generation.video import generate

    length = Length(form.num_frames, form.fps)
    pipeline.set_progress_bar_config(disable=True)
    with progress_bar(len(tasks), model.name, "video", shown=bool(tasks)) as bar:
        for task in tasks:
            control = None if task.control is None else task.control.read(task.control.control, form)
            own = Namespace(**vars(model.args) | {"seed": task.seed})
            negative = embeds[own.negative_prompt or ""]
            prompt = {"prompt_embeds": embeds[task.scene.prompt], "negative_prompt_embeds": negative}
            task.write(generate(pipeline, own, length, control, task.path, **prompt), form.fps)
            bar.update()


def validate(model: "Model", pipeline: Any, datasets: "RunDatasets") -> "ModelLosses":
    """Validate a model as its training did: --flow_shift and --conditioning_scale are about videos alone."""
    from c2r.scoring.run_datasets import model_losses

    return model_losses(pipeline, model.contract.phase, datasets, *model.trained_with, model.dtype)


# ------------------------------------------------------------------------------------------- datasets of the training


def read_run_datasets(
    args: Namespace, models: "Sequence[Model]", form: "ClipFormat", accelerator: Any
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


def dinov3_of(args: Namespace, models: "Sequence[Model]", device: str) -> "tuple[str | None, torch.dtype]":
    """Return the DINOv3 that measures the CG look, that of the first model that has one, and its dtype."""
    from c2r.generation.models import weight_dtype

    for model in models:
        if model.args.dinov3 is not None:
            return model.args.dinov3, model.dtype
    return args.dinov3, weight_dtype(args.dtype, device)


if __name__ == "__main__":
    cli.run(main)
