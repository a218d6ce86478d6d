"""A tiny random image-text-to-text model of a real class, with a processor that takes chats."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)

#: Words that the model can answer with.
WORDS = [f"word{i}" for i in range(40)]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def save_tiny_caption_model(folder, chat_template=CHAT_TEMPLATE):
    """Write a LLaVA folder of width 16 with random weights; returns the folder."""
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<image>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_resize=True
    )
    processor = LlavaProcessor(
        image_processor,
        fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    processor.save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=28, patch_size=14),
        text_config=LlamaConfig(**small, vocab_size=len(vocab), pad_token_id=0, eos_token_id=1, bos_token_id=None),
        image_token_index=vocab["<image>"],
        image_seq_length=4,
    )
    set_seed(3)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder
