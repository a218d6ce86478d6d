"""Agreement of segments: of a segmentation model on the generated video, with the renderer's ids or another video."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import (
    Mask2FormerForUniversalSegmentation,
    MaskFormerForInstanceSegmentation,
    SegformerForSemanticSegmentation,
)

from c2r import InputError
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.metric import Against
from c2r.metrics.networks import CHUNK, load_image_processor, load_network, process

KINDS = {
    "mask2former": Mask2FormerForUniversalSegmentation,
    "maskformer": MaskFormerForInstanceSegmentation,
    "segformer": SegformerForSemanticSegmentation,
}
#: Regions smaller than this share of a frame are left out: 200 pixels at 480p.
MIN_AREA = 1 / 2000
#: Object ids of one frame, above which a pass was filtered or compressed, so that its edges are ids of their own.
MAX_IDS = 5000


@dataclass(frozen=True)
class Segments:
    """Segmentation of a video.

    Args:
        classes: (F, H, W) int16, the semantic class of each pixel; negative where there is none.
        instances: (F, H, W) int16, the object of each pixel, numbered within a frame; negative where there is none.
            A model that does not tell objects of one class apart has classes here.
    """

    classes: np.ndarray
    instances: np.ndarray


class SegmentationModel:
    """A network that segments frames: Mask2Former, MaskFormer or SegFormer.

    Args:
        name_or_path: a folder or hub name.
        device: where it runs.

    Raises:
        InputError: it cannot be loaded.
    """

    def __init__(self, name_or_path: str, device: torch.device | str):
        self.model, self.folder = load_network(name_or_path, KINDS, device)
        self.processor = load_image_processor(self.folder)

    @torch.no_grad()
    def __call__(self, video: torch.Tensor) -> Segments:
        """Segment (F, 3, H, W) floats in [0, 1]."""
        classes, instances = [], []
        for frames in video.split(CHUNK):
            inputs = process(self.processor, self.folder, frames)
            outputs = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})
            sizes = [tuple(video.shape[-2:])] * len(frames)
            semantic = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
            classes += [labels.cpu().numpy().astype(np.int16) for labels in semantic]
            if self.model.config.model_type == "segformer":
                instances = classes
                continue
            panoptic = self.processor.post_process_panoptic_segmentation(
                outputs, target_sizes=sizes, label_ids_to_fuse=set()
            )
            for frame in panoptic:
                labels = frame["segmentation"].cpu().numpy().astype(np.int16)
                # Pixels of rejected segments are 0 there, which is the number of no segment.
                accepted = [segment["id"] for segment in frame["segments_info"]]
                instances.append(np.where(np.isin(labels, accepted), labels, np.int16(-1)))
        return Segments(np.stack(classes), np.stack(instances))


class MaskMIoU:
    """Overlap of the generated video's segments with those of the truth, of the coarse video or of the renderer.

    `mask_miou` and `mask_miou_control` are `class_miou` of the model's classes of both videos; `mask_miou_passes` is
    `best_overlap` with the clip's `ids`, for which no model looks at another video.

    Args:
        segment: (F, 3, H, W) -> Segments, a `SegmentationModel`; share one `Remembering` among measures.
        against: the other side.
    """

    higher_is_better: bool | None = True
    unit = "IoU"
    bounds = (0.0, 1.0)

    def __init__(
        self, segment: Callable[[torch.Tensor], Segments], against: Literal["truth", "control", "passes"] = "truth"
    ):
        self.segment, self.against = segment, against
        self.name = "mask_miou" if against == "truth" else f"mask_miou_{against}"

    def __call__(self, clip: EvaluatedClip) -> float | None:
        if self.against == "passes":
            ids = ids_of(clip)
            return None if ids is None else best_overlap(self.segment(clip.video), ids)
        other = getattr(clip, self.against)
        return None if other is None else class_miou(self.segment(clip.video).classes, self.segment(other).classes)


class TrajectoryError:
    """Distance of objects of the generated video from the renderer's; `trajectory_error_passes`.

    Args:
        segment: (F, 3, H, W) -> Segments, a `SegmentationModel`; share one `Remembering` among measures.
    """

    name = "trajectory_error_passes"
    higher_is_better: bool | None = False
    against: Against = "passes"
    unit = "of the diagonal"
    bounds = (0.0, 1.0)

    def __init__(self, segment: Callable[[torch.Tensor], Segments]):
        self.segment = segment

    def __call__(self, clip: EvaluatedClip) -> float | None:
        ids = ids_of(clip)
        return None if ids is None else trajectory_error(self.segment(clip.video), ids)


def ids_of(clip: EvaluatedClip) -> np.ndarray | None:
    """Return the renderer's ids of a clip, (F, H, W) int32; None if there are none.

    Raises:
        InputError: a frame has more than MAX_IDS.
    """
    if clip.ids is None:
        return None
    ids = clip.ids.cpu().numpy()
    for number, frame in enumerate(ids):
        if (count := len(np.unique(frame))) > MAX_IDS:
            raise InputError(
                f"{clip.name}: its pass of object ids has {count} ids in frame {number}, more than {MAX_IDS}: it is "
                "antialiased or lossy; render ids without a filter, and keep them in a lossless file"
            )
    return ids


def class_miou(classes: np.ndarray, reference: np.ndarray) -> float | None:
    """Compute the mean intersection over union of classes, over all frames together.

    Args:
        classes, reference: (F, H, W) integers; negative: no class.

    Returns:
        mean over the classes that are in either, in [0, 1]; None if there are none.

    Source: mean IU of Long et al. 2015 (CVPR, arXiv 1411.4038), with the classes that occur in either.
    """
    count = max(int(classes.max()), int(reference.max())) + 1
    table = np.sum([_overlaps(one, other, count, count) for one, other in zip(classes, reference)], axis=0)
    both = table.diagonal()[:count]
    union = table.sum(1)[:count] + table.sum(0)[:count] - both
    return float((both[union > 0] / union[union > 0]).mean()) if union.any() else None


def best_overlap(segments: Segments, ids: np.ndarray) -> float | None:
    """Compute how well each region of the renderer is covered by one segment: no classes are needed.

    For each id of a frame, the largest IoU with a segment: a class, an instance, or a connected part of either, so
    that neither two houses of one class nor a person behind a lamp post is a fault.

    A model's own limits lower the value: compare with that of the true video, not with 1.

    Args:
        segments: of the generated video.
        ids: (F, H, W) integers, the renderer's; 0 is the background and is left out.

    Returns:
        mean over frames and ids of at least MIN_AREA of the frame, in [0, 1]; None if there are none.

    Source: best overlap of Pont-Tuset et al. 2017 (PAMI 39/1), also Arbeláez et al. 2011 (PAMI 33/5), eq. 1, with
    equal weights instead of areas.
    """
    values = [overlap for overlap, _ in _matches(segments, ids)]
    return float(np.mean(values)) if values else None


def trajectory_error(segments: Segments, ids: np.ndarray) -> float | None:
    """Compute the distance between the centroid of each region of the renderer and of the segment that matches it.

    The match is the one of `best_overlap`, in each frame. A region without any is off by the whole diagonal.

    Args:
        segments, ids: see `best_overlap`.

    Returns:
        mean over frames and ids as a share of the frame's diagonal, in [0, 1]; None if there are no ids.
    """
    values = [distance for _, distance in _matches(segments, ids)]
    return float(np.mean(values)) if values else None


def _matches(segments: Segments, ids: np.ndarray) -> Iterator[tuple[float, float]]:
    """Yield, for each frame and id, the IoU with the best segment and the distance to it over the diagonal."""
    diagonal = np.hypot(*ids.shape[1:])
    for classes, instances, frame in zip(segments.classes, segments.instances, ids):
        region, areas = _large_regions(frame)
        if (num_ids := len(areas)) == 0:
            continue
        maps = [classes, _parts(classes)]
        if not np.array_equal(classes, instances):
            maps += [instances, _parts(instances)]
        _, centres = _areas_and_centres(region, num_ids)
        overlap, distance = np.zeros(num_ids), np.ones(num_ids)
        for labels in maps:
            count = int(labels.max()) + 1
            if count == 0:
                continue
            common = _overlaps(region, labels, num_ids, count)[:-1, :-1]
            their_areas, their_centres = _areas_and_centres(labels, count)
            iou = common / np.maximum(areas[:, None] + their_areas - common, 1)
            best = iou.argmax(1)
            largest, off = iou.max(1), np.hypot(*(centres - their_centres[best]).T) / diagonal
            better = largest > overlap
            overlap[better], distance[better] = largest[better], off[better]
        yield from zip(overlap.tolist(), distance.tolist())


def _large_regions(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the regions of (H, W) ids that have MIN_AREA, from 0; −1 elsewhere. Return them and their areas, (n,).

    The others are left out before the table of overlaps is made: it has a row for each region.
    """
    names, region, areas = np.unique(ids, return_inverse=True, return_counts=True)  # ids may be any numbers
    counted = (names != 0) & (areas >= MIN_AREA * ids.size)
    numbers = np.where(counted, counted.cumsum() - 1, -1)
    return numbers[region.reshape(ids.shape)], areas[counted]


def _overlaps(first: np.ndarray, second: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the number of pixels with each pair of labels, (rows + 1, columns + 1); negative labels come last."""
    first, second = (np.where(x < 0, n, x).astype(np.int64) for x, n in ((first, rows), (second, columns)))
    pairs = np.bincount((first * (columns + 1) + second).ravel(), minlength=(rows + 1) * (columns + 1))
    return pairs.reshape(rows + 1, columns + 1)


def _parts(labels: np.ndarray) -> np.ndarray:
    """Number the connected parts of each label of (H, W) from 0; −1 where the label is negative."""
    import cv2

    parts, count = np.full(labels.shape, -1, np.int32), 0
    for label in np.unique(labels[labels >= 0]):
        total, numbers = cv2.connectedComponents((labels == label).astype(np.uint8))  # the rest is one of them
        parts[numbers > 0] = numbers[numbers > 0] - 1 + count
        count += total - 1
    return parts


def _areas_and_centres(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of each label of (H, W), (count,), and its mean row and column, (count, 2)."""
    places, inside = np.indices(labels.shape).reshape(2, -1), (labels >= 0).ravel()
    numbers = labels.ravel()[inside]
    areas = np.bincount(numbers, minlength=count)
    sums = [np.bincount(numbers, weights=axis[inside], minlength=count) for axis in places]
    return areas, np.stack(sums, -1) / np.maximum(areas, 1)[:, None]
