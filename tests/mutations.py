"""Faults of our own, each with the tests that should notice it. `python -m tests.mutate` plants them one by one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Args:
        name: what is wrong, in words with hyphens.
        file: the file that has the fault.
        old, new: the text of the file that is replaced, which occurs once in it, and the faulty text.
        tests: the test that should notice it, or a file of tests: an argument for pytest.
        remark: why no test notices the fault.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    remark: str = ""


PHASE1_STEP = "tests/training/test_reference_step.py::test_a_step_of_phase_1"
PHASE2_STEP = "tests/training/test_reference_step.py::test_a_step_of_phase_2"
RESUME = "tests/training/test_resume.py"
STEP = "tests/training/test_step.py"
SETUP = "tests/training/test_setup.py"
AUGMENTATION = "tests/training/test_augmentation.py"
GUARD = "tests/training/test_guard.py"
PROGRESS = "tests/training/test_progress.py"
OPTIMIZER = "tests/training/test_optimizer.py"
FLOW = "tests/test_flow_matching.py"
SAMPLER = "tests/test_sampler.py"
PIPELINE = "tests/test_pipeline.py"
PIPELINE_LORA = "tests/test_pipeline_lora.py"
EXPORT = "tests/test_export.py"
GENERATE = "tests/test_generate.py"
WINDOWS = "tests/test_windows.py"
AS_DIFFUSERS = "tests/test_pipeline_as_diffusers.py"
OPTIONS = "tests/test_options.py"
FILES = "tests/test_files.py"
ADAPTER = "tests/models/test_control_adapter.py"
CONTROLNET = "tests/models/test_controlnet.py"
CONTEXT_PARALLEL = "tests/models/test_context_parallel.py"
TRANSFORMER = "tests/models/test_transformer.py"
SWITCHES = "tests/models/test_switches.py"
OFFLOADING = "tests/models/test_offloading.py"
ADVERSARY = "tests/models/test_adversary.py"
DINOV3 = "tests/models/test_dinov3.py"
LORA = "tests/models/test_lora.py"
RELEASED = "tests/models/test_released.py"
WEIGHT_FORMS = "tests/models/test_weight_forms.py"
BUCKETS = "tests/data/test_buckets.py"
MANIFEST = "tests/data/test_manifest.py"
VIDEO = "tests/data/test_video.py"
CACHE = "tests/encoding/test_cache.py"
DATASET = "tests/encoding/test_dataset.py"
ENCODE = "tests/encoding/test_encode.py"
VALIDATION = "tests/evaluation/test_validation.py"
CONDITIONS = "tests/evaluation/test_conditions.py"
MONITOR = "tests/evaluation/test_monitor.py"
DISCRIMINANTS = "tests/evaluation/test_discriminants.py"
CONTROLLER = "tests/evaluation/test_ratio_controller.py"
CG_MEASURES = "tests/evaluation/test_cg_measures.py"
TOY = "tests/toy/test_toy.py"

SCRIPTS = [
    Mutation(
        "phase-1-ignores-the-loss-weights",
        "train_phase1.py",
        "losses = noisy.weights * flow_matching.velocity_loss(",
        "losses = flow_matching.velocity_loss(",
        PHASE1_STEP,
    ),
    Mutation(
        "phase-1-does-not-clip",
        "train_phase1.py",
        "clip_gradients(accelerator, state, args.max_grad_norm)",
        "clip_gradients(accelerator, state, 1e9)",
        PHASE1_STEP,
    ),
    Mutation(
        "phase-1-keeps-the-gradients-of-the-last-step",
        "train_phase1.py",
        "state.optimizer.zero_grad()",
        "pass",
        PHASE1_STEP,
    ),
    Mutation(
        "phase-1-does-not-update-the-average",
        "train_phase1.py",
        "step_ema(state.ema, trainable)",
        "step_ema(None, trainable)",
        f"{RESUME}::test_phase_1_averages_too",
    ),
    Mutation(
        "phase-1-steps-on-a-gradient-that-is-not-finite",
        "train_phase1.py",
        "if guard.may_step(grad_norm):",
        "if guard.may_step(grad_norm) or True:",
        "tests/training/test_faults.py::test_a_clip_of_nan_is_skipped_and_named_and_too_many_end_the_run",
    ),
    Mutation(
        "the-control-is-never-blank",
        "train_phase2.py",
        "control_features[noisy.dropped_control] = 0",
        "control_features[noisy.dropped_control] *= 1",
        PHASE2_STEP,
    ),
    Mutation(
        "phase-2-does-not-clip",
        "train_phase2.py",
        "clip_gradients(accelerator, state, args.max_grad_norm)",
        "clip_gradients(accelerator, state, 1e9)",
        PHASE2_STEP,
    ),
    Mutation(
        "training-ignores-the-conditioning-scale",
        "train_phase2.py",
        "state.model(*inputs, args.conditioning_scale, args.adversarial_weight * domains)",
        "state.model(*inputs, 1.0, args.adversarial_weight * domains)",
        PHASE2_STEP,
    ),
    Mutation(
        "the-gradient-of-real-samples-is-reversed",
        "train_phase2.py",
        "args.adversarial_weight * domains)",
        "args.adversarial_weight * (1 - domains))",
        PHASE2_STEP,
    ),
    Mutation(
        "the-weight-of-real-samples-is-ignored",
        "train_phase2.py",
        "domain_weights(domains, args.real_weight, progress.cg_ratio)",
        "domain_weights(domains, 1.0, progress.cg_ratio)",
        PHASE2_STEP,
    ),
    Mutation(
        "the-classifier-also-learns-from-samples-without-control",
        "train_phase2.py",
        "counted = ~noisy.dropped_control",
        "counted = noisy.dropped_control | True",
        PHASE2_STEP,
    ),
    Mutation(
        "the-classifiers-loss-is-left-out",
        "train_phase2.py",
        "loss = loss + domain_losses.mean()",
        "loss = loss + 0 * domain_losses.mean()",
        PHASE2_STEP,
    ),
    Mutation(
        "the-control-is-not-augmented",
        "train_phase2.py",
        'batch["domain"], args.control_augmentation, args.seed, draw)',
        'batch["domain"], 0.0, args.seed, draw)',
        PHASE2_STEP,
    ),
    Mutation(
        "the-two-scales-of-samples-change-places",
        "train_phase2.py",
        "        args.guidance_scale,\n        args.control_guidance_scale,\n",
        "        args.control_guidance_scale,\n        args.guidance_scale,\n",
        f"{RESUME}::test_samples_are_made_with_the_scales_of_the_options",
    ),
    Mutation(
        "phase-2-does-not-update-the-average",
        "train_phase2.py",
        "step_ema(state.ema, controlnet)",
        "step_ema(None, controlnet)",
        f"{RESUME}::test_the_average_is_that_of_the_formula",
    ),
    Mutation(
        "another-share-at-resume-is-ignored",
        "train_phase2.py",
        "sampler.set_cg_ratio(args.cg_ratio)",
        "pass",
        f"{RESUME}::test_another_share_at_resume_takes_effect",
    ),
    Mutation(
        "the-share-in-force-is-overwritten-at-resume",
        "train_phase2.py",
        "if progress.requested_cg_ratio != args.cg_ratio:",
        "if progress.cg_ratio != args.cg_ratio:",
        f"{RESUME}::test_a_resumed_run_restores_the_share_in_force_and_the_controllers_count",
    ),
    Mutation(
        "the-controllers-count-restarts-at-resume",
        "train_phase2.py",
        "controller.load_state_dict(progress.controller)",
        'controller.load_state_dict({"count": 0})',
        f"{RESUME}::test_a_resumed_run_restores_the_share_in_force_and_the_controllers_count",
    ),
    Mutation(
        "the-adversarys-accuracies-restart-at-resume",
        "train_phase2.py",
        "StepLog(accelerator, progress.logs, copies=copies)",
        "StepLog(accelerator, copies=copies)",
        f"{RESUME}::test_a_resumed_run_restores_the_adversarys_running_accuracies",
    ),
]

FLOW_MATCHING = [
    Mutation(
        "the-shift-goes-the-other-way",
        "c2r/flow_matching.py",
        "return shift * sigmas / (1 + (shift - 1) * sigmas)",
        "return sigmas / (shift - (shift - 1) * sigmas)",
        FLOW,
    ),
    Mutation(
        "data-and-noise-change-places",
        "c2r/flow_matching.py",
        "((1 - sigmas) * latents + sigmas * noise)",
        "(sigmas * latents + (1 - sigmas) * noise)",
        FLOW,
    ),
    Mutation(
        "the-velocity-has-the-other-sign",
        "c2r/flow_matching.py",
        "return _at_least_fp32(noise) - _at_least_fp32(latents)",
        "return _at_least_fp32(latents) - _at_least_fp32(noise)",
        FLOW,
    ),
    Mutation(
        "the-predicted-latents-go-away-from-the-data",
        "c2r/flow_matching.py",
        "_at_least_fp32(noisy_latents) - sigmas *",
        "_at_least_fp32(noisy_latents) + sigmas *",
        FLOW,
    ),
    Mutation(
        "the-loss-is-a-sum",
        "c2r/flow_matching.py",
        "return squared_error.flatten(1).mean(1)",
        "return squared_error.flatten(1).sum(1)",
        FLOW,
    ),
    Mutation(
        "the-lowest-sigma-is-set-after-the-shift",
        "c2r/flow_matching.py",
        "shift_sigmas(sigmas.clamp(MIN_SIGMA, 1), density.shift).float()",
        "shift_sigmas(sigmas, density.shift).clamp(MIN_SIGMA, 1).float()",
        FLOW,
    ),
    Mutation(
        "the-strata-are-not-shuffled",
        "c2r/flow_matching.py",
        "torch.randperm(count, generator=generator)",
        "torch.arange(count)",
        FLOW,
    ),
    Mutation(
        "the-first-sample-of-a-step-is-forgotten",
        "c2r/training/step.py",
        "sigmas[[number - draw.first_of_step for number in draw.numbers]]",
        "sigmas[[i for i, _ in enumerate(draw.numbers)]]",
        "tests/training/test_step.py",
    ),
    Mutation(
        "a-positive-logit-mean-gives-less-noise",
        "c2r/flow_matching.py",
        "torch.sigmoid(density.logit_mean + density.logit_std",
        "torch.sigmoid(-density.logit_mean + density.logit_std",
        FLOW,
    ),
]

THE_SAMPLER = [
    Mutation(
        "the-share-is-rounded-down",
        "c2r/sampler.py",
        "(2 * due + unit) // (2 * unit) > cg_drawn",
        "due // unit > cg_drawn",
        f"{SAMPLER}::test_the_share_is_never_more_than_half_a_sample_off",
    ),
    Mutation(
        "the-places-of-a-batch-are-not-shuffled",
        "c2r/sampler.py",
        'self._random("batch", start.emitted).shuffle(samples)',
        "pass",
        f"{SAMPLER}::test_cg_reaches_every_process_and_place_of_the_batch_equally",
    ),
    Mutation(
        "all-epochs-have-one-order",
        "c2r/sampler.py",
        "self._random(part.name, epoch).shuffle(order)",
        "self._random(part.name, 0).shuffle(order)",
        f"{SAMPLER}::test_epochs_have_different_orders",
    ),
    Mutation(
        "all-processes-take-the-first-slice",
        "c2r/sampler.py",
        "samples[self.process_index * batch_size : (self.process_index + 1) * batch_size]",
        "samples[:batch_size]",
        f"{SAMPLER}::test_processes_share_the_batch_of_one_process",
    ),
    Mutation(
        "the-samplers-state-loses-its-rounding",
        "c2r/sampler.py",
        'cg_due=Fraction(position["cg_due"])',
        "cg_due=Fraction(sum(position['drawn'][1:]))",
        f"{SAMPLER}::test_resume_at_any_step_gives_the_uninterrupted_batches",
    ),
    Mutation(
        "the-state-counts-batches-in-flight",
        "c2r/sampler.py",
        "        position = self._consumed\n        return {\n",
        "        position = self._drawn\n        return {\n",
        f"{SAMPLER}::test_share_and_state_count_only_consumed_batches",
    ),
    Mutation(
        "the-weights-of-datasets-are-ignored",
        "c2r/sampler.py",
        "self._parts[i].weight * total - ",
        "total - ",
        f"{SAMPLER}::test_weights_are_shares_independent_of_the_lengths",
    ),
]

THE_PIPELINE = [
    Mutation(
        "the-two-guidances-change-places",
        "c2r/guidance.py",
        "(control_guidance_scale - guidance_scale, predict_with_control)",
        "(guidance_scale - control_guidance_scale, predict_with_control)",
        "tests/test_guidance.py::test_predictions_of_weight_zero_are_skipped",
    ),
    Mutation(
        "the-momentum-starts-again-at-each-step",
        "c2r/pipeline.py",
        "            momentum_buffer,\n        )",
        "            momentum_buffer and MomentumBuffer(APG_MOMENTUM),\n        )",
        f"{PIPELINE}::test_apg_keeps_its_momentum_from_step_to_step",
    ),
    Mutation(
        "the-latents-are-in-the-weights-dtype",
        "c2r/pipeline.py",
        "latents.to(storage, torch.float32)",
        "latents.to(storage, dtype)",
        f"{PIPELINE}::test_half_precision_weights_give_finite_fp32_latents",
    ),
    Mutation(
        "guidance-compares-with-the-backbone-alone",
        "c2r/pipeline.py",
        "blank = torch.zeros_like(control)",
        "blank = None",
        f"{PIPELINE}::test_each_forward_pass_gets_its_conditions",
    ),
    Mutation(
        "the-control-ends-a-step-late",
        "c2r/guidance.py",
        "(step + 1) / num_steps <= end",
        "step / num_steps <= end",
        f"{PIPELINE}::test_control_is_on_in_its_part_of_the_steps_only",
    ),
    Mutation(
        "generation-ignores-the-conditioning-scale",
        "c2r/pipeline.py",
        "inputs += [control_features, conditioning_scale]",
        "inputs += [control_features, 1.0]",
        f"{PIPELINE}::test_each_forward_pass_gets_its_conditions",
    ),
    Mutation(
        "generate-ignores-the-shift-of-training",
        "c2r/generate.py",
        '(*DEFAULT_FORMAT, "flow_shift", "conditioning_scale")',
        '(*DEFAULT_FORMAT, "conditioning_scale")',
        f"{GENERATE}::test_options_not_given_are_those_of_training",
    ),
    Mutation(
        "generate-ignores-the-negative-prompt",
        "c2r/generate.py",
        '[args.negative_prompt or "", *args.prompt]',
        '["", *args.prompt]',
        f"{GENERATE}::test_each_sampling_option_reaches_the_video",
    ),
    Mutation(
        "generate-ignores-the-scale-of-the-control",
        "c2r/generate.py",
        "control_guidance_scale=args.control_guidance_scale,",
        "",
        f"{GENERATE}::test_each_sampling_option_reaches_the_video",
    ),
    Mutation(
        "generate-ignores-the-end-of-the-control",
        "c2r/generate.py",
        "control_guidance_end=args.control_guidance_end,",
        "",
        f"{GENERATE}::test_each_sampling_option_reaches_the_video",
    ),
    Mutation(
        "generate-ignores-the-seed",
        "c2r/generate.py",
        "manual_seed(args.seed)",
        "manual_seed(0)",
        f"{GENERATE}::test_seed_control_and_scales_determine_the_video",
    ),
    Mutation(
        "generate-writes-frames-that-are-not-finite",
        "c2r/generate.py",
        "if not np.isfinite(frames).all():",
        "if False:",
        f"{GENERATE}::test_a_video_that_is_not_finite_is_not_written",
    ),
]

TRAINING = [
    Mutation(
        "the-latents-vary-twice-as-much-in-logarithm",
        "c2r/training/step.py",
        "torch.exp(0.5 * logvar)",
        "torch.exp(logvar)",
        STEP,
    ),
    Mutation(
        "the-two-dropouts-drop-the-same-samples",
        "c2r/training/step.py",
        "control_draws < settings.control_dropout",
        "prompt_draws < settings.control_dropout",
        STEP,
    ),
    Mutation(
        "all-samples-have-one-noise",
        "c2r/training/step.py",
        'seeded_generator(settings.seed, "sample", number)',
        'seeded_generator(settings.seed, "sample", 0)',
        STEP,
    ),
    Mutation(
        "all-steps-have-the-same-noise-levels",
        "c2r/training/step.py",
        'seeded_generator(settings.seed, "sigmas", draw.first_of_step)',
        'seeded_generator(settings.seed, "sigmas", 0)',
        "tests/training/test_reference_step.py::test_a_step_of_phase_1",
    ),
    Mutation(
        "all-batches-have-the-same-numbers",
        "c2r/sampler.py",
        "range(start.emitted, start.emitted + needed)",
        "range(needed)",
        "tests/test_sampler.py",
    ),
    Mutation(
        "a-stored-range-begins-at-the-parameters-beginning",
        "c2r/training/shards.py",
        "stored[position - start : min(end, stop) - start]",
        "stored[: min(end, stop) - position]",
        "tests/training/test_shards.py",
    ),
    Mutation(
        "the-step-of-the-optimizer-restarts",
        "c2r/training/shards.py",
        'shards.whole(part, "step", like=torch.zeros((), device=part.held.device))',
        "torch.zeros((), device=part.held.device)",
        "tests/training/test_shards.py",
    ),
    Mutation(
        "the-weights-of-the-domains-change-places",
        "c2r/training/step.py",
        "masked_fill(domains == 1, 1 / mean)",
        "masked_fill(domains == 0, 1 / mean)",
        STEP,
    ),
    Mutation(
        "the-weighting-scheme-is-ignored",
        "c2r/training/step.py",
        "compute_loss_weighting_for_sd3(settings.density.weighting_scheme, sigmas)",
        'compute_loss_weighting_for_sd3("none", sigmas)',
        STEP,
    ),
    Mutation(
        "the-control-of-cg-pairs-is-augmented-too",
        "c2r/training/step.py",
        "if chosen and domain == 0 else frames",
        "if chosen else frames",
        AUGMENTATION,
    ),
    Mutation(
        "chunks-of-augmented-frames-change-places",
        "c2r/training/augmentation.py",
        "for chunk in frames.split(CHUNK_SIZE)]",
        "for chunk in reversed(frames.split(CHUNK_SIZE))]",
        AUGMENTATION,
    ),
    Mutation(
        "the-smoothest-square-is-the-roughest-one",
        "c2r/training/augmentation.py",
        "torch.where(variance < least, mean, best)",
        "torch.where(variance > least, mean, best)",
        AUGMENTATION,
    ),
    Mutation(
        "a-generator-ignores-its-last-value",
        "c2r/training/seeds.py",
        "repr(parts)",
        "repr(parts[:-1])",
        STEP,
    ),
    Mutation(
        "the-share-of-the-real-losses-is-that-of-cg",
        "c2r/training/logs.py",
        "losses[domains == 0].sum()",
        "losses[domains == 1].sum()",
        STEP,
    ),
    Mutation(
        "a-noise-level-on-a-bound-goes-into-the-bin-below",
        "c2r/training/logs.py",
        "torch.tensor(SIGMA_BINS[1:-1]), right=True)",
        "torch.tensor(SIGMA_BINS[1:-1]), right=False)",
        STEP,
    ),
    Mutation(
        "one-skipped-step-less-is-allowed",
        "c2r/training/guard.py",
        "self.progress.skipped_in_a_row > self.max_skipped_steps",
        "self.progress.skipped_in_a_row >= self.max_skipped_steps",
        GUARD,
    ),
    Mutation(
        "a-good-step-does-not-reset-the-count",
        "c2r/training/guard.py",
        "            self.progress.skipped_in_a_row = 0\n",
        "",
        GUARD,
    ),
    Mutation(
        "the-bound-of-a-spike-is-too-low",
        "c2r/training/guard.py",
        "SPREADS * max(1.4826 * deviation",
        "SPREADS * max(deviation",
        GUARD,
    ),
    Mutation(
        "the-time-embedder-runs-in-bf16",
        "c2r/training/precision.py",
        "torch.autocast(device.type, enabled=False)",
        "torch.autocast(device.type, torch.bfloat16)",
        SETUP,
    ),
    Mutation(
        "mixed-precision-is-ignored",
        "c2r/training/precision.py",
        'enabled = mixed_precision == "bf16"',
        "enabled = False",
        SETUP,
    ),
    Mutation(
        "the-highest-loss-is-the-best",
        "c2r/training/progress.py",
        'sign = -1 if criterion == "loss" else 1',
        "sign = 1",
        PROGRESS,
    ),
    Mutation(
        "losses-of-other-clips-are-compared",
        "c2r/training/progress.py",
        "self.best, self.metrics = {}, {}",
        "self.metrics = {}",
        PROGRESS,
    ),
    Mutation(
        "the-last-step-is-not-validated",
        "c2r/training/run.py",
        "return step % interval == 0 or step == self.args.max_train_steps",
        "return step % interval == 0",
        "tests/training/test_run.py",
    ),
    Mutation(
        "a-validation-that-was-cut-off-is-not-repeated",
        "c2r/training/run.py",
        "done = self.progress.validated_step == self.progress.global_step",
        "done = self.progress.validated_step is not None and self.progress.global_step == 0",
        "tests/training/test_run.py",
    ),
    Mutation(
        "batches-are-not-counted-as-consumed",
        "c2r/training/batches.py",
        "self._sampler.mark_consumed()",
        "[0] * self._sampler.batch_size",
        "tests/training/test_batches.py",
    ),
    Mutation(
        "a-warm-up-starts-at-zero",
        "c2r/training/optimizer.py",
        "return (steps_done + 1) / warmup",
        "return steps_done / warmup",
        f"{OPTIMIZER}::test_step_n_of_a_warm_up_of_w_has_rate_n_over_w",
    ),
    Mutation(
        "a-split-weight-is-cut-off-not-rounded",
        "c2r/training/optimizer.py",
        "return ((bits - low) >> 16)",
        "return (bits >> 16)",
        f"{OPTIMIZER}::test_splitting_a_weight_loses_no_bit",
    ),
    Mutation(
        "damaged-checkpoints-count-when-pruning",
        "c2r/training/checkpoint.py",
        "if find_damage(path) is None][-limit:]",
        "][-limit:]",
        "tests/training/test_faults.py::test_damaged_checkpoints_do_not_count_among_those_that_are_kept",
    ),
    Mutation(
        "the-average-restarts-at-resume",
        "c2r/training/checkpoint.py",
        "load_ema(files, state.ema, dict(state.trainable.named_parameters()))",
        "pass",
        "tests/training/test_resume.py::test_a_resumed_run_restores_the_average",
    ),
    Mutation(
        "the-averages-age-restarts-at-resume",
        "c2r/training/checkpoint.py",
        'state.ema.optimization_step = content["ema"]["optimization_step"]',
        "pass",
        f"{RESUME}::test_a_resumed_run_restores_the_average",
    ),
]

MODELS = [
    Mutation(
        "frames-are-summed-not-averaged",
        "c2r/models/control_adapter.py",
        "nn.init.constant_(self.conv.weight, 1 / self.conv.kernel_size[0])",
        "nn.init.constant_(self.conv.weight, 1)",
        ADAPTER,
    ),
    Mutation(
        "tokens-go-column-by-column",
        "c2r/models/control_adapter.py",
        '"b t h w d -> b (t h w) d"',
        '"b t h w d -> b (t w h) d"',
        ADAPTER,
    ),
    Mutation(
        "height-and-width-change-places-in-resampling",
        "c2r/models/control_adapter.py",
        "size=tuple(grid)",
        "size=tuple(grid[::-1])",
        ADAPTER,
    ),
    Mutation(
        "resampling-aligns-the-corners",
        "c2r/models/control_adapter.py",
        "align_corners=False",
        "align_corners=True",
        ADAPTER,
    ),
    Mutation(
        "the-adapters-norm-runs-in-the-weights-dtype",
        "c2r/models/control_adapter.py",
        "self.norm = FP32LayerNorm(feature_dim)",
        "self.norm = nn.LayerNorm(feature_dim)",
        ADAPTER,
    ),
    Mutation(
        "the-model-ignores-the-conditioning-scale",
        "c2r/models/transformer.py",
        "(conditioning_scale * residual).type_as",
        "residual.type_as",
        f"{TRANSFORMER}::test_residuals_are_added_after_their_blocks",
    ),
    Mutation(
        "residuals-follow-the-first-blocks-at-any-stride",
        "c2r/models/transformer.py",
        "dict(zip(self.controlnet.config.injection_layers, self.controlnet.control_blocks))",
        "dict(enumerate(self.controlnet.control_blocks))",
        f"{TRANSFORMER}::test_residuals_are_added_after_their_blocks",
    ),
    Mutation(
        "the-backbone-enters-training-mode",
        "c2r/models/transformer.py",
        "        self.transformer.eval()\n",
        "",
        f"{TRANSFORMER}::test_train_leaves_the_backbone_in_eval_mode",
    ),
    Mutation(
        "the-backbones-forward-is-called-without-its-hooks",
        "c2r/models/transformer.py",
        "(velocity_pred,) = self.transformer(\n",
        "(velocity_pred,) = type(self.transformer).forward(\n                self.transformer,\n",
        f"{SWITCHES}::test_sequential_offload_reaches_every_parameter",
    ),
    Mutation(
        "control-is-added-outside-of-a-cache",
        "c2r/models/transformer.py",
        "            HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, _STEERING_HOOK)\n",
        "",
        f"{SWITCHES}::test_a_cache_keeps_what_it_stands_for_with_control",
    ),
    Mutation(
        "passes-of-guidance-share-a-state",
        "c2r/models/transformer.py",
        "hook.state = _StateOfContext(hook.states)",
        "pass",
        f"{SWITCHES}::test_passes_of_guidance_do_not_mix",
    ),
    Mutation(
        "block-level-offloading-sees-no-blocks",
        "c2r/models/transformer.py",
        '_group_offload_block_modules = ["transformer", "controlnet", "control_adapter"]',
        "_group_offload_block_modules = []",
        f"{SWITCHES}::test_block_level_offload_holds_one_block_at_a_time",
    ),
    Mutation(
        "fused-projections-are-not-used",
        "c2r/models/attention.py",
        "query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)",
        "context = hidden_states if is_self_attention else encoder_hidden_states\n"
        "        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)",
        f"{SWITCHES}::test_fused_projections_change_nothing",
    ),
    Mutation(
        "gradients-of-shared-clips-are-averaged-over-their-parts",
        "c2r/models/context_parallel.py",
        "gradient * ctx.degree",
        "gradient",
        f"{CONTEXT_PARALLEL}::test_a_split_clip_has_the_prediction_and_gradients_of_a_whole_one",
    ),
    Mutation(
        "the-control-tokens-of-shared-clips-are-not-split",
        "c2r/models/context_parallel.py",
        "isinstance(module, C2RControlNet) and module.control_blocks",
        "False",
        f"{CONTEXT_PARALLEL}::test_a_split_clip_has_the_prediction_and_gradients_of_a_whole_one",
    ),
    Mutation(
        "evaluation-splits-the-tokens-of-different-clips",
        "c2r/models/context_parallel.py",
        "            processor.token_group = None\n",
        "            pass\n",
        f"{CONTEXT_PARALLEL}::test_evaluation_runs_whole_clips_that_differ_among_processes",
    ),
    Mutation(
        "a-failed-write-of-another-process-is-not-noticed",
        "c2r/training/background.py",
        "_FAILED in states or _WRITING not in states",
        "_WRITING not in states",
        "tests/training/test_background.py::test_several_processes_learn_of_a_failed_write_at_once_and_discard_theirs",
    ),
    Mutation(
        "a-checkpoint-shares-its-weights-with-the-run",
        "c2r/training/checkpoint.py",
        "copy=tensor.data_ptr() in own",
        "copy=False",
        "tests/training/test_background.py::test_a_checkpoint_holds_the_state_of_its_step_when_that_changes",
    ),
    Mutation(
        "a-save-does-not-wait-for-the-one-before",
        "c2r/training/checkpoint.py",
        "    run.finish_saving()\n    folder = ",
        "    folder = ",
        "tests/training/test_background.py::test_the_next_save_waits_for_the_one_before",
    ),
    Mutation(
        "processes-that-share-clips-draw-different-ones",
        "c2r/training/run.py",
        "self.accelerator.process_index // self.args.context_parallel_degree",
        "self.accelerator.process_index % self.num_groups",
        "tests/training/test_run.py::test_neighbours_that_share_clips_are_one_group",
    ),
    Mutation(
        "every-process-names-the-clips-that-it-shares",
        "c2r/training/guard.py",
        "own if self.names_clips else []",
        "own",
        "tests/training/test_guard.py::test_one_of_the_processes_with_the_same_clips_names_them",
    ),
    Mutation(
        "selective-checkpointing-computes-attention-again",
        "c2r/models/checkpointing.py",
        'options["context_fn"] = _attention_contexts',
        "pass",
        "tests/models/test_checkpointing.py::test_selective_computes_no_self_attention_again",
    ),
    Mutation(
        "inputs-of-blocks-stay-on-the-device",
        "c2r/models/checkpointing.py",
        "with nullcontext() if offloaded is None else offloaded.hooks():",
        "with nullcontext():",
        f"{OFFLOADING}::test_no_block_input_stays_on_the_device",
    ),
    Mutation(
        "the-backward-pass-fetches-blocks-as-the-forward-pass-does",
        "c2r/models/offloading.py",
        "down = 0 < index <= self._last",
        "down = False",
        f"{OFFLOADING}::test_the_block_that_runs_next_is_predicted",
    ),
    Mutation(
        "nothing-is-left-beside-the-text-encoder",
        "c2r/models/parts.py",
        "if free is not None and needed + TEXT_ENCODER_ROOM > free:",
        "if free is not None and needed > free:",
        "tests/models/test_parts.py",
    ),
    Mutation(
        "parts-that-run-again-use-the-stored-weights",
        "c2r/models/chunking.py",
        'ffn.forward = module.bind("ffn", ffn.forward)',
        "pass",
        f"{OFFLOADING}::test_a_stored_block_has_the_gradients_of_the_rounded_weights",
    ),
    Mutation(
        "parts-of-the-sequence-are-not-checkpointed",
        "c2r/models/chunking.py",
        "run_checkpointed(forward, part)",
        "forward(part)",
        "tests/models/test_chunking.py::test_a_part_keeps_its_input_alone",
    ),
    Mutation(
        "a-step-in-the-backward-pass-takes-gradients-that-are-not-finite",
        "c2r/training/backward_step.py",
        "if norm.isfinite():",
        "if True:",
        "tests/training/test_backward_step.py::test_the_weights_are_those_of_a_step_after_the_backward_pass",
    ),
    Mutation(
        "resumed-8-bit-states-are-not-read",
        "c2r/training/shards.py",
        "base.state[part.held][name] = shards.whole(part, name, like=value)",
        "pass",
        "tests/training/test_shards.py::test_8_bit_states_of_split_weights_are_those_of_whole_ones",
    ),
    Mutation(
        "the-projector-does-not-start-at-zero",
        "c2r/models/controlnet.py",
        "nn.init.zeros_(self.projector[2].weight)",
        "nn.init.normal_(self.projector[2].weight)",
        f"{CONTROLNET}::test_a_fresh_projector_gives_zero_from_a_nonzero_first_layer",
    ),
    Mutation(
        "the-last-control-block-is-missing",
        "c2r/models/controlnet.py",
        "range(0, last + 1, control_stride)",
        "range(0, max(last, 1), control_stride)",
        f"{CONTROLNET}::test_injection_layers_follow_stride_and_number",
    ),
    Mutation(
        "all-control-blocks-are-clones-of-one-block",
        "c2r/models/controlnet.py",
        "control_block.block.load_state_dict(whole_state_dict(block))",
        "control_block.block.load_state_dict(transformer.blocks[0].state_dict())",
        f"{CONTROLNET}::test_from_transformer_clones_the_first_blocks_in_fp32",
    ),
    Mutation(
        "the-gradient-is-not-reversed",
        "c2r/models/adversary.py",
        "-reversal_strength / OWN_GRADIENT_SCALE",
        "reversal_strength / OWN_GRADIENT_SCALE",
        f"{ADVERSARY}::test_the_latents_gradient_is_reversed_and_the_weights_is_scaled",
    ),
    Mutation(
        "the-classifiers-own-gradient-is-not-scaled",
        "c2r/models/adversary.py",
        "torch.full_like(domain_logits, OWN_GRADIENT_SCALE)",
        "torch.ones_like(domain_logits)",
        f"{ADVERSARY}::test_the_latents_gradient_is_reversed_and_the_weights_is_scaled",
    ),
    Mutation(
        "the-rarer-domain-has-the-smaller-weight",
        "c2r/models/adversary.py",
        "shares.masked_fill(domains == 1, max(cg_ratio, 0.01))",
        "shares.masked_fill(domains == 0, max(cg_ratio, 0.01))",
        f"{ADVERSARY}::test_both_domains_have_half_of_the_loss",
    ),
    Mutation(
        "the-classifiers-kernels-are-not-normalised",
        "c2r/models/adversary.py",
        "F.normalize(self.weight.flatten(1)).view_as(self.weight)",
        "self.weight",
        PHASE2_STEP,
    ),
    Mutation(
        "features-begin-with-the-class-token",
        "c2r/models/dinov3.py",
        "tokens[:, self.num_prefix_tokens :]",
        "tokens[:, : -self.num_prefix_tokens]",
        DINOV3,
    ),
    Mutation(
        "pixels-are-not-divided-by-their-deviation",
        "c2r/models/dinov3.py",
        "(channel - mean) / std for",
        "(channel - mean) for",
        DINOV3,
    ),
    Mutation(
        "dinov3-runs-under-the-autocast-around-it",
        "c2r/models/dinov3.py",
        "torch.autocast(control_frames.device.type, enabled=False)",
        "torch.autocast(control_frames.device.type)",
        DINOV3,
    ),
    Mutation(
        "the-variance-is-divided-once-by-the-deviation",
        "c2r/models/vae.py",
        "- 2 * latents_std.log()",
        "- latents_std.log()",
        f"{ENCODE}::test_encode_frames_normalises_each_channel",
    ),
    Mutation(
        "latents-are-shifted-before-they-are-scaled",
        "c2r/models/vae.py",
        "latents * latents_std + latents_mean",
        "(latents + latents_mean) * latents_std",
        f"{PIPELINE}::test_without_control_it_agrees_with_a_wan_pipeline",
    ),
    Mutation(
        "alpha-is-not-divided-by-the-rank",
        "c2r/models/lora_file.py",
        "float(self._file.tensor(change.alpha)) / self._shapes[change.down][0]",
        "float(self._file.tensor(change.alpha))",
        f"{LORA}::test_adds_every_layout_by_the_formula",
    ),
    Mutation(
        "the-bias-of-a-lora-has-another-factor",
        "c2r/models/lora_file.py",
        "factor = self._factor(self._changes[_weight_of(name)])",
        "factor = self.scale * self._alpha",
        f"{LORA}::test_alpha_scales_the_bias_of_lora_b_too",
    ),
    Mutation(
        "a-whole-difference-is-not-scaled",
        "c2r/models/lora_file.py",
        "self.scale * self._file.tensor(change.difference).double()",
        "self._file.tensor(change.difference).double()",
        f"{LORA}::test_step_distilled_files_change_norms_biases_and_modulations",
    ),
    Mutation(
        "a-new-lora-changes-the-output",
        "c2r/models/lora.py",
        'nn.init.zeros_(pair["lora_B"].weight)',
        'nn.init.ones_(pair["lora_B"].weight)',
        f"{LORA}::test_loads_what_it_has_saved",
    ),
    Mutation(
        "the-inner-lora-is-lost",
        "c2r/models/assembly.py",
        "[*map(LoraFile, below), *loras]",
        "[*map(LoraFile, below[-1:]), *loras]",
        f"{PIPELINE_LORA}::test_a_lora_over_a_lora_adds_both",
    ),
    Mutation(
        "a-lora-is-exported-into-any-backbone",
        "c2r/export.py",
        "fingerprint_transformer(args.model)",
        "pass",
        f"{PIPELINE_LORA}::test_the_export_compares_the_backbone_with_that_of_training",
    ),
    Mutation(
        "the-scales-of-float8-rows-are-applied-to-columns",
        "c2r/models/float8.py",
        "scale.float().reshape(-1, *[1] * (weight.ndim - 1))",
        "scale.float().reshape(*[1] * (weight.ndim - 1), -1)",
        f"{WEIGHT_FORMS}::test_a_scale_per_row_is_applied_to_rows",
    ),
    Mutation(
        "the-error-of-float8-is-that-of-the-largest-one",
        "c2r/models/float8.py",
        "distances.square().sum() / 12",
        "distances.square().sum() / 4",
        f"{WEIGHT_FORMS}::test_the_error_of_rounding_is_computed_from_the_rounded_values",
    ),
    Mutation(
        "a-float8-weight-without-its-scale-is-taken",
        "c2r/models/float8.py",
        ".square().mean().sqrt() > IMPOSSIBLE_WEIGHT",
        ".square().mean().sqrt() > 1e9",
        f"{WEIGHT_FORMS}::test_other_kinds_of_quantisation_are_refused",
    ),
    Mutation(
        "the-released-adapter-has-half-its-stride",
        "c2r/models/released.py",
        '"temporal_stride": size // 2,',
        '"temporal_stride": size // 4,',
        f"{RELEASED}::test_its_tokens_are_added_to_the_patch_embedded_latents",
    ),
    Mutation(
        "shapes-of-a-released-file-are-not-compared",
        "c2r/models/released.py",
        "if unfit or size % 2 == 0:",
        "if size % 2 == 0:",
        f"{RELEASED}::test_a_wrong_safetensors_file_is_refused_by_its_header",
    ),
    Mutation(
        "an-exported-weight-may-overflow",
        "c2r/models/original_layout.py",
        "if cast.dtype != tensor.dtype and not cast.isfinite().all():",
        "if False:",
        f"{EXPORT}::test_nothing_is_overwritten_or_left_half_written",
    ),
    Mutation(
        "a-name-without-an-original-one-is-dropped",
        "c2r/models/original_layout.py",
        "if unknown := set(names) - converted.keys():",
        "if unknown := set():",
        f"{EXPORT}::test_a_weight_without_an_original_name_is_an_error",
    ),
]

DATA = [
    Mutation(
        "the-first-latent-frame-is-not-counted",
        "c2r/data/buckets.py",
        "(self.num_frames - 1) // 4 + 1",
        "self.num_frames // 4",
        BUCKETS,
    ),
    Mutation(
        "sizes-divisible-by-8-are-accepted",
        "c2r/data/buckets.py",
        "if pixels < 16 or pixels % 16:",
        "if pixels < 16 or pixels % 8:",
        BUCKETS,
    ),
    Mutation(
        "windows-overlap-by-a-frame",
        "c2r/data/buckets.py",
        "(first + i * bucket.num_frames,",
        "(first + i * (bucket.num_frames - 1),",
        BUCKETS,
    ),
    Mutation(
        "a-real-clips-coarse-version-is-its-control",
        "c2r/data/clips.py",
        'return self.coarse_file if self.domain == "cg" else self.target_file',
        "return self.coarse_file or self.target_file",
        f"{DATASET}::test_a_real_clip_with_a_coarse_version_is_its_own_control",
    ),
    Mutation(
        "windows-start-at-frames-as-if-at-one-a-second",
        "c2r/data/clips.py",
        "start=first_frame * seconds / frames",
        "start=first_frame / seconds",
        f"{DATASET}::test_control_frames_come_from_the_same_window_as_the_latents",
    ),
    Mutation(
        "a-replaced-coarse-file-is-not-seen",
        "c2r/data/manifest.py",
        "{c.control_name, c.control_size, c.control_mtime_ns}",
        "{c.control_name}",
        f"{MANIFEST}::test_a_replaced_coarse_file_changes_the_fingerprint",
    ),
    Mutation(
        "pairs-of-different-length-are-kept",
        "c2r/data/windows.py",
        "max(fine.interval, coarse.interval) * Fraction(3, 2)",
        "max(fine.interval, coarse.interval) * Fraction(300, 2)",
        f"{MANIFEST}::test_cg_pairs_that_disagree_are_dropped",
    ),
    Mutation(
        "all-rows-but-a-few-are-held-out",
        "c2r/data/manifest.py",
        "return _hash_position(name) < fraction",
        "return _hash_position(name) > fraction",
        f"{MANIFEST}::test_held_out_names_grow_with_the_fraction_from_none_to_all",
    ),
    Mutation(
        "of-two-equally-near-frames-the-later-is-taken",
        "c2r/data/frame_times.py",
        "wanted[served] - before <= time - wanted[served]",
        "wanted[served] - before < time - wanted[served]",
        f"{VIDEO}::test_resampling_takes_the_nearest_frame",
    ),
    Mutation(
        "the-crop-is-at-the-top-left",
        "c2r/data/video.py",
        "(covering_height - h) // 2, (covering_width - w) // 2",
        "0, 0",
        f"{VIDEO}::test_the_crop_is_central_and_has_no_border",
    ),
    Mutation(
        "a-picture-is-flipped-along-the-wrong-axis",
        "c2r/data/video.py",
        "rgb = rgb[::-1] if flip_vertically",
        "rgb = rgb[:, ::-1] if flip_vertically",
        f"{VIDEO}::test_rotation_metadata_turns_the_video_upright",
    ),
]

ENCODING = [
    Mutation(
        "windows-of-a-file-share-a-cache-file",
        "c2r/encoding/cache.py",
        "clip.mtime_ns, clip.start, *clip.bucket, clip.text)",
        "clip.mtime_ns, *clip.bucket, clip.text)",
        CACHE,
    ),
    Mutation(
        "prompts-are-padded-at-their-beginning",
        "c2r/encoding/dataset.py",
        "(0, 0, 0, self.max_sequence_length - len(prompt_embeds))",
        "(0, 0, self.max_sequence_length - len(prompt_embeds), 0)",
        f"{DATASET}::test_prompts_are_padded_with_zeros",
    ),
    Mutation(
        "a-pairs-target-is-its-control",
        "c2r/encoding/dataset.py",
        "return read_frames(clip.control_file, clip, self.settings)",
        "return read_frames(clip.target_file, clip, self.settings)",
        f"{DATASET}::test_the_control_is_a_real_clips_own_video_or_a_pairs_coarse_one",
    ),
    Mutation(
        "the-filling-clips-come-first",
        "c2r/encoding/encoders.py",
        "torch.cat([frames, black])",
        "torch.cat([black, frames])",
        f"{ENCODE}::test_the_pipeline_decodes_cached_latents_to_the_vaes_video",
    ),
    Mutation(
        "a-damaged-cache-file-counts-as-complete",
        "c2r/encoding/cache.py",
        "if not is_complete(path, CLIP_TENSORS):",
        "if False:",
        f"{ENCODE}::test_a_damaged_cache_file_is_reported_and_encoded_again",
    ),
    Mutation(
        "a-file-is-renamed-before-it-is-on-the-disk",
        "c2r/files.py",
        "os.fsync(file.fileno())",
        "pass",
        FILES,
    ),
    Mutation(
        "a-folder-is-renamed-before-it-is-on-the-disk",
        "c2r/files.py",
        'for path in [*folder.rglob("*"), folder]:',
        "for path in [folder]:",
        FILES,
    ),
]

EVALUATION = [
    Mutation(
        "the-trained-weights-are-evaluated-not-the-average",
        "c2r/evaluation/evaluate_run.py",
        "averaged_weights(state.ema, state.trainable, state.model)",
        "averaged_weights(None, state.trainable, state.model)",
        f"{RESUME}::test_validation_and_samples_come_from_the_averaged_weights",
    ),
    Mutation(
        "the-model-is-evaluated-in-training-mode",
        "c2r/evaluation/evaluate_run.py",
        "state.model.eval()",
        "state.model.train()",
        f"{RESUME}::test_validation_and_samples_come_from_the_averaged_weights",
    ),
    Mutation(
        "all-samples-have-one-seed",
        "c2r/evaluation/samples.py",
        "manual_seed(number)",
        "manual_seed(0)",
        f"{RESUME}::test_the_number_of_a_sample_is_the_seed_of_its_noise",
    ),
    Mutation(
        "all-noise-levels-have-one-noise",
        "c2r/evaluation/validation.py",
        'seeded_generator("validation", name, quantile)',
        'seeded_generator("validation", name)',
        VALIDATION,
    ),
    Mutation(
        "the-domain-with-more-clips-weighs-more",
        "c2r/evaluation/validation.py",
        "table[rows].double().mean(0)",
        "table[rows].double().sum(0)",
        VALIDATION,
    ),
    Mutation(
        "the-leak-is-a-share-of-the-loss",
        "c2r/evaluation/validation.py",
        "(altered - own) / (other - own)",
        "(altered - own) / other",
        VALIDATION,
    ),
    Mutation(
        "the-coarse-version-is-the-clips-own-control",
        "c2r/evaluation/conditions.py",
        "branch.frames(dataset.coarse_frames, batch)",
        "branch.frames(dataset.control_frames, batch)",
        CONDITIONS,
    ),
    Mutation(
        "no-control-is-the-clips-own-control",
        "c2r/evaluation/conditions.py",
        "torch.zeros_like(own_control)",
        "own_control",
        CONDITIONS,
    ),
    Mutation(
        "the-other-prompt-is-the-clips-own-prompt",
        "c2r/evaluation/conditions.py",
        "branch.predictor(other_prompt, own_control)",
        "branch.predictor(own_prompt, own_control)",
        CONDITIONS,
    ),
    Mutation(
        "processes-have-different-numbers-of-passes",
        "c2r/evaluation/shares.py",
        "-(-count // accelerator.num_processes)",
        "count // accelerator.num_processes",
        VALIDATION,
    ),
    Mutation(
        "the-share-falls-below-its-minimum",
        "c2r/evaluation/ratio_controller.py",
        "max(cg_ratio / 2, self.cg_ratio_min)",
        "cg_ratio / 2",
        CONTROLLER,
    ),
    Mutation(
        "an-interval-around-the-bound-counts",
        "c2r/evaluation/ratio_controller.py",
        "elif look.low > self.bound:",
        "elif look.high > self.bound:",
        CONTROLLER,
    ),
    Mutation(
        "the-interval-has-confidence-80-percent",
        "c2r/evaluation/monitor.py",
        "tail = (1 - CONFIDENCE) / 2",
        "tail = 1 - CONFIDENCE",
        MONITOR,
    ),
    Mutation(
        "the-probe-is-placed-by-the-clips-of-its-fit",
        "c2r/evaluation/monitor.py",
        "rescale(fit(real, cg), *held_out) if fit is fit_probe else fit(real, cg)",
        "fit(real, cg)",
        MONITOR,
    ),
    Mutation(
        "a-samples-own-coarse-version-counts",
        "c2r/evaluation/monitor.py",
        "[file != own for file in self._coarse_files]",
        "[True for file in self._coarse_files]",
        MONITOR,
    ),
    Mutation(
        "the-discriminant-does-not-shrink",
        "c2r/evaluation/discriminants.py",
        "(difference - SHRINKAGE * error).clamp(min=0)",
        "difference.clamp(min=0)",
        DISCRIMINANTS,
    ),
    Mutation(
        "held-out-scores-come-from-a-fit-on-all-clips",
        "c2r/evaluation/discriminants.py",
        "scorer = fit(real[real_folds != fold], cg[cg_folds != fold])",
        "scorer = fit(real, cg)",
        DISCRIMINANTS,
    ),
    Mutation(
        "parallel-edges-look-less-like-cg",
        "c2r/evaluation/cg_measures.py",
        "share, -entropy]).mean(1)",
        "share, entropy]).mean(1)",
        f"{CG_MEASURES}::test_each_number_rises_with_its_kind_of_a_cg_look",
    ),
    Mutation(
        "even-light-looks-less-like-cg",
        "c2r/evaluation/cg_measures.py",
        "return -(torch.stack(values) + 1e-3).log()",
        "return (torch.stack(values) + 1e-3).log()",
        f"{CG_MEASURES}::test_each_number_rises_with_its_kind_of_a_cg_look",
    ),
]

COMMANDS = [
    Mutation(
        "the-config-wins-over-the-command-line",
        "c2r/cli.py",
        "typed = configured | {name: _typed(options[name], text) for name, text in given.items()}",
        "typed = {name: _typed(options[name], text) for name, text in given.items()} | configured",
        f"{OPTIONS}::test_command_line_wins_over_config_over_defaults",
    ),
    Mutation(
        "a-preset-wins-over-given-options",
        "c2r/cli.py",
        "| preset | typed",
        "| typed | preset",
        f"{OPTIONS}::test_given_options_win_over_a_preset",
    ),
    Mutation(
        "an-exclusive-bound-is-inclusive",
        "c2r/options/types.py",
        "self.above < value < self.below",
        "self.above <= value < self.below",
        f"{OPTIONS}::test_a_bad_value_is_answered_with_option_value_reason_and_remedy",
    ),
    Mutation(
        "a-share-of-cg-is-allowed-without-pairs",
        "c2r/options/training.py",
        "if args.cg_ratio > 0 and args.cg_dataset is None:",
        "if False:",
        f"{OPTIONS}::test_a_share_of_cg_needs_cg_pairs",
    ),
    Mutation(
        "an-adversary-is-allowed-with-one-domain",
        "c2r/options/training.py",
        "if args.adversarial_weight > 0 and not 0 < args.cg_ratio < 1:",
        "if args.adversarial_weight > 0 and not 0 <= args.cg_ratio <= 1:",
        "tests/test_commands.py::test_an_adversary_needs_both_domains",
    ),
]

THE_TOY = [
    Mutation(
        "capsules-stand-beside-their-walkers",
        "c2r/toy/city.py",
        "_segment_distance(u, v, (0, 0.16), (0, 0.83)) < 0.165",
        "_segment_distance(u, v, (0.3, 0.16), (0.3, 0.83)) < 0.165",
        f"{TOY}::test_the_three_looks_show_the_same_people",
    ),
    Mutation(
        "the-frame-rate-is-ignored",
        "c2r/toy/city.py",
        "/ np.float32(fps)",
        "/ np.float32(8)",
        f"{TOY}::test_people_move_and_frames_keep_their_time",
    ),
    Mutation(
        "a-correlation-depends-on-the-scale",
        "c2r/toy/layout.py",
        "(a.norm() * b.norm())",
        "(b.norm() * b.norm())",
        f"{TOY}::test_correlation_is_one_for_equal_maps_up_to_scale_and_offset",
    ),
    Mutation(
        "a-scene-counts-among-the-other-scenes",
        "c2r/toy/layout.py",
        "for j in range(len(table)) if i != j]",
        "for j in range(len(table))]",
        f"{TOY}::test_edges_correlate_most_within_their_own_scene",
    ),
]

LONG_VIDEOS_AND_FOLDERS = [
    Mutation(
        "a-window-fades-in-from-one",
        "c2r/windows.py",
        "torch.arange(self.overlap, dtype=torch.float32) / max(self.overlap, 1)",
        "(torch.arange(self.overlap, dtype=torch.float32) + 1) / max(self.overlap, 1)",
        f"{WINDOWS}::test_frames_before_the_first_fade_do_not_depend_on_what_follows",
    ),
    Mutation(
        "a-windows-control-starts-with-its-pixels",
        "c2r/windows.py",
        "slice(temporal_stride * self.start, ",
        "slice(max(temporal_stride * self.start - 3, 0), ",
        WINDOWS,
    ),
    Mutation(
        "the-last-window-fades-in-over-the-planned-overlap",
        "c2r/windows.py",
        "overlap=windows[-1].stop - (stop - length)))",
        "overlap=overlap))",
        WINDOWS,
    ),
    Mutation(
        "the-noise-of-a-video-depends-on-its-length",
        "c2r/pipeline.py",
        "frames = windows[0].frames(",
        "frames = windows[-1].frames(",
        WINDOWS,
    ),
    Mutation(
        "single-pictures-are-windows",
        "c2r/windows.py",
        "return num_frames if num_frames > 1 else None",
        "return num_frames",
        f"{GENERATE}::test_a_model_of_single_pictures_generates_a_video_in_one_window",
    ),
    Mutation(
        "latent-frames-are-decoded-without-those-before",
        "c2r/models/streaming.py",
        "feat_cache=vae._feat_map,",
        "feat_cache=[None] * len(vae._feat_map),",
        f"{WINDOWS}::test_streaming_decodes_bit_for_bit",
    ),
    Mutation(
        "a-stream-that-stops-early-keeps-the-vae",
        "c2r/pipeline.py",
        "        finally:  # also if the caller stops early\n            self",
        "        except ValueError:\n            self",
        f"{PIPELINE}::test_a_call_or_a_stream_that_ends_early_frees_the_hooks",
    ),
    Mutation(
        "a-relative-path-is-a-hub-name",
        "c2r/pipeline_folder.py",
        "return os.path.abspath(part) if is_local else part",
        "return part",
        f"{AS_DIFFUSERS}::test_a_relative_path_is_not_taken_for_a_hub_name",
    ),
    Mutation(
        "another-dinov3-keeps-the-losses",
        "c2r/pipeline_folder.py",
        '{"validation_loss": None, "metrics": {}}',
        "{}",
        f"{AS_DIFFUSERS}::test_nothing_of_replaced_parts_is_in_contract_and_card",
    ),
    Mutation(
        "the-shift-of-training-is-not-set",
        "c2r/pipeline_folder.py",
        '        components["scheduler"] = with_flow_shift(components["scheduler"], contract.flow_shift)\n',
        "        pass\n",
        f"{AS_DIFFUSERS}::test_a_phase_2_folder_loads_whole_and_as_trained",
    ),
    Mutation(
        "a-saved-pipeline-has-the-old-fingerprint",
        "c2r/pipeline_folder.py",
        '"backbone_sha256": sha256}',
        "}",
        f"{AS_DIFFUSERS}::test_a_moved_pipeline_folder_and_another_dtype_keep_their_fingerprint",
    ),
]

MUTATIONS = [
    *SCRIPTS,
    *FLOW_MATCHING,
    *THE_SAMPLER,
    *THE_PIPELINE,
    *LONG_VIDEOS_AND_FOLDERS,
    *TRAINING,
    *MODELS,
    *DATA,
    *ENCODING,
    *EVALUATION,
    *COMMANDS,
    *THE_TOY,
]
