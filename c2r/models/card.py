"""The model card of a trained model's folder, written from its contract."""

import re
from pathlib import Path

import yaml

from c2r.models.contract import PhaseContract

#: File of the sample pictures in the folder of a pipeline.
SAMPLES = "samples.png"

#: Metrics of a contract that the card shows, with what they mean.
METRICS = {
    "loss": "validation loss",
    "loss_at_start": "validation loss before the first step",
    "control_gain": "control gain: loss with another clip's control minus loss",
    "prompt_gain": "prompt gain: loss with another clip's prompt minus loss",
    "leak_share_coarse": "share of the control gain of real clips that comes from the control's look",
    "cg_look": "CG look of the sample videos: 0 is the real clips, 1 the CG clips",
}

_DINOV3_LICENCE = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"


def find_samples(folder: Path, step: int) -> Path | None:
    """Return the last sample pictures of a model's run, from its step or before; None if there are none.

    Args:
        folder: best/ or final/ in the run's folder, or the folder of a pipeline, which has a copy.
        step: the model's.
    """
    if (folder / SAMPLES).is_file():
        return folder / SAMPLES
    sheets = {path.parent.name.removeprefix("step-"): path for path in folder.parent.glob("samples/step-*/sheet.png")}
    steps = [int(sampled) for sampled in sheets if sampled.isdecimal() and int(sampled) <= step]
    return sheets[str(max(steps))] if steps else None


def model_card(contract: PhaseContract, name: str, has_samples: bool) -> str:
    """Return the text of README.md for the folder of a pipeline.

    Args:
        contract: of the folder, with `copied_from`.
        name: folder or hub name to load it from.
        has_samples: True if SAMPLES is in the folder.
    """
    base, dinov3 = (contract.copied_from.get(entry) for entry in ("base_model", "dinov3"))
    metadata = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video" if contract.phase == 1 else "video-to-video",
        "tags": ["c2r", "wan", "text-to-video"],
    }
    if base:
        metadata["base_model"] = base
    if licence := _licence(contract):
        metadata |= licence
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {name.rstrip('/').rpartition('/')[2]}",
        _what_it_is(contract, base),
        f"## Load it\n\n```python\n{_example(contract, name)}```",
        _table("Training", ("", ""), _training(contract)),
        _table("Data", ("domain", "clips", "fingerprint"), _data(contract)),
        _table("Validation on held-out clips", ("number", "value"), _metrics(contract)),
    ]
    if has_samples:
        sections.append(
            f"## Samples\n\n![Samples]({SAMPLES})\n\nFrom a sampling of the run: the control, the video with it, the "
            "video without it, and the true video, three frames of each."
        )
    sections.append(f"## Licence\n\n{_licence_text(base, dinov3)}")
    return "\n\n".join(section for section in sections if section) + "\n"


def _what_it_is(contract, base):
    base = f"[{base}](https://huggingface.co/{base})" if base else "Wan 2.1"
    does = {
        1: f"{base}, adapted to real footage: it turns a prompt into a video.",
        2: f"{base} with a control branch: it turns a coarse 3D rendering and a prompt into a real-looking video.",
    }
    return (
        f"{does[contract.phase]} Trained by C2R {contract.version}, after "
        "[Coarse-to-Real](https://arxiv.org/abs/2601.22301)."
    )


def _example(contract, name):
    call = '"a rainy street at dusk"' + ("" if contract.phase == 1 else ', control_video="coarse.mp4"')
    return (
        "import torch\n"
        "from c2r.data.video_writer import write_video\n"
        "from c2r.pipeline import C2RPipeline\n\n"
        f'pipeline = C2RPipeline.from_pretrained("{name}", torch_dtype=torch.bfloat16).to("cuda")\n'
        f"video = pipeline({call}).frames[0]\n"
        f'write_video("out.mp4", video, fps={contract.format["fps"]:g})\n'
    )


def _training(contract):
    size = contract.format
    rows = {
        "phase": contract.phase,
        "optimizer steps": contract.step,
        "frames, height, width": f"{size['num_frames']}, {size['height']}, {size['width']}",
        "frames per second": f"{size['fps']:g}",
        "shift of the noise levels": contract.flow_shift,
        "conditioning scale": contract.conditioning_scale,
        "guidance of the samples": contract.guidance,
        "its text scale": contract.guidance_scale,
        "its control scale": contract.control_guidance_scale,
        "share of CG samples": contract.metrics.get("cg_share"),
        "SHA-256 of the weights": f"`{contract.weights_sha256}`",
    }
    return [(name, _shown(value)) for name, value in rows.items() if value is not None]


def _data(contract):
    return [
        (domain, _shown(contract.num_clips.get(domain, "unknown")), f"`{fingerprint}`")
        for domain, fingerprint in contract.dataset_fingerprints.items()
    ]


def _metrics(contract):
    return [(text, _shown(contract.metrics[name])) for name, text in METRICS.items() if name in contract.metrics]


def _shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(title, header, rows):
    """Return a section with a Markdown table, or nothing if there are no rows."""
    lines = [header, ["---"] * len(header), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if rows else ""


def _licence(contract):
    """Return the card's entries on the licence, where the parts are known to be under one."""
    base, dinov3 = (contract.copied_from.get(entry, "") for entry in ("base_model", "dinov3"))
    if not re.match(r"Wan-AI/Wan2\.1-", base):
        return {}
    if contract.phase == 1:
        return {"license": "apache-2.0"}
    if not dinov3.startswith("facebook/dinov3"):
        return {}
    return {"license": "other", "license_name": "apache-2.0-and-dinov3", "license_link": _DINOV3_LICENCE}


def _licence_text(base, dinov3):
    base = f"the base model [{base}](https://huggingface.co/{base})" if base else "the base model"
    text = f"The licence of {base} applies to its weights and to those trained from them. Wan 2.1 is under Apache 2.0."
    if dinov3 and dinov3.startswith("facebook/dinov3"):
        text += (
            f" `dinov3/` is a copy of [{dinov3}](https://huggingface.co/{dinov3}), under the [DINOv3 License]"
            f"({_DINOV3_LICENCE}): whoever passes it on has to pass on this licence too."
        )
    return text
