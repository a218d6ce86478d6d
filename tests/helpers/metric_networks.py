"""Tiny random networks of the real classes that measures are made with, in folders as they are published."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    DPTImageProcessorPil,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    SwinConfig,
    VJEPA2Config,
    VJEPA2Model,
)

from tests.helpers.tiny import WORDS

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def save_processor(processor, folder):
    """Write a preprocessor_config.json that names the class as published ones do, without the suffix Pil."""
    processor.save_pretrained(folder)
    path = Path(folder) / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"image_processor_type": type(processor).__name__.removesuffix("Pil")}))


def save_dinov2(folder, side=56):
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL, image_size=side, patch_size=14)).save_pretrained(folder)
    preprocessor = IMAGENET | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return str(folder)


def save_vjepa2(folder, side=32):
    torch.manual_seed(0)
    config = VJEPA2Config(
        **SMALL,
        crop_size=side,
        frames_per_clip=16,
        mlp_ratio=2,
        pred_hidden_size=16,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    VJEPA2Model(config).save_pretrained(folder)
    return str(folder)


def save_clip(folder, side=28):
    """CLIP with 8 positions of text, and a tokenizer of the words of `tiny.WORDS` that adds a beginning and an end."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS, "<start>", "<end>"])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    ends = [(word, vocab[word]) for word in ("<start>", "<end>")]
    tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    ).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    save_processor(CLIPImageProcessorPil(**sizes), folder)
    torch.manual_seed(0)
    width = SMALL | {"intermediate_size": 32}
    tokens = {"vocab_size": len(vocab), "bos_token_id": vocab["<start>"], "eos_token_id": vocab["<end>"]}
    config = CLIPConfig(
        text_config=width | tokens | {"pad_token_id": 0, "max_position_embeddings": 8},
        vision_config=width | {"image_size": side, "patch_size": 14},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def save_depth_anything(folder, side=28, kind="relative"):
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    wide = {"initializer_range": 0.3}  # otherwise all frames have nearly the same depth
    backbone = Dinov2Config(**SMALL | layers | wide, image_size=side, patch_size=14)
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 6, 8, 10],
        fusion_hidden_size=8,
        head_hidden_size=4,
        **wide,
        depth_estimation_type=kind,
        max_depth=20,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    sizes = {"size": {"height": side, "width": side}, "keep_aspect_ratio": True, "ensure_multiple_of": 14}
    save_processor(DPTImageProcessorPil(**sizes, **IMAGENET), folder)
    return str(folder)


def save_segformer(folder, side=64, num_labels=5):
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=4,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=num_labels,
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    save_processor(SegformerImageProcessorPil(size={"height": side, "width": side}), folder)
    return str(folder)


def save_mask2former(folder, side=64, num_labels=5):
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=side,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,  # GroupNorm has 32 groups
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        num_labels=num_labels,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": side, "longest_edge": 2 * side}, "size_divisor": 32}
    save_processor(Mask2FormerImageProcessorPil(**sizes, num_labels=num_labels), folder)
    return str(folder)


def vgg16_features(seed=0):
    """The convolutions of torchvision's VGG16 with random weights, in its places, as torchvision.models.vgg16 has."""
    torch.manual_seed(seed)
    layers, width = [], 3
    for entry in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if entry == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(width, entry, 3, padding=1), nn.ReLU(inplace=False)]
            nn.init.kaiming_normal_(layers[-2].weight)
            width = entry
    return nn.Sequential(*layers)


def save_vgg16(folder, features=None):
    """Write what timm publishes: `features` and a classifier, which is small here."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = {f"features.{name}": tensor for name, tensor in (features or vgg16_features()).state_dict().items()}
    save_file(state | {"head.fc.weight": torch.zeros(2, 2)}, Path(folder) / "model.safetensors")
    return str(folder)
