"""A WanPipeline that follows a coarse video. Its folder is loaded and written in `c2r.pipeline_folder`."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin, WanPipeline, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from huggingface_hub import create_repo
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from c2r.data.control_video import as_control_frames
from c2r.guidance import APG_MOMENTUM, DEFAULT_GUIDANCE_SCALE, guided_velocity, is_control_on, move_momentum
from c2r.models.adversary import WithAdversary, takes_control
from c2r.models.contract import CONTRACT, DEFAULT_FORMAT, PhaseContract, read_contract
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.lora_file import LoraFile
from c2r.models.parts import load_pipeline_part, load_text_encoder, log_long_prompts
from c2r.models.parts import max_sequence_length as longest_prompt
from c2r.models.streaming import stream_frames
from c2r.models.transformer import C2RTransformer
from c2r.models.vae import decode_latents
from c2r.pipeline_folder import load_parts, with_flow_shift, with_replaced_parts, write_card, write_folder
from c2r.windows import Window, blend_windows, extend_noise, plan_pixel_windows, trained_window

__all__ = ["C2RPipeline", "Sampling", "encode_prompts", "takes_control", "with_flow_shift"]


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampling of a video, by the names of `C2RPipeline.__call__`: `pipeline(**vars(sampling))`."""

    num_inference_steps: int = 50
    guidance: str = "apg"
    guidance_scale: float | None = None
    control_guidance_scale: float = 1.0
    conditioning_scale: float = 1.0


Call = TypeVar("Call", bound=Callable[..., Any])


def _frees_hooks(call: Call) -> Call:
    """Return a method of a pipeline that also takes offloaded models off the device, and resets caches, if it fails.

    Otherwise the model that ran out of memory would stay on the device, and all later calls would fail.
    """

    @wraps(call)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        finally:
            self.maybe_free_model_hooks()

    return cast(Call, wrapped)


class C2RPipeline(WanPipeline):
    """Turns a coarse video and a prompt into a video; without a coarse video it works as a WanPipeline.

    Offloading, VAE tiling and the like are Diffusers' own: `enable_model_cpu_offload()`, `vae.enable_tiling()`.
    To free the text encoder's memory, encode prompts by `encode_prompts`, and pass the embeddings to a pipeline that
    was loaded with `text_encoder=None`.

    Args:
        tokenizer, text_encoder, vae, scheduler: as in WanPipeline; None where a call does not need them.
        transformer: `C2RTransformer`, alone or in `WithAdversary`, or the bare `WanTransformer3DModel` of phase 1,
            which takes no control.
        transformer_2, boundary_ratio, expand_timesteps: entries of Wan 2.2 pipeline folders; refused unless they have
            their defaults.
        dinov3: `DINOv3FeatureExtractor`, needed for control.

    Attributes:
        contract: `PhaseContract` of the folder that it was loaded from, or None.

    Raises:
        ValueError: if the parts are Wan 2.2's.
    """

    model_cpu_offload_seq = "text_encoder->dinov3->transformer->vae"
    _optional_components = ["transformer", "transformer_2", "dinov3"]  # noqa: RUF012 (diffusers' convention)
    _callback_tensor_inputs = [*WanPipeline._callback_tensor_inputs, "control_features"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: UMT5EncoderModel | None,
        vae: AutoencoderKLWan | None,
        scheduler: SchedulerMixin | None,
        transformer: WanTransformer3DModel | C2RTransformer | WithAdversary | None = None,
        transformer_2: None = None,
        boundary_ratio: None = None,
        expand_timesteps: bool = False,
        dinov3: DINOv3FeatureExtractor | None = None,
    ):
        if transformer_2 is not None or boundary_ratio is not None or expand_timesteps:
            raise ValueError(
                "transformer_2, boundary_ratio or expand_timesteps is set, as in a Wan 2.2 pipeline; load a folder of "
                "Wan 2.1 text to video"
            )
        super().__init__(tokenizer, text_encoder, vae, scheduler, transformer)
        self.register_modules(dinov3=dinov3)
        self.contract: PhaseContract | None = None
        self._samples: Path | None = None  # folder whose samples are of these parts

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: torch.dtype | None = None,
        *,
        backbone: str | Path | None = None,
        base: str | Path | None = None,
        loras: Iterable[LoraFile | str | Path] = (),
        controlnet: str | Path | None = None,
        use_safetensors: bool = True,
        **components: Any,
    ) -> "C2RPipeline":
        """Load a trained model with all that its contract names.

        Files are checked before they are read: weights are read from safetensors alone, no code of a model's author
        runs, and the backbone of phase 2 must have the contract's fingerprint. The scheduler gets the shift of
        training. The VAE is in fp32 whatever `torch_dtype` is, as in Wan's own examples, because it costs little.

        Args:
            pretrained_model_name_or_path: best/ or final/ of a phase, a folder that `save_pretrained` wrote, or a Wan
                2.1 pipeline; or the hub name of one.
            torch_dtype: dtype of the weights; None is fp32.
            backbone: the backbone of phase 2, if it was moved since training.
            base: Wan pipeline with VAE, text encoder, tokenizer and scheduler, a folder or hub name, if it was moved.
            loras: files, or `LoraFile`s with a scale, added to the backbone's weights before these are cast.
                `load_lora_weights` and its kin, which need peft, add LoRAs later, and can change or remove them.
            controlnet: file of the released C2R's control weights, for a Wan 2.1 pipeline with their backbone, which
                `backbone` may name; `dinov3` must be given too. Size, rate and shift are those of the release.
            use_safetensors: True; code for Diffusers may give it.
            components: parts to use in place of the folder's, by the names of the class's arguments; None leaves one
                out. `dinov3` may also be a folder or hub name.

        Raises:
            InputError: a part is missing, damaged, or not the one of training.
            TypeError: for an unknown keyword, such as one that would run code of a model's author.
            ValueError: `use_safetensors` is False.
        """
        if not use_safetensors:
            raise ValueError("use_safetensors is False: weights are read from safetensors alone; leave it out")
        known, _ = cls._get_signature_keys(cls)
        if unknown := sorted(components.keys() - set(known)):
            raise TypeError(
                f"from_pretrained() does not take {', '.join(unknown)}; it takes torch_dtype, backbone, base, loras, "
                f"controlnet, use_safetensors, {', '.join(known)}"
            )
        files = [lora if isinstance(lora, LoraFile) else LoraFile(lora) for lora in loras]
        parts = load_parts(
            *(pretrained_model_name_or_path, torch_dtype, backbone, base, files, controlnet), given=components
        )
        pipeline = cls(**parts.components)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        pipeline.contract, pipeline._samples = parts.contract, parts.samples
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> "C2RPipeline":
        """Return a pipeline of the parts of another one, shared with it and in their dtypes.

        Args:
            pipeline: `WanPipeline` of Wan 2.1, or a `C2RPipeline`.
            components: parts to use instead, by the names of the class's arguments, such as a `C2RTransformer` and a
                DINOv3 for a `WanPipeline`.
        """
        expected, optional = cls._get_signature_keys(cls)
        shared = {name: part for name, part in pipeline.components.items() if name in expected}
        shared |= {name: value for name, value in pipeline.config.items() if name in optional}
        new = cls(**shared | components)
        new.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        if isinstance(pipeline, C2RPipeline):
            new.contract, new._samples = pipeline.contract, pipeline._samples
            if pipeline.contract is not None:
                new.contract = with_replaced_parts(pipeline.contract, components)
                new._samples = pipeline._samples if new.contract == pipeline.contract else None
        return new

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        *,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write a folder with all parts, the contract and a model card; `from_pretrained` and c2r.generate load it.

        `WanPipeline.from_pretrained` loads it too, without the control. A pipeline that was not loaded from a trained
        model has neither contract nor card.

        Args:
            save_directory: complete or absent (see `atomic_folder`).
            safe_serialization: True; code for Diffusers may give it.
            max_shard_size: bytes of a file of weights, or text such as "5GB"; larger models are split. None: the
                default of the library of each model.

        Raises:
            InputError: the folder has files already, or the transformer has a LoRA that is not fused.
            ValueError: `safe_serialization` is False.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization is False: weights are written as safetensors alone; leave it out")
        name = str(save_directory)
        write_folder(save_directory, self, self.contract, self._samples, name, max_shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the folder that `save_pretrained` writes, with a model card that names the repository.

        Args: see Diffusers' `PushToHubMixin.push_to_hub`.

        Returns:
            address of the commit.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "pipeline")
            write_folder(folder, self, self.contract, self._samples, name=repo_id)  # it may refuse
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            if (folder / CONTRACT).is_file():
                write_card(folder, read_contract(folder), name=repo_id)  # repo_id now has its owner
            return self._upload_folder(folder, repo_id, token, commit_message, create_pr)

    @_frees_hooks
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        control_video: Any = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        window_frames: int | None = None,
        window_overlap: int | None = None,
        num_inference_steps: int = 50,
        guidance: str | None = None,
        guidance_scale: float | None = None,
        control_guidance_scale: float | None = None,
        conditioning_scale: float | None = None,
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
            control_video: one for all prompts, or a list of B. Each is the path of a video or of an image
                sequence, whose start is read; a tensor (F, 3, H, W) or an array (F, H, W, 3), uint8 or floats in
                [0, 1]; or a list of F pictures. None runs the backbone alone.
            negative_prompt: the prompt ∅ of the text term; None is the empty prompt, as in training.
            height, width, num_frames: pixels and pixel frames (4k + 1); default: the control video's, else those of
                training, else 480×832×81. A control video of a path is resized and cropped to them.
            fps: frames per second at which the path of a control video is read; default: of training, else 16.
            window_frames: pixel frames (4k + 1) of a window, best as many as in training; a longer video is made of
                overlapping windows that are denoised together, see `c2r.windows`. What grows with its length then is
                on the CPU. None: those of training; one window of num_frames without a contract, or if the model was
                trained on single pictures.
            window_overlap: pixel frames (4k + 1) that neighbouring windows share; None: about a quarter of a window.
            num_inference_steps: steps of the scheduler.
            guidance: "apg" or "cfg", see `c2r.guidance.guided_velocity`; None: that of the samples of training, else
                "apg".
            guidance_scale: s_t ≥ 0; 1 turns text guidance off. None: that of the samples of training if they have
                this guidance, else DEFAULT_GUIDANCE_SCALE[guidance].
            control_guidance_scale: s_c ≥ 0; 1 turns control guidance off and saves a forward pass per step. None:
                that of the samples of training, else 1.
            conditioning_scale: factor of the control residuals; None: as trained, else 1.
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
        # 1. Check the arguments and fill in their defaults.
        control_frames, num_frames, height, width = self._read_control(
            control_video, num_frames=num_frames, height=height, width=width, fps=fps
        )
        if guidance is None:
            guidance = self._as_trained("guidance", "apg")
        if control_guidance_scale is None:
            control_guidance_scale = self._as_trained("control_guidance_scale", 1.0)
        if conditioning_scale is None:
            conditioning_scale = self._as_trained("conditioning_scale", 1.0)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            *(prompt, negative_prompt, height, width, prompt_embeds, negative_prompt_embeds),
            callback_on_step_end_tensor_inputs,
        )
        self._check_size(num_frames, height, width)
        windows = self.plan_windows(num_frames, window_frames, window_overlap)
        self._check_guidance(guidance, control_guidance_start, control_guidance_end)
        if guidance_scale is None:
            guidance_scale = DEFAULT_GUIDANCE_SCALE[guidance]
            if guidance == self._as_trained("guidance", None):
                guidance_scale = self._as_trained("guidance_scale", guidance_scale)
        if isinstance(prompt, str):
            prompt = [prompt]
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt is {num_videos_per_prompt}: it must be at least 1")
        batch_size = len(prompt if prompt_embeds is None else prompt_embeds)
        if control_frames is not None:
            self._check_control(control_frames, batch_size, (num_frames, height, width))
        if latents is not None:
            self._check_latents(latents, batch_size * num_videos_per_prompt, windows, height, width)
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
        storage = device if len(windows) == 1 else torch.device("cpu")  # of what grows with the length
        control_features = None
        if control_frames is not None:
            chunk_size = control_frames.shape[1] if len(windows) == 1 else self.dinov3.chunk_size
            control_features = self._encode_control(control_frames, chunk_size, storage)
            control_features = control_features.expand(batch_size, *control_features.shape[1:])
            control_features = control_features.repeat_interleave(num_videos_per_prompt, 0)

        # 3. Start from noise.
        self.scheduler.set_timesteps(num_inference_steps, device=storage)
        self.scheduler.set_begin_index(0)
        if latents is None:
            latents = self._draw_noise(batch_size * num_videos_per_prompt, windows, height, width, generator)
        latents = latents.to(storage, torch.float32)

        # 4. Denoise.
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        momentum_buffers = [MomentumBuffer(APG_MOMENTUM) if guidance == "apg" else None for _ in windows]
        for step, timestep in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                break
            self._current_timestep = timestep
            control_on = control_frames is not None and is_control_on(
                step, len(timesteps), control_guidance_start, control_guidance_end
            )
            scales = (guidance_scale, control_guidance_scale if control_on else 1, conditioning_scale)
            progress = {"step_index": step, "num_inference_steps": len(timesteps)}
            progress["sigma"] = float(timestep) / self.scheduler.config.num_train_timesteps
            velocity = blend_windows(
                windows,
                lambda number: self._guided_velocity(
                    *(windows[number], latents, timestep, control_features if control_on else None),  # noqa: B023
                    *(prompt_embeds, negative_prompt_embeds, scales, momentum_buffers[number], progress),  # noqa: B023
                ),
                like=latents,
            )
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                values = (latents, prompt_embeds, negative_prompt_embeds, control_features)
                tensors = dict(zip(self._callback_tensor_inputs, values))
                asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                tensors |= callback_on_step_end(self, step, timestep, asked)
                latents, prompt_embeds, negative_prompt_embeds, control_features = (
                    tensors[name] for name in self._callback_tensor_inputs
                )
        self._current_timestep = None

        # 5. Decode.
        frames = latents if output_type == "latent" else self._decode(latents, output_type, len(windows) > 1)
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
            max_sequence_length or longest_prompt(self.tokenizer),
            *(device, dtype),
        )

    def enable_group_offload(self, *args, exclude_modules: str | list[str] | None = None, **options):
        """Keep groups of layers elsewhere until they run; the arguments are Diffusers'.

        Raises:
            ValueError: Diffusers would give wrong embeddings.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        to_disk = options.get("offload_to_disk_path") is not None and options.get("offload_type") == "leaf_level"
        if to_disk and self.text_encoder is not None and "text_encoder" not in excluded:
            raise ValueError(
                "offload_to_disk_path with leaf_level: Diffusers would lose the text encoder's embeddings, which two "
                'of its layers share; add exclude_modules="text_encoder"'
            )
        super().enable_group_offload(*args, exclude_modules=exclude_modules, **options)

    def plan_windows(
        self, num_frames: int, window_frames: int | None = None, window_overlap: int | None = None
    ) -> list[Window]:
        """Return the windows of a video of `num_frames`; the arguments are those of `__call__`.

        Raises:
            ValueError: the sizes of the windows do not fit the VAE or each other.
        """
        if window_frames is None and self.contract is not None:
            window_frames = trained_window(self.contract.format["num_frames"])
        return plan_pixel_windows(num_frames, window_frames, window_overlap, self.vae_scale_factor_temporal)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if the last call had text guidance: any scale but 1."""
        return self._guidance_scale != 1

    def _read_control(self, control_video, **given):
        """Return the control frames (B, F, 3, H, W) or None, and num_frames, height and width of the video.

        `given` are the arguments of these names and fps, or None: then the control video's, else those of training.
        """
        size = dict(DEFAULT_FORMAT if self.contract is None else self.contract.format)
        size |= {name: value for name, value in given.items() if value is not None}
        control_frames = None
        if control_video is not None:
            control_frames = as_control_frames(control_video, **size)
            own = dict(zip(("num_frames", "height", "width"), (control_frames.shape[1], *control_frames.shape[3:])))
            size |= {name: value for name, value in own.items() if given[name] is None}
        return control_frames, size["num_frames"], size["height"], size["width"]

    def _check_size(self, num_frames, height, width):
        """Refuse sizes that WanPipeline would round, so that the control video would no longer fit."""
        if num_frames < 1 or num_frames % self.vae_scale_factor_temporal != 1:
            raise ValueError(
                f"num_frames is {num_frames}: it must be a multiple of {self.vae_scale_factor_temporal} plus 1"
            )
        for name, size, patch in zip(("height", "width"), (height, width), self.transformer.config.patch_size[1:]):
            if size < 1 or size % (self.vae_scale_factor_spatial * patch):
                raise ValueError(f"{name} is {size}: it must be a multiple of {self.vae_scale_factor_spatial * patch}")

    def _as_trained(self, name, default):
        """Return an entry of the contract; the default without a contract, or if it lacks the entry."""
        value = None if self.contract is None else getattr(self.contract, name)
        return default if value is None else value

    @staticmethod
    def _check_guidance(guidance, control_guidance_start, control_guidance_end):
        if guidance not in DEFAULT_GUIDANCE_SCALE:
            raise ValueError(f"guidance is {guidance!r}: it must be one of {', '.join(DEFAULT_GUIDANCE_SCALE)}")
        if not 0 <= control_guidance_start < control_guidance_end <= 1:
            raise ValueError(
                f"control_guidance_start is {control_guidance_start}, control_guidance_end {control_guidance_end}: "
                "they must be in ascending order in [0, 1]"
            )

    def _check_control(self, control_frames, batch_size, size):
        if not takes_control(self.transformer) or self.dinov3 is None:
            raise ValueError("control_video is given, but this pipeline has no ControlNet and DINOv3: load phase 2")
        if control_frames.shape[0] not in (1, batch_size):
            raise ValueError(f"there are {len(control_frames)} control videos for {batch_size} prompts")
        if (control_frames.shape[1], *control_frames.shape[3:]) != size:
            raise ValueError(
                f"control_video has {control_frames.shape[1]} frames of {control_frames.shape[3]}x"
                f"{control_frames.shape[4]}: resize and cut it to num_frames, height, width = {size}"
            )

    def _check_latents(self, latents, batch_size, windows, height, width):
        size = (height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial)
        expected = (batch_size, self.transformer.config.in_channels, windows[-1].stop, *size)
        if latents.shape != expected:
            raise ValueError(f"latents has shape {tuple(latents.shape)}: expected {expected}")

    def _encode_control(self, control_frames, chunk_size, storage):
        """Return the features (B, F, h, w, Dd) of control frames (B, F, 3, H, W), on the device `storage`.

        `chunk_size` frames of each video are on the pipeline's device at a time.
        """
        device, dtype = self._execution_device, self.transformer.dtype
        chunks = control_frames.split(chunk_size, dim=1)
        return torch.cat([self.dinov3(frames.to(device)).to(storage, dtype) for frames in chunks], dim=1)

    def _draw_noise(self, batch_size, windows, height, width, generator):
        """Return the noise (B, C, T, h, w) fp32 of all windows, drawn on the pipeline's device."""
        # As for a video of one window, so that this is the noise at the start of longer videos too.
        frames = windows[0].frames(self.vae_scale_factor_temporal)
        noise = self.prepare_latents(
            *(batch_size, self.transformer.config.in_channels, height, width, frames.stop),
            *(torch.float32, self._execution_device, generator),
        )
        return extend_noise(noise, windows[-1].stop, generator)

    def _guided_velocity(
        self,
        window,
        latents,
        timestep,
        features,
        prompt_embeds,
        negative_prompt_embeds,
        scales,
        momentum_buffer,
        progress,
    ):
        """Return the guided velocity (B, C, T, h, w) fp32 of a window.

        `latents` (B, C, T, h, w) and control `features` (B, F, h, w, Dd) or None are of the whole video, on any
        device; `scales` are those of text, control and residuals; `progress` is for Diffusers' caches, which need a
        context for each pass of each window.
        """
        device, dtype = prompt_embeds.device, prompt_embeds.dtype
        noisy_latents = latents[:, :, window.latents].to(device, dtype)
        control = blank = None
        if features is not None:
            control = features[:, window.frames(self.vae_scale_factor_temporal)].to(device)
            # The control ∅: zero features, which control dropout has trained, not the backbone alone.
            blank = torch.zeros_like(control)
        guidance_scale, control_guidance_scale, conditioning_scale = scales
        timesteps = timestep.to(device).expand(len(noisy_latents))

        def predict(name, features, prompt_embeds):
            name = f"{name} {window.start}" + ("" if features is not None else " without control")
            with self._cache_context(name, **progress):
                inputs = (noisy_latents, timesteps, conditioning_scale, features, prompt_embeds)
                return self._predict_velocity(*inputs)

        move_momentum(momentum_buffer, device)
        velocity = guided_velocity(
            partial(predict, "unconditional", blank, negative_prompt_embeds),
            partial(predict, "control", control, negative_prompt_embeds),
            partial(predict, "both", control, prompt_embeds),
            guidance_scale,
            control_guidance_scale,
            momentum_buffer,
        )
        move_momentum(momentum_buffer, latents.device)
        return velocity

    def _cache_context(self, name, **progress):
        # A model wrapped for training has no caches.
        cache_context = getattr(self.transformer, "cache_context", None)
        return nullcontext() if cache_context is None else cache_context(name, **progress)

    def _predict_velocity(self, noisy_latents, timesteps, conditioning_scale, control_features, prompt_embeds):
        """Return the velocity (B, C, T, h, w) in fp32, because guidance scales differences of predictions."""
        inputs = [noisy_latents, timesteps, prompt_embeds]
        if takes_control(self.transformer):
            inputs += [control_features, conditioning_scale]
        # Only where given: C2RTransformer's engines call it without.
        more = {} if self._attention_kwargs is None else {"attention_kwargs": self._attention_kwargs}
        return self.transformer(*inputs, **more).sample.float()

    def _decode(self, latents, output_type, streamed):
        """Return the frames in the form of `output_type`; streamed: a latent frame at a time, on the CPU."""
        if not streamed:
            return self.video_processor.postprocess_video(decode_latents(self.vae, latents), output_type)
        chunks = list(self.stream_frames(latents, output_type))
        if output_type == "pil":
            return [[frame for chunk in video for frame in chunk] for video in zip(*chunks)]
        return np.concatenate(chunks, 1) if output_type == "np" else torch.cat(chunks, 1)

    def stream_frames(self, latents: torch.Tensor, output_type: str = "np") -> Iterator[Any]:
        """Decode the latents of `output_type="latent"`, and yield frames as soon as they are decoded.

        Neither the device nor the host then holds all frames of a long video, see `c2r.models.streaming`.

        Args:
            latents: (B, C, T, h, w) on any device.
            output_type: "np", "pt" or "pil", see `__call__`.

        Yields:
            the frames of a latent frame: one of the first, four of each of the others.
        """
        try:
            for pixel_values in stream_frames(self.vae, latents, self._execution_device):
                yield self.video_processor.postprocess_video(pixel_values, output_type)
        finally:  # also if the caller stops early
            self.maybe_free_model_hooks()


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
    log_long_prompts(tokenizer, prompts)
    embeds = []
    for prompt in prompts:
        prompt_embeds, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=torch.device(device)
        )
        embeds.append(prompt_embeds.cpu())
    del pipeline, text_encoder
    clear_device_cache(garbage_collection=True)
    return embeds
