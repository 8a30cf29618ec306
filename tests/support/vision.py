"""Tiny models that see images, with random weights, and records whose answers are to be seen and not to be read."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image

from common.models import embedded
from tests.support.architectures import TEMPLATE

MARK = "<image>"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {
    "vocab_size": 2056,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEES = SIZES | {"image_size": 28, "patch_size": 7}
SHOWN = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# As LLaVA's own writes it: what is said is a list of parts, and images stand before words.
PARTS = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}" + MARK + "\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}
QUESTION = "Which colour is it?"


def tokenizer(marks: tuple[str, ...] = (MARK,), template: str = TEMPLATE) -> Any:
    """The embedded model's, with marks of images beside its words."""
    found = hf.AutoTokenizer.from_pretrained(embedded.unpack())
    found.add_special_tokens({"additional_special_tokens": list(marks)})
    found.chat_template = template
    return found


def save_llava(
    folder: Path, template: str = TEMPLATE, mark: str = MARK, tower: Mapping[str, Any] | None = None
) -> Path:
    """A LLaVA as its makers would save it: CLIP's tower, a projector, a Llama; an image is 16 tokens."""
    torch.manual_seed(0)
    words, sees = tokenizer((mark,), template), hf.CLIPVisionConfig(**SEES | dict(tower or {}))
    see = {"vision_config": sees, "text_config": hf.LlamaConfig(**TEXT), "image_token_id": 2048}
    hf.LlavaForConditionalGeneration(hf.LlavaConfig(**see)).save_pretrained(folder)
    sizes = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    sizes["image_token"] = mark
    hf.LlavaProcessor(hf.CLIPImageProcessorPil(**SHOWN), words, **sizes, chat_template=template).save_pretrained(folder)
    return folder


def save_llava_next(folder: Path) -> Path:
    """A LLaVA-NeXT: an image is cut into tiles, as many as its shape asks for."""
    torch.manual_seed(0)
    see = {"vision_config": hf.CLIPVisionConfig(**SEES), "text_config": hf.LlamaConfig(**TEXT), "image_token_id": 2048}
    config = hf.LlavaNextConfig(**see, image_grid_pinpoints=PINPOINTS)
    hf.LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    shown = hf.LlavaNextImageProcessorPil(**SHOWN, image_grid_pinpoints=PINPOINTS)
    hf.LlavaNextProcessor(shown, tokenizer(), **sizes, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def save_qwen2_vl(folder: Path) -> Path:
    """A Qwen2-VL: tokens as an image's size asks for, and positions in three directions."""
    torch.manual_seed(0)
    words = tokenizer(QWEN)
    start, end, image, video = words.convert_tokens_to_ids(list(QWEN))
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    see = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 7, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=see,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    hf.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    shown = hf.Qwen2VLImageProcessorPil(patch_size=7, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    films = hf.Qwen2VLVideoProcessor(patch_size=7)
    hf.Qwen2VLProcessor(shown, words, films, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def save_records(folder: Path, number: int, **fields: Any) -> Path:
    """So many records about images of several sizes, beside them in ``images``; the answer is their colour alone."""
    draw = random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    file = folder / "seen.jsonl"
    with file.open("w") as opened:
        for place in range(number):
            colour = list(COLOURS)[place % 2]
            size = draw.choice([(40, 30), (30, 50), (64, 64)])
            paint(folder / f"images/{place}.png", COLOURS[colour], size, draw)
            opened.write(json.dumps(record(f"images/{place}.png", colour) | fields) + "\n")
    return file


def record(image: Any, answer: str) -> Mapping[str, Any]:
    return {"image": image, "instruction": QUESTION, "output": answer}


def paint(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 30), draw: Any = random) -> None:
    """An image of one colour, a little lighter or darker from one to the next."""
    shade = draw.randint(-25, 25)
    Image.new("RGB", size, tuple(part + shade for part in colour)).save(file)
