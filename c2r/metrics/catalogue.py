"""The measures by name. Imports nothing heavy, so that a command can offer the names before it has loaded torch."""

from dataclasses import dataclass

#: Networks that measures need, each named by a folder or hub name, with a typical one.
ROLES = {
    "lpips": "a VGG16 of timm, such as timm/vgg16.tv_in1k",
    "depth": "a depth model of transformers, such as depth-anything/Depth-Anything-V2-Small-hf",
    "segmentation": "a segmentation model of transformers, such as facebook/mask2former-swin-tiny-coco-panoptic",
    "image_features": "an image encoder of transformers, such as facebook/dinov2-large",
    "video_features": "a V-JEPA 2 of transformers, such as facebook/vjepa2-vitl-fpc64-256",
    "clip": "a CLIP of transformers, such as openai/clip-vit-large-patch14",
    "quality": "the name of a measure of pyiqa, such as musiq",
}

#: Packages that measures need beyond those of c2r itself, each with what to do where it is missing.
PACKAGES = {
    "cv2": "pip install opencv-python-headless==5.0.0.93",
    "torchmetrics": "pip install torchmetrics==1.9.0",
    "pyiqa": "pip install pyiqa, which needs the torchvision of the installed torch",
}


@dataclass(frozen=True)
class Measure:
    """One measure, as `make_metrics` makes it.

    Args:
        name: of the measure. Results of `fd`, `kd`, `kd_video` and `quality` are named by their network, too, as
            `fd_dinov2`, `kd_vjepa2` or `quality_musiq`.
        role: the network that it needs, of `ROLES`; None if it needs none.
        packages: those of `PACKAGES` that it needs.
        of_set: a distance between sets of videos, not a measure of one clip.
    """

    name: str
    role: str | None = None
    packages: tuple[str, ...] = ()
    of_set: bool = False


#: All measures. A bare name is measured against the true video, `_control` against the coarse one, `_passes` against
#: the renderer's ids or depth.
MEASURES = (
    Measure("edge_f1", None, ("cv2",)),
    Measure("edge_f1_control", None, ("cv2",)),
    Measure("blur_ssim", None, ("torchmetrics",)),
    Measure("blur_ssim_control", None, ("torchmetrics",)),
    Measure("lpips", "lpips", ("torchmetrics",)),
    Measure("depth_rmse", "depth"),
    Measure("depth_rmse_control", "depth"),
    Measure("depth_rmse_passes", "depth"),
    Measure("mask_miou", "segmentation", ("cv2",)),
    Measure("mask_miou_control", "segmentation", ("cv2",)),
    Measure("mask_miou_passes", "segmentation", ("cv2",)),
    Measure("trajectory_error_passes", "segmentation", ("cv2",)),
    Measure("warp_error", None, ("cv2",)),
    Measure("frame_similarity", "image_features"),
    Measure("clip_similarity", "clip"),
    Measure("quality", "quality", ("pyiqa",)),
    Measure("fd", "image_features", of_set=True),
    Measure("kd", "image_features", of_set=True),
    Measure("kd_video", "video_features", of_set=True),
)

#: The question that a measure answers, by the start of its name.
QUESTIONS = {
    "edge_f1": "are outlines where they should be, within one pixel?",
    "blur_ssim": "are large light and dark areas where they should be?",
    "lpips": "how far are the frames from the true ones for the eye, layout and look together?",
    "depth_rmse": "is the depth of the scene right? 1: no better than a flat wall",
    "mask_miou": "do the areas of each class agree?",
    "mask_miou_passes": "is each object of the renderer one segment of the video?",
    "trajectory_error": "how far are objects from where the renderer has them, as a share of the diagonal?",
    "warp_error": "how much does it flicker? A still video has 0",
    "frame_similarity": "do neighbouring frames show the same things? A still video has 1",
    "clip_similarity": "do the frames show what the prompt says?",
    "quality": "how good do the frames look, without any reference?",
    "fd": "how far are the frames, as a set, from the true ones? Biased upwards with few clips",
    "kd": "how far are the frames, or whole videos, as a set, from the true ones? Without bias",
    "cg_look": "is the look that of the training's real clips (0) or of its CG clips (1)?",
}


def question_of(name: str) -> str:
    """Return the question that a result answers.

    Args:
        name: of a measure, also with that of its network, such as fd_dinov2.
    """
    return QUESTIONS[max((start for start in QUESTIONS if f"{name}_".startswith(f"{start}_")), key=len)]
