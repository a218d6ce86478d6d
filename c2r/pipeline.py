"""A WanPipeline that follows a coarse video, and functions that load it for generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import SchedulerMixin, WanPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

from c2r import InputError
from c2r.guidance import APG_MOMENTUM, DEFAULT_GUIDANCE_SCALE, guided_velocity, is_control_on
from c2r.models import parts
from c2r.models.adversary import WithAdversary
from c2r.models.assembly import load_for_generation
from c2r.models.attention import use_lean_attention
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.parts import load_pipeline_part, load_text_encoder, log_long_prompts
from c2r.models.transformer import C2RTransformer
from c2r.models.vae import decode_latents


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampling of a video, by the names of `C2RPipeline.__call__`: `pipeline(**vars(sampling))`."""

    num_inference_steps: int = 50
    guidance: str = "apg"
    guidance_scale: float | None = None
    control_guidance_scale: float = 1.0
    conditioning_scale: float = 1.0


def takes_control(transformer) -> bool:
    """Return True if a model has a control branch: its forward then takes control features and their scale."""
    return isinstance(transformer, (C2RTransformer, WithAdversary))


class C2RPipeline(WanPipeline):
    """Turns a coarse video and a prompt into a video; without a coarse video it works as a WanPipeline.

    Offloading, VAE tiling and the like are Diffusers' own: `enable_model_cpu_offload()`, `vae.enable_tiling()`.
    To free the text encoder's memory, encode prompts with a pipeline of tokenizer and text encoder alone, and pass the
    embeddings to a pipeline without them.

    Args:
        tokenizer, text_encoder, vae, scheduler: as in WanPipeline; None where a call does not need them.
        transformer: `C2RTransformer`, alone or in `WithAdversary`, or the bare `WanTransformer3DModel` of phase 1,
            which takes no control.
        transformer_2, boundary_ratio, expand_timesteps: entries of Wan 2.2 pipeline folders; refused unless they have
            their defaults.
        dinov3: `DINOv3FeatureExtractor`, needed for control.

    Raises:
        ValueError: if the parts are Wan 2.2's.
    """

    model_cpu_offload_seq = "text_encoder->dinov3->transformer->vae"
    _optional_components = ["transformer", "transformer_2", "dinov3"]  # noqa: RUF012 (diffusers' convention)
    _callback_tensor_inputs = [*WanPipeline._callback_tensor_inputs, "control_features"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer,
        text_encoder,
        vae,
        scheduler,
        transformer=None,
        transformer_2=None,
        boundary_ratio=None,
        expand_timesteps=False,
        dinov3=None,
    ):
        if transformer_2 is not None or boundary_ratio is not None or expand_timesteps:
            raise ValueError(
                "transformer_2, boundary_ratio or expand_timesteps is set, as in a Wan 2.2 pipeline; load a folder of "
                "Wan 2.1 text to video"
            )
        super().__init__(tokenizer, text_encoder, vae, scheduler, transformer)
        self.register_modules(dinov3=dinov3)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        control_video: torch.Tensor | list[torch.Tensor] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance: str = "apg",
        guidance_scale: float | None = None,
        control_guidance_scale: float = 1.0,
        conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> WanPipelineOutput | tuple:
        """Generate videos of prompts.

        Args:
            prompt: one prompt or a list of B; None with `prompt_embeds`.
            control_video: (F, 3, H, W) floats in [0, 1], one for all prompts; or (B, F, 3, H, W), or a list of B.
                None runs the backbone alone.
            negative_prompt: the prompt ∅ of the text term; None is the empty prompt, as in training.
            height, width, num_frames: pixels and pixel frames (4k + 1); default: the control video's, else 480×832×81.
            num_inference_steps: steps of the scheduler.
            guidance: "apg" or "cfg", see `c2r.guidance.guided_velocity`.
            guidance_scale: s_t ≥ 0; 1 turns text guidance off, None is DEFAULT_GUIDANCE_SCALE[guidance].
            control_guidance_scale: s_c ≥ 0; 1 turns control guidance off and saves a forward pass per step.
            conditioning_scale: factor of the control residuals.
            control_guidance_start, control_guidance_end: fractions of the steps between which control is on; outside,
                the backbone runs alone.
            num_videos_per_prompt: n, videos of each prompt; those of one prompt follow each other.
            generator: one for all, or a list of B·n.
            latents: (B·n, C, T, h, w), the noise to start from, instead of drawing it from the generator.
            prompt_embeds, negative_prompt_embeds: (B, L, D_text), instead of the prompts.
            output_type: "np" (B·n, F, H, W, 3) in [0, 1], "pt" (B·n, F, 3, H, W), "pil" lists, or "latent".
            return_dict: False returns a tuple of the frames alone.
            attention_kwargs: as in WanPipeline: {"scale": s} scales a LoRA.
            callback_on_step_end: called after each step with pipeline, number of the step, timestep and a dict of
                tensors; what it returns in a dict replaces them. To end early, it sets `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs: which tensors, of "latents", "prompt_embeds",
                "negative_prompt_embeds" and "control_features".
            max_sequence_length: tokens of a padded prompt; None: as in training, see `parts.max_sequence_length`.

        Returns:
            the output with `frames`.

        Raises:
            ValueError: for arguments that do not fit each other or the models.
        """
        # 1. Check the arguments.
        control_frames = _stack_control_videos(control_video)
        default_size = (
            (81, 480, 832) if control_frames is None else (control_frames.shape[1], *control_frames.shape[3:])
        )
        num_frames, height, width = (
            default if size is None else size for size, default in zip((num_frames, height, width), default_size)
        )
        self.check_inputs(
            *(prompt, negative_prompt, height, width, prompt_embeds, negative_prompt_embeds),
            callback_on_step_end_tensor_inputs,
        )
        self._check_size(num_frames, height, width)
        if guidance not in DEFAULT_GUIDANCE_SCALE:
            raise ValueError(f"guidance is {guidance!r}: it must be one of {', '.join(DEFAULT_GUIDANCE_SCALE)}")
        if guidance_scale is None:
            guidance_scale = DEFAULT_GUIDANCE_SCALE[guidance]
        if not 0 <= control_guidance_start < control_guidance_end <= 1:
            raise ValueError(
                f"control_guidance_start is {control_guidance_start}, control_guidance_end {control_guidance_end}: "
                "they must be in ascending order in [0, 1]"
            )
        if isinstance(prompt, str):
            prompt = [prompt]
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        batch_size = len(prompt if prompt_embeds is None else prompt_embeds)
        if control_frames is not None:
            self._check_control(control_frames, batch_size, (num_frames, height, width))
        needs_negative = guidance_scale != 1 or (control_frames is not None and control_guidance_scale != 1)
        if needs_negative and negative_prompt_embeds is None and self.text_encoder is None:
            raise ValueError("negative_prompt_embeds is missing: this guidance needs it, and there is no text encoder")

        # 2. Encode the prompts and the control video.
        device, dtype = self._execution_device, self.transformer.dtype
        # Read by WanPipeline's properties.
        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        self._current_timestep, self._interrupt = None, False
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            negative_prompt,
            do_classifier_free_guidance=needs_negative,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_videos_per_prompt, 0)
        if needs_negative:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_videos_per_prompt, 0)
        control_features = None
        if control_frames is not None:
            control_features = self.dinov3(control_frames.to(device)).to(dtype)
            control_features = control_features.expand(batch_size, *control_features.shape[1:])
            control_features = control_features.repeat_interleave(num_videos_per_prompt, 0)
            # The control ∅: zero features, which control dropout has trained, not the backbone alone.
            blank_features = torch.zeros_like(control_features)

        # 3. Start from noise.
        batch_size *= num_videos_per_prompt
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.scheduler.set_begin_index(0)
        latents = self.prepare_latents(
            batch_size,
            self.transformer.config.in_channels,
            height,
            width,
            num_frames,
            torch.float32,
            device,
            generator,
            latents,
        )

        # 4. Denoise.
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        momentum_buffer = MomentumBuffer(APG_MOMENTUM) if guidance == "apg" else None
        for step, timestep in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                break
            self._current_timestep = timestep
            control_on = control_frames is not None and is_control_on(
                step, len(timesteps), control_guidance_start, control_guidance_end
            )
            control, blank = (control_features, blank_features) if control_on else (None, None)
            predict = partial(
                self._predict_velocity, latents.to(dtype), timestep.expand(batch_size), conditioning_scale
            )
            velocity = guided_velocity(
                partial(predict, blank, negative_prompt_embeds),
                partial(predict, control, negative_prompt_embeds),
                partial(predict, control, prompt_embeds),
                guidance_scale,
                control_guidance_scale if control_on else 1,
                momentum_buffer,
            )
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                tensors = dict(
                    zip(
                        self._callback_tensor_inputs,
                        (latents, prompt_embeds, negative_prompt_embeds, control_features),
                    )
                )
                asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                tensors |= callback_on_step_end(self, step, timestep, asked)
                latents, prompt_embeds, negative_prompt_embeds, control_features = (
                    tensors[name] for name in self._callback_tensor_inputs
                )
        self._current_timestep = None

        # 5. Decode.
        if output_type == "latent":
            frames = latents
        else:
            frames = self.video_processor.postprocess_video(decode_latents(self.vae, latents), output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the embeddings (B·n, L, D_text) of prompts and negative prompts, padded as `__call__` pads them.

        Args:
            max_sequence_length: L; None: as in training, see `parts.max_sequence_length`. WanPipeline's own default of
                226 here differs from that of its call.

        The other arguments are WanPipeline's.
        """
        return super().encode_prompt(
            *(prompt, negative_prompt, do_classifier_free_guidance, num_videos_per_prompt),
            *(prompt_embeds, negative_prompt_embeds),
            max_sequence_length or parts.max_sequence_length(self.tokenizer),
            *(device, dtype),
        )

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if the last call had text guidance: any scale but 1."""
        return self._guidance_scale != 1

    def _predict_velocity(self, noisy_latents, timesteps, conditioning_scale, control_features, prompt_embeds):
        """Return the velocity (B, C, T, h, w) in fp32, because guidance scales differences of predictions."""
        inputs = [noisy_latents, timesteps, prompt_embeds]
        if takes_control(self.transformer):
            inputs += [control_features, conditioning_scale]
        return self.transformer(*inputs).sample.float()

    def _check_size(self, num_frames, height, width):
        """Refuse sizes that WanPipeline would round, so that the control video would no longer fit."""
        if num_frames < 1 or num_frames % self.vae_scale_factor_temporal != 1:
            raise ValueError(
                f"num_frames is {num_frames}: it must be a multiple of {self.vae_scale_factor_temporal} plus 1"
            )
        for name, size, patch in zip(("height", "width"), (height, width), self.transformer.config.patch_size[1:]):
            if size < 1 or size % (self.vae_scale_factor_spatial * patch):
                raise ValueError(f"{name} is {size}: it must be a multiple of {self.vae_scale_factor_spatial * patch}")

    def _check_control(self, control_frames, batch_size, size):
        if not takes_control(self.transformer) or self.dinov3 is None:
            raise ValueError("control_video is given, but this pipeline has no ControlNet and DINOv3: load phase 2")
        if not control_frames.is_floating_point() or control_frames.shape[2] != 3:
            raise ValueError(
                f"control_video is {tuple(control_frames.shape)} {control_frames.dtype}: "
                "expected (F, 3, H, W) floats in [0, 1]"
            )
        if control_frames.shape[0] not in (1, batch_size):
            raise ValueError(f"there are {len(control_frames)} control videos for {batch_size} prompts")
        if (control_frames.shape[1], *control_frames.shape[3:]) != size:
            raise ValueError(
                f"control_video has {control_frames.shape[1]} frames of {control_frames.shape[3]}x"
                f"{control_frames.shape[4]}: resize and cut it to num_frames, height, width = {size}"
            )


@torch.no_grad()
def encode_prompts(
    base_model: str | Path, prompts: list[str], device: torch.device | str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Encode prompts, then free the text encoder's memory: it is larger than Wan 1.3B.

    Args:
        base_model: Wan pipeline, a folder or hub name.
        prompts: N prompts.
        device, dtype: device and dtype of the text encoder.

    Returns:
        N embeddings (1, L, D_text) on CPU.
    """
    tokenizer = load_pipeline_part(base_model, "tokenizer")
    text_encoder = load_text_encoder(base_model, dtype, torch.device(device))
    pipeline = C2RPipeline(tokenizer, text_encoder, vae=None, scheduler=None)
    length = parts.max_sequence_length(tokenizer)
    log_long_prompts(tokenizer, prompts)
    embeds = []
    for prompt in prompts:
        prompt_embeds, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=length, device=device
        )
        embeds.append(prompt_embeds.cpu())
    del pipeline, text_encoder
    clear_device_cache(garbage_collection=True)
    return embeds


def load_pipeline(
    model: str | Path,
    base_model: str | Path,
    *,
    backbone: str | Path | None = None,
    dinov3: str | Path | None = None,
    flow_shift: float,
    device: torch.device | str,
    dtype: torch.dtype,
    cpu_offload: bool = False,
    vae_tiling: bool = False,
    attention_backend: str | None = None,
) -> C2RPipeline:
    """Load a trained model into a pipeline without text encoder.

    Args:
        model: best/ or final/ of a phase.
        base_model: Wan pipeline with VAE and scheduler, a folder or hub name.
        backbone: see `load_for_generation`.
        dinov3: folder or hub name; None gives a pipeline without control.
        flow_shift: shift of the noise levels.
        device: device of the models.
        dtype: dtype of the weights; the VAE is in fp32, as in Wan's own examples, because it costs little.
        cpu_offload: keep only the model in use on the device.
        vae_tiling: decode in tiles: less memory, more time.
        attention_backend: attention kernel by Diffusers' name, tried before by `try_attention_backend`.

    Raises:
        InputError: see `load_for_generation` and `with_flow_shift`.
    """
    transformer, _ = load_for_generation(model, backbone, dtype)
    use_lean_attention(transformer, attention_backend)
    pipeline = C2RPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=load_pipeline_part(base_model, "vae", torch.float32),
        scheduler=with_flow_shift(load_pipeline_part(base_model, "scheduler"), flow_shift),
        transformer=transformer,
        dinov3=None if dinov3 is None else DINOv3FeatureExtractor.from_pretrained(dinov3, dtype),
    )
    if vae_tiling:
        pipeline.vae.enable_tiling()
    if cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def with_flow_shift(scheduler: SchedulerMixin, flow_shift: float) -> SchedulerMixin:
    """Return a scheduler of the same class and config with another shift of the noise levels.

    Args:
        scheduler: Wan's own UniPC, or any flow-matching scheduler of Diffusers.
        flow_shift: see `flow_matching.shift_sigmas`.

    Raises:
        InputError: if the scheduler has no shift.
    """
    for name in ("flow_shift", "shift"):
        if name in scheduler.config:
            return type(scheduler).from_config(scheduler.config, **{name: flow_shift})
    raise InputError(
        f"--flow_shift {flow_shift}: {type(scheduler).__name__} has no shift; use the scheduler of a Wan 2.1 folder"
    )


def _stack_control_videos(control_video):
    """Stack None, (F, 3, H, W), (B, F, 3, H, W) or a list of (F, 3, H, W) to None or (B or 1, F, 3, H, W)."""
    if control_video is None:
        return None
    if isinstance(control_video, (list, tuple)):
        control_video = torch.stack(list(control_video))
    if control_video.ndim == 4:
        control_video = control_video[None]
    if control_video.ndim != 5:
        raise ValueError(f"control_video has shape {tuple(control_video.shape)}: expected (F, 3, H, W)")
    return control_video
