"""A tiny model that sees, and pictures to show it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tokenizers

from openbook.checkpoint.folder import save_model
from openbook.models.base import init_weights
from openbook.models.configs.qwen2_vl import Qwen2VLConfig, VisionConfig
from openbook.models.registry import build_model
from openbook.ops.torch_ops import TorchOps
from openbook.tokenizer.chat import Chat
from openbook.tokenizer.tokenizer import Tokenizer

# In the manner of Qwen 2 VL: content is a text, or parts of which some are images.
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image_url' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CONTROL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PROCESSOR = {
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 256,
    "max_pixels": 2048,
    "image_processor_type": "Qwen2VLImageProcessor",
}


@pytest.fixture(scope="session")
def seer_folder(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Named `seer`: Qwen 2 VL with random weights, its tokenizer, template and processor; do not change it."""
    folder = tmp_path_factory.mktemp("models") / "seer"
    definition = tokenizers.Tokenizer.from_str(tiny_tokenizer.definition)
    definition.add_special_tokens(list(CONTROL))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    tokenizer = Tokenizer(definition.to_str(), config)
    Chat(tokenizer, TEMPLATE).save(folder)
    ids = tokenizer.control_tokens
    model = build_model(
        Qwen2VLConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=200,
            tie_word_embeddings=False,
            initializer_range=0.3,
            mrope_section=(1, 1, 2),
            vision_config=VisionConfig(depth=2, embed_dim=24, num_heads=2, hidden_size=32, mlp_ratio=2, patch_size=4),
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        ),
        TorchOps(),
    )
    init_weights(model, 2)
    save_model(model, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A wide, a tall and a tiny one."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for index, (height, width) in enumerate([(19, 70), (101, 33), (3, 2)]):
        paths.append(folder / f"{index}.png")
        PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths
