"""One video by the options of `c2r.generate`."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from c2r import InputError
from c2r.generation.control import Length

if TYPE_CHECKING:
    import numpy as np
    import torch

    from c2r.pipeline import C2RPipeline


def generate(
    pipeline: "C2RPipeline",
    args: Namespace,
    length: Length,
    control: "torch.Tensor | None",
    output: object,
    **inputs: Any,
) -> "np.ndarray":
    """Generate one video.

    Args:
        pipeline: from `load_models`.
        args: options, completed from the contract.
        length: from `length_of`.
        control: from `read_padded`; None is a video without control.
        output: name of the video, for messages.
        inputs: prompts or their embeddings, and other arguments of the pipeline.

    Returns:
        (F, H, W, 3) uint8.

    Raises:
        InputError: its frames are not finite.
    """
    import numpy as np
    import torch

    from c2r.pipeline import Sampling

    sampling = Sampling(
        num_inference_steps=args.num_inference_steps,
        guidance=args.guidance,
        guidance_scale=args.guidance_scale,
        control_guidance_scale=args.control_guidance_scale,
        conditioning_scale=args.conditioning_scale,
    )
    latents = pipeline(
        control_video=control,
        num_frames=length.generated,
        height=args.height,
        width=args.width,
        window_frames=args.window_frames,
        window_overlap=args.window_overlap,
        **vars(sampling),
        control_guidance_start=args.control_guidance_start,
        control_guidance_end=args.control_guidance_end,
        generator=torch.Generator().manual_seed(args.seed),  # on CPU: the same noise on every machine
        output_type="latent",
        return_dict=False,
        **inputs,
    )[0]
    chunks = []
    for frames in pipeline.stream_frames(latents):  # (1, f, H, W, 3) in [0, 1]
        if not np.isfinite(frames).all():
            raise InputError(
                f"{output}: not written, its frames are not finite; check --model and its VAE, or give --dtype fp32"
            )
        chunks.append((frames[0] * 255).round().astype(np.uint8))
    return np.concatenate(chunks)[: length.num_frames]
