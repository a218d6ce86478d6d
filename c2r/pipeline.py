"""A WanPipeline that follows a coarse video: calling, loading, saving and publishing it."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import AutoencoderKLWan, DiffusionPipeline, SchedulerMixin, WanPipeline, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from huggingface_hub import create_repo
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from c2r import InputError
from c2r.data.control_video import as_control_frames
from c2r.files import atomic_folder, read_json
from c2r.guidance import (
    APG_MOMENTUM,
    DEFAULT_GUIDANCE_SCALE,
    guided_velocity,
    is_control_on,
    move_momentum,
)
from c2r.models import released
from c2r.models.adversary import WithAdversary
from c2r.models.assembly import load_control_start, load_controlnet, load_for_generation, load_transformer
from c2r.models.attention import use_lean_attention
from c2r.models.card import SAMPLES, find_samples, model_card
from c2r.models.contract import (
    CONTRACT,
    DEFAULT_FORMAT,
    MODEL_ENTRIES,
    MODEL_INDEX,
    PhaseContract,
    fetch_model,
    read_contract,
    with_moved_models,
    write_contract,
)
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.hub import fingerprint_files
from c2r.models.lora import LoraFile
from c2r.models.parts import freeze, load_pipeline_part, load_text_encoder, log_long_prompts
from c2r.models.parts import max_sequence_length as longest_prompt
from c2r.models.streaming import stream_frames
from c2r.models.transformer import C2RTransformer
from c2r.models.vae import decode_latents
from c2r.windows import blend_windows, default_overlap, extend_noise, plan_windows

#: Parts that a folder of Diffusers names in its model_index.json, but the transformer.
BASE_PARTS = ("scheduler", "tokenizer", "vae", "text_encoder")
#: Classes of the pipelines whose folders can be loaded.
PIPELINES = ("WanPipeline", "C2RPipeline")


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
        self._folder: Path | None = None  # that it was loaded from

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: torch.dtype | None = None,
        *,
        backbone: str | Path | None = None,
        base: str | Path | None = None,
        loras: Iterable[LoraFile] = (),
        controlnet: str | Path | None = None,
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
            loras: added to the backbone's weights before these are cast. `load_lora_weights` and its kin, which need
                peft, add LoRAs later, and can change or remove them.
            controlnet: file of the released C2R's control weights, for a Wan 2.1 pipeline with their backbone, which
                `backbone` may name; `dinov3` must be given too. Size, rate and shift are those of the release.
            components: parts to use in place of the folder's, by the names of the class's arguments; None leaves one
                out. `dinov3` may also be a folder or hub name.

        Raises:
            InputError: a part is missing, damaged, or not the one of training.
            TypeError: for an unknown keyword, such as one that would run code of a model's author.
        """
        known, _ = cls._get_signature_keys(cls)
        if unknown := sorted(components.keys() - set(known)):
            raise TypeError(
                f"from_pretrained() does not take {', '.join(unknown)}; it takes torch_dtype, backbone, base, loras, "
                f"controlnet, {', '.join(known)}"
            )
        folder = fetch_model(pretrained_model_name_or_path, without=components)
        index = _read_model_index(folder)
        contract: PhaseContract | None = None
        dinov3: Any = folder / "dinov3" if (folder / "dinov3").is_dir() else None
        if index is None or (folder / CONTRACT).is_file():
            # Models that are replaced need not be where the contract says.
            replaced = [entry for entry in ("dinov3",) if entry in components]
            if "transformer" in components:
                replaced.append("backbone")
            given = {"base_model": base, "backbone": backbone, "dinov3": None}
            contract = with_moved_models(
                read_contract(folder),
                pretrained_model_name_or_path,
                **{entry: name for entry, name in given.items() if entry not in replaced},
            )
            base, dinov3 = contract.base_model, contract.dinov3
        base = base or folder
        absent = () if index is None or os.path.realpath(base) != os.path.realpath(folder) else _absent_parts(index)

        loaded: dict[str, Any] = {}
        for part in (part for part in BASE_PARTS if part not in components):
            dtype = torch_dtype if part == "text_encoder" else None
            loaded[part] = None if part in absent else load_pipeline_part(base, part, dtype)
        if "transformer" not in components:
            if contract is None:
                loaded["transformer"] = _load_without_contract(folder, backbone or folder, base, torch_dtype, loras)
            else:
                loaded["transformer"], _ = load_for_generation(folder, backbone, torch_dtype, base, loras)
            if controlnet is not None:
                loaded["transformer"] = _with_released_control(loaded["transformer"], controlnet, torch_dtype)
            use_lean_attention(loaded["transformer"])
        dinov3 = components.pop("dinov3", dinov3)
        if controlnet is not None:
            if dinov3 is None or "transformer" in components:
                raise InputError(f"controlnet={controlnet}: needs dinov3 and no transformer; give dinov3=")
            contract = PhaseContract(
                phase=2,
                base_model=str(base),
                step=0,
                **released.FORMAT,
                backbone=str(backbone or pretrained_model_name_or_path),
                backbone_sha256="",  # computed when saved: at 14B it takes minutes
                dinov3=str(dinov3) if isinstance(dinov3, str | Path) else "dinov3",
            )
        if isinstance(dinov3, str | Path):
            dinov3 = DINOv3FeatureExtractor.from_pretrained(dinov3, torch_dtype)
        pipeline = cls(**loaded, **components, dinov3=dinov3)
        if contract is not None and contract.flow_shift is not None and "scheduler" in loaded:
            pipeline.scheduler = with_flow_shift(pipeline.scheduler, contract.flow_shift)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        pipeline.contract, pipeline._folder = contract, folder
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
            new.contract, new._folder = pipeline.contract, pipeline._folder
        return new

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a folder with all parts, the contract and a model card; `from_pretrained` and c2r.generate load it.

        `WanPipeline.from_pretrained` loads it too, without the control. A pipeline that was not loaded from a trained
        model has neither contract nor card.

        Args:
            save_directory: complete or absent (see `atomic_folder`).

        Raises:
            InputError: the folder has files already, or the transformer has a LoRA that is not fused.
        """
        self._write_folder(save_directory, str(save_directory))

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
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "pipeline")
            self._write_folder(folder, repo_id)
            return self._upload_folder(folder, repo_id, token, commit_message, create_pr)

    def _write_folder(self, folder, name):
        """Write the folder of `save_pretrained`; `name` is what the card loads."""
        folder = Path(os.path.realpath(folder))
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: has files already; give a new folder")
        controlled = takes_control(self.transformer)
        backbone = self.transformer.transformer if controlled else self.transformer
        if getattr(backbone, "peft_config", None):
            raise InputError(
                f"{folder}: not written, because the transformer has a LoRA; call pipeline.fuse_lora() and then "
                "pipeline.unload_lora_weights(), or unload it alone"
            )
        if getattr(backbone, "hf_quantizer", None) is not None:
            raise InputError(
                f"{folder}: not written, because the transformer is quantised; load it unquantised to save it"
            )
        parts = {part: getattr(self, part) for part in BASE_PARTS} | {"transformer": backbone}
        index = {"_class_name": type(self).__name__, "_diffusers_version": diffusers.__version__}
        with atomic_folder(folder) as temporary:
            for part, model in parts.items():
                index[part] = [None, None]
                if model is not None:
                    index[part] = [type(model).__module__.partition(".")[0], type(model).__name__]
                    model.save_pretrained(temporary / part)
            # Not in the index: a stock WanPipeline would refuse classes that Diffusers does not have.
            if controlled:
                self.transformer.controlnet.save_pretrained(temporary / "controlnet")
            if self.dinov3 is not None:
                self.dinov3.save_pretrained(temporary / "dinov3")
            (temporary / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            if self.contract is not None and backbone is not None:
                contract = self._contract_of_folder(temporary, controlled)
                write_contract(temporary, contract)
                samples = self._folder and find_samples(self._folder, contract.step)
                if samples:
                    shutil.copyfile(samples, temporary / SAMPLES)
                card = model_card(contract, name, has_samples=bool(samples))
                (temporary / "README.md").write_text(card, encoding="utf-8")

    def _contract_of_folder(self, folder, controlled):
        """Return the contract of a folder of this pipeline's parts, whose paths are relative to the folder."""
        names = {entry: getattr(self.contract, entry) for entry in MODEL_ENTRIES}
        of_hub = {entry: name for entry, name in names.items() if name and not os.path.isabs(name)}
        changed: dict[str, Any] = {
            "base_model": ".",
            "flow_shift": _flow_shift(self.scheduler),
            "copied_from": self.contract.copied_from | of_hub,
            **dict.fromkeys(("lora_rank", "backbone_base")),  # a LoRA of training is fused in the saved backbone
        }
        if self.dinov3 is not None:
            changed["dinov3"] = "./dinov3"
        sha256 = fingerprint_files(folder / "transformer")  # it changes with the dtype
        if not controlled:
            changed |= {"backbone": None, "backbone_sha256": None}
            return replace(self.contract, phase=1, weights_sha256=sha256, **changed)
        changed |= {"backbone": "./transformer", "backbone_sha256": sha256}
        return replace(self.contract, phase=2, weights_sha256=fingerprint_files(folder / "controlnet"), **changed)

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
        guidance: str = "apg",
        guidance_scale: float | None = None,
        control_guidance_scale: float = 1.0,
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
            control_video: one for all prompts, or a list of B. Each is the path of a video or of a sequence of
                pictures, whose start is read; a tensor (F, 3, H, W) or an array (F, H, W, 3), uint8 or floats in
                [0, 1]; or a list of F pictures. None runs the backbone alone.
            negative_prompt: the prompt ∅ of the text term; None is the empty prompt, as in training.
            height, width, num_frames: pixels and pixel frames (4k + 1); default: the control video's, else those of
                training, else 480×832×81. A control video of a path is resized and cropped to them.
            fps: frames per second at which the path of a control video is read; default: of training, else 16.
            window_frames: pixel frames (4k + 1) of a window, best as many as in training; a longer video is made of
                overlapping windows that are denoised together, see `c2r.windows`. What grows with its length then is
                on the CPU. None: those of training, without a contract one window of num_frames.
            window_overlap: pixel frames (4k + 1) that neighbouring windows share; None: about a quarter of a window.
            num_inference_steps: steps of the scheduler.
            guidance: "apg" or "cfg", see `c2r.guidance.guided_velocity`.
            guidance_scale: s_t ≥ 0; 1 turns text guidance off, None is DEFAULT_GUIDANCE_SCALE[guidance].
            control_guidance_scale: s_c ≥ 0; 1 turns control guidance off and saves a forward pass per step.
            conditioning_scale: factor of the control residuals; None: as trained.
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
        given = {"num_frames": num_frames, "height": height, "width": width, "fps": fps}
        size = dict(DEFAULT_FORMAT if self.contract is None else self.contract.format)
        size |= {name: value for name, value in given.items() if value is not None}
        control_frames = None
        if control_video is not None:
            control_frames = as_control_frames(control_video, **size)
            own = dict(zip(("num_frames", "height", "width"), (control_frames.shape[1], *control_frames.shape[3:])))
            size |= {name: value for name, value in own.items() if given[name] is None}
        num_frames, height, width = size["num_frames"], size["height"], size["width"]
        if conditioning_scale is None:
            trained = None if self.contract is None else self.contract.conditioning_scale
            conditioning_scale = 1.0 if trained is None else trained
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            *(prompt, negative_prompt, height, width, prompt_embeds, negative_prompt_embeds),
            callback_on_step_end_tensor_inputs,
        )
        self._check_size(num_frames, height, width)
        if window_frames is None and self.contract is not None:
            window_frames = self.contract.format["num_frames"]
        windows = self._plan_windows(num_frames, window_frames, window_overlap)
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
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt is {num_videos_per_prompt}: it must be at least 1")
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
        storage = device if len(windows) == 1 else torch.device("cpu")  # of what grows with the length
        if control_frames is not None:
            chunk_size = control_frames.shape[1] if len(windows) == 1 else self.dinov3.chunk_size
            control_features = torch.cat(
                [self.dinov3(frames.to(device)).to(storage, dtype) for frames in control_frames.split(chunk_size, 1)],
                dim=1,
            )
            control_features = control_features.expand(batch_size, *control_features.shape[1:])
            control_features = control_features.repeat_interleave(num_videos_per_prompt, 0)

        # 3. Start from noise.
        batch_size *= num_videos_per_prompt
        self.scheduler.set_timesteps(num_inference_steps, device=storage)
        self.scheduler.set_begin_index(0)
        if latents is None:
            # As for a video of one window, so that this is the noise at the start of longer videos too.
            latents = self.prepare_latents(
                batch_size,
                self.transformer.config.in_channels,
                height,
                width,
                min(num_frames, window_frames or num_frames),
                torch.float32,
                device,
                generator,
            )
            latents = extend_noise(latents, windows[-1].stop, generator)
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
        frames = latents if output_type == "latent" else self._decode(latents, output_type, len(windows) > 1)
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

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if the last call had text guidance: any scale but 1."""
        return self._guidance_scale != 1

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
        for pixel_values in stream_frames(self.vae, latents, self._execution_device):
            yield self.video_processor.postprocess_video(pixel_values, output_type)
        self.maybe_free_model_hooks()

    def _plan_windows(self, num_frames, window_frames, window_overlap):
        """Check the sizes of the windows and return them."""
        stride = self.vae_scale_factor_temporal
        for name, size in (("window_frames", window_frames), ("window_overlap", window_overlap)):
            if size is not None and (size < 1 or size % stride != 1):
                raise ValueError(f"{name} is {size}: it must be a multiple of {stride} plus 1")
        length = ((window_frames or num_frames) - 1) // stride + 1
        overlap = default_overlap(length) if window_overlap is None else (window_overlap - 1) // stride + 1
        if window_overlap is not None and window_overlap >= (window_frames or num_frames):
            raise ValueError(f"window_overlap is {window_overlap}: it must be below window_frames, {window_frames}")
        return plan_windows((num_frames - 1) // stride + 1, length, overlap)

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


def _flow_shift(scheduler):
    """Return a scheduler's shift of the noise levels, or None if it has none."""
    config = {} if scheduler is None else scheduler.config
    return next((config[name] for name in ("flow_shift", "shift") if name in config), None)


def _read_model_index(folder):
    """Return the list of a pipeline folder's parts, or None if it is the folder of a phase.

    Raises:
        InputError: it is damaged, or of another pipeline than Wan 2.1's text to video.
    """
    path = folder / MODEL_INDEX
    if not path.is_file():
        return None
    index = read_json(path)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise InputError(f"{path}: its pipeline is {name}; give one of Wan 2.1 text to video")
    if "transformer_2" not in _absent_parts(index) or index.get("boundary_ratio") or index.get("expand_timesteps"):
        raise InputError(f"{path}: this is a Wan 2.2 pipeline; give one of Wan 2.1 text to video")
    return index


def _absent_parts(index):
    """Return the parts that a pipeline folder does not have."""
    return [part for part in (*BASE_PARTS, "transformer_2") if index.get(part) in (None, [None, None])]


def _with_released_control(transformer, controlnet, torch_dtype):
    """Join a backbone and the released control weights, frozen."""
    if takes_control(transformer):
        raise InputError(
            f"controlnet={controlnet}: this model has control already; give a Wan 2.1 pipeline or phase 1"
        )
    return freeze(C2RTransformer(transformer, load_control_start(controlnet, transformer.config, torch_dtype)))


def _load_without_contract(folder, backbone, base, torch_dtype, loras):
    """Load the transformer of a pipeline folder without contract, with the ControlNet if there is one."""
    transformer = load_transformer(backbone, base, torch_dtype, loras=loras)
    if (folder / "controlnet").is_dir():
        transformer = C2RTransformer(transformer, load_controlnet(folder, torch_dtype))
    return freeze(transformer)
