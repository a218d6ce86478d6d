"""Features of the real classes, prepared as their own libraries prepare frames."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, Dinov2Model, VJEPA2Model

from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.features import FrameSimilarity, ImageFeatures, VideoFeatures, frame_similarity
from c2r.metrics.prompt import ClipSimilarity
from tests.helpers.metric_networks import IMAGENET


def pictures(video):
    return [Image.fromarray(np.rint(frame.permute(1, 2, 0).numpy() * 255).astype(np.uint8)) for frame in video]


def normalised(frames):
    mean, std = (torch.tensor(IMAGENET[name])[:, None, None] for name in ("image_mean", "image_std"))
    return (frames - mean) / std


@torch.no_grad()
def test_image_features_are_those_of_frames_resized_by_pillow(networks, clips):
    video = clips[0].video.repeat(3, 1, 1, 1)  # more than one chunk
    small = [np.asarray(picture.resize((56, 56), Image.BICUBIC)) for picture in pictures(video)]
    frames = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255
    expected = Dinov2Model.from_pretrained(networks["image_features"])(normalised(frames)).pooler_output
    features = ImageFeatures(networks["image_features"], "cpu")
    assert features.kind == "dinov2"
    torch.testing.assert_close(features(video), expected, atol=0.02, rtol=0.02)  # Pillow rounds to grey levels


def test_clip_gives_image_features_too(networks, clips):
    features = ImageFeatures(networks["clip"], "cpu")
    assert features.kind == "clip"
    assert features(clips[0].video).shape == (3, 12)


def test_frame_similarity_is_the_cosine_of_neighbours(networks, clips):
    features = torch.randn(5, 7, dtype=torch.float64)
    a, b = features[1:].numpy(), features[:-1].numpy()
    expected = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    assert frame_similarity(features) == pytest.approx(expected)
    assert frame_similarity(features[:1]) is None
    measure = FrameSimilarity(ImageFeatures(networks["image_features"], "cpu"))
    assert measure(EvaluatedClip("a", "", clips[0].video[:1].repeat(3, 1, 1, 1))) == pytest.approx(1, abs=1e-6)
    assert measure(clips[0]) < 1


@torch.no_grad()
def test_video_feature_is_the_mean_of_all_windows(networks):
    model, features = (
        VJEPA2Model.from_pretrained(networks["video_features"]),
        VideoFeatures(networks["video_features"], "cpu"),
    )
    video = torch.rand(21, 3, 32, 32)

    def patches(window):
        return model(pixel_values_videos=normalised(window)[None], skip_predictor=True).last_hidden_state[0]

    torch.testing.assert_close(features(video[:8]), patches(video[:8]).mean(0, keepdim=True))
    expected = torch.cat([patches(video[:16]), patches(video[16:20])]).mean(0, keepdim=True)
    torch.testing.assert_close(features(video), expected)
    torch.testing.assert_close(features(video[:1]), features(video[:1].repeat(2, 1, 1, 1)))


@torch.no_grad()
def test_clip_similarity_is_that_of_its_own_preparation(networks, clips):
    folder, clip = networks["clip"], clips[0]
    model, processor = CLIPModel.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    measure = ClipSimilarity(folder, "cpu")
    pixels = processor(images=pictures(clip.video), return_tensors="pt")["pixel_values"]
    tokens = measure.tokenizer([clip.prompt], return_tensors="pt")
    out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    expected = (out.image_embeds @ out.text_embeds.T).mean().item()
    assert measure(clip) == pytest.approx(expected, abs=0.01)
    words = clip.prompt.split()
    assert tokens["input_ids"].shape == (1, len(words) + 2)


def test_a_prompt_longer_than_clip_reads_is_cut(networks, clips):
    measure = ClipSimilarity(networks["clip"], "cpu")
    values = [measure(EvaluatedClip("a", " ".join(["street"] * n), clips[0].video)) for n in (5, 6, 60)]
    assert values[0] != values[1] == values[2]


def test_an_empty_prompt_has_no_similarity(networks, clips):
    measure = ClipSimilarity(networks["clip"], "cpu")
    assert measure(EvaluatedClip("a", " ", clips[0].video)) is None
