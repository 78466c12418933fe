"""Qwen 2 VL against Transformers' class, with images and without."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import torch
import transformers
from checks import GRADIENTS, LOGITS, ParityChecks, load_theirs, make_ours, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from openbook.checkpoint.folder import load_model, save_model
from openbook.checkpoint.key_convert import to_hf
from openbook.checkpoint.key_maps import KEY_MAPS
from openbook.core.errors import UserError
from openbook.models.base import CausalModel
from openbook.models.config import RopeScaling
from openbook.models.configs.qwen2_vl import Qwen2VLConfig, VisionConfig
from openbook.models.context import CachedContext, DenseContext
from openbook.models.layers.vision import patch_places
from openbook.models.placed_images import PlacedImages
from openbook.models.registry import config_from_hf, config_to_hf
from openbook.ops.torch_ops import TorchOps

IMAGE, START, END = 60, 58, 59
VISION: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 2,
    "hidden_size": 32,
    "mlp_ratio": 2,
    "patch_size": 4,
}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "mrope_section": (1, 1, 2),
    "image_token_id": IMAGE,
    "video_token_id": 61,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
# Each sequence's text and images, an image as rows and columns of patches: single, wide and tall, several, tiny.
LAYOUTS: list[list[list[int] | tuple[int, int]]] = [
    [[3, 9], (4, 6), [7, 1, 5]],
    [[8], (2, 10), [2], (6, 2), [11, 4]],
    [(2, 2), (4, 4), [1]],
]


def shape(vision: dict[str, Any] | None = None, **fields: Any) -> Qwen2VLConfig:
    return Qwen2VLConfig(**{**SIZES, "vision_config": VisionConfig(**{**VISION, **(vision or {})}), **fields})


class Seen:
    """A sequence with images in both implementations' words."""

    def __init__(self, config: Qwen2VLConfig, layout: list[list[int] | tuple[int, int]], seed: int = 0) -> None:
        vision = config.vision_config
        generator = torch.Generator().manual_seed(seed)
        self.ids: list[int] = []
        self.patches: list[Tensor] = []
        self.grids: list[tuple[int, int]] = []
        for part in layout:
            if isinstance(part, list):
                self.ids += part
            else:
                self.ids += [START] + [IMAGE] * (part[0] * part[1] // vision.spatial_merge_size**2) + [END]
                self.patches.append(torch.randn(part[0] * part[1], vision.patch_dim, generator=generator))
                self.grids.append(part)

    def place(self, model: CausalModel) -> PlacedImages:
        return model.place_images([self.ids], [self.patches], [self.grids])

    def theirs(self) -> dict[str, Tensor]:
        ids = torch.tensor([self.ids])
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not self.grids:
            return text
        return {
            **text,
            "mm_token_type_ids": (ids == IMAGE).int(),
            "pixel_values": torch.cat(self.patches),
            "image_grid_thw": torch.tensor([[1, *grid] for grid in self.grids]),
        }


def place_all(model: CausalModel, rows: list[Seen]) -> PlacedImages:
    return model.place_images([row.ids for row in rows], [row.patches for row in rows], [row.grids for row in rows])


class TestQwen2VL(ParityChecks):
    AUTO_CLASS = transformers.AutoModelForImageTextToText
    CONFIGS: ClassVar = {
        "untied": shape(tie_word_embeddings=False, rope_theta=1e6),
        "tied": shape({"patch_size": 2, "in_channels": 1, "temporal_patch_size": 1, "rope_theta": 100.0}),
        "yarn-merge-1": shape(
            {"spatial_merge_size": 1},
            mrope_section=(2, 1, 1),
            rope_scaling=RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        ),
    }

    def reference_gradients(self, model: CausalModel, reference: Any) -> dict[str, Tensor]:
        prefixes = (("model.language_model.", "model."), ("model.visual.", "visual."))
        gradients = {}
        for name, parameter in reference.named_parameters():
            for inside, stored in prefixes:
                name = name.replace(inside, stored)
            gradients[name] = parameter.grad
        return gradients

    def test_gradients(self, pair: tuple[CausalModel, Any]) -> None:
        """Of text, of images, and of the weights that see."""
        model, reference = pair
        seen = Seen(model.config, LAYOUTS[1])
        labels = tokens(model.config, 1, len(seen.ids), seed=1)
        labels[0, :4] = -100
        targets = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], dim=1)
        logits = self.reference_logits(reference, seen)
        expected_loss = torch.nn.functional.cross_entropy(logits, targets[0], ignore_index=-100)
        expected_loss.backward()
        context = DenseContext(1, len(seen.ids), images=seen.place(model))
        trained = (targets.flatten() >= 0).nonzero().squeeze(1)
        loss = model.loss(torch.tensor([seen.ids]), targets, context, trained) / len(trained)
        loss.backward()
        torch.testing.assert_close(loss, expected_loss, **LOGITS)
        ours = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient is not None for gradient in ours.values())
        gradients = to_hf(ours, model.config, KEY_MAPS["qwen2_vl"])
        expected = self.reference_gradients(model, reference)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], **GRADIENTS, msg=lambda t, n=name: f"{n}: {t}")

    def test_gradients_of_text_alone(self, pair: tuple[CausalModel, Any]) -> None:
        model, reference = pair
        ids = tokens(model.config, 2, 9)
        logits = reference(ids).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()
        model.loss(ids, ids, DenseContext(2, 9)).backward()
        ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert ours.keys() == {name for name, _ in model.named_parameters() if not name.startswith("visual.")}
        torch.testing.assert_close(
            ours["model.embed_tokens.weight"], reference.get_input_embeddings().weight.grad, atol=1e-3, rtol=1e-4
        )

    @pytest.mark.parametrize("layout", LAYOUTS, ids=["one", "wide-and-tall", "neighbours"])
    def test_logits_with_images(self, pair: tuple[CausalModel, Any], layout: list[Any]) -> None:
        model, reference = pair
        seen = Seen(model.config, layout)
        expected = self.reference_logits(reference, seen)[None]
        context = DenseContext(1, len(seen.ids), images=seen.place(model))
        ids = torch.tensor([seen.ids])
        torch.testing.assert_close(model(ids, context), expected, **LOGITS)
        assert (model(ids, DenseContext(1, len(seen.ids))) - expected).abs().max() > 0.1  # the images matter

    def test_cached_decoding_after_images(self, pair: tuple[CausalModel, Any]) -> None:
        """A batch of unlike lengths, one sequence without an image; one leaves on the way."""
        model, reference = pair
        rows = [Seen(model.config, layout, seed) for seed, layout in enumerate([*LAYOUTS, [[5, 6, 7]]])]
        lengths = [len(row.ids) for row in rows]
        following = tokens(model.config, len(rows), 5, seed=4).clamp_max(START - 1)
        for row, more in zip(rows, following.tolist(), strict=True):
            row.ids += more
        expected = [self.reference_logits(reference, row) for row in rows]
        context = CachedContext(model.config, len(rows), capacity=64)
        with torch.inference_mode():
            context.images = place_all(model, rows)
            ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
            for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                ids[index, :length] = torch.tensor(row.ids[:length])
            context.append(lengths)
            prefill = model(ids, context)
            for logits, length, wanted in zip(prefill, lengths, expected, strict=True):
                torch.testing.assert_close(logits[:length], wanted[:length], **LOGITS)
            kept = [0, 2, 3]
            context.select(kept)
            for step in range(5):
                context.append([1] * len(kept))
                logits = model(following[kept, step][:, None], context)
                for place, index in enumerate(kept):
                    torch.testing.assert_close(logits[place, 0], expected[index][lengths[index] + step], **LOGITS)

    def test_a_prompt_with_images_in_pieces_equals_the_full_pass(self, pair: tuple[CausalModel, Any]) -> None:
        model, reference = pair
        seen = Seen(model.config, LAYOUTS[1])
        expected = self.reference_logits(reference, seen)
        context = CachedContext(model.config, batch=1, capacity=64)
        with torch.inference_mode():
            context.images = seen.place(model)
            for start in range(0, len(seen.ids), 3):
                piece = torch.tensor([seen.ids[start : start + 3]])
                context.append([piece.shape[1]])
                torch.testing.assert_close(model(piece, context)[0], expected[start : start + 3], **LOGITS)

    def reference_logits(self, reference: Any, seen: Seen) -> Tensor:
        reference.model.rope_deltas = None  # of an earlier call
        logits: Tensor = reference(**seen.theirs()).logits[0]
        return logits

    def test_greedy_decoding_after_images_equals_generate(self, pair: tuple[CausalModel, Any]) -> None:
        model, reference = pair
        seen = Seen(model.config, LAYOUTS[1])
        output = reference.generate(**seen.theirs(), max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected = output[0, len(seen.ids) :].tolist()
        context = CachedContext(model.config, batch=1, capacity=64)
        next_ids, generated = torch.tensor([seen.ids]), []
        with torch.inference_mode():
            context.images = seen.place(model)
            while len(generated) < 12:
                context.append([next_ids.shape[1]])
                next_ids = model(next_ids, context)[:, -1:].argmax(-1)
                generated.append(int(next_ids))
        assert generated[: len(expected)] == expected
        assert len(expected) > 1

    def test_both_spellings_of_names_are_read(self, config: Qwen2VLConfig, tmp_path: Path) -> None:
        model = make_ours(config)
        save_model(model, tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        assert {name.split(".")[0] for name in stored} <= {"model", "visual", "lm_head"}
        newer = {}
        for name, tensor in stored.items():
            name = name.replace("model.", "model.language_model.") if name.startswith("model.") else name
            newer[f"model.{name}" if name.startswith("visual.") else name] = tensor
        save_file(newer, tmp_path / "model.safetensors")
        loaded = load_model(tmp_path, TorchOps())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])
        load_theirs(tmp_path, self.AUTO_CLASS)


# config.json of Qwen/QVQ-72B-Preview, as published.
QVQ: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "image_token_id": 151655,
    "initializer_range": 0.02,
    "intermediate_size": 29568,
    "max_position_embeddings": 128000,
    "max_window_layers": 80,
    "model_type": "qwen2_vl",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {"hidden_size": 8192, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
    "vocab_size": 152064,
}


def test_the_published_configuration_is_read_as_transformers_reads_it() -> None:
    config = config_from_hf(QVQ, "config.json")
    assert isinstance(config, Qwen2VLConfig)
    assert config == config_from_hf(config_to_hf(config), "config.json")
    published, ours = (transformers.AutoConfig.for_model(**deepcopy(values)) for values in (QVQ, config_to_hf(config)))
    for part, without_effect in (
        ("text_config", {"dtype", "sliding_window", "max_window_layers"}),
        ("vision_config", {"dtype", "in_chans", "model_type", "spatial_patch_size"}),
    ):
        left, right = (getattr(values, part).to_dict() for values in (published, ours))
        for key in left.keys() - without_effect - {"transformers_version", "rope_parameters"}:
            assert left[key] == right[key], key
        left["rope_parameters"].pop("type", None)
        assert left["rope_parameters"] == right["rope_parameters"]
    assert (published.image_token_id, published.tie_word_embeddings) == (ours.image_token_id, ours.tie_word_embeddings)
    assert config.mrope_section == (16, 24, 24)
    assert (config.head_dim, config.rope_theta, config.sliding_window) == (128, 1e6, None)
    older = {**QVQ, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    assert config_from_hf(older, "config.json") == config


def test_tied_embeddings_are_read_where_older_versions_put_them() -> None:
    values = config_to_hf(shape())
    assert values["tie_word_embeddings"] is True
    moved = {**values, "text_config": {**values["text_config"], "tie_word_embeddings": True}}
    del moved["tie_word_embeddings"]
    assert config_from_hf(moved, "config.json") == shape()


def changed(path: str, value: Any) -> dict[str, Any]:
    values = msgspec.json.decode(msgspec.json.encode(config_to_hf(shape())))
    *outer, key = path.split(".")
    target = values
    for name in outer:
        target = target[name]
    target[key] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("vision_config.hidden_act", "gelu", "vision_config: hidden_act is 'gelu', only 'quick_gelu' is implemented"),
        ("vision_config.rope_parameters.rope_type", "default", "rope_type is 'default', only 'axial' is implemented"),
        ("vision_config.rope_parameters.factor", 2, "unknown key 'factor'"),
        ("vision_config.rope_parameters.rope_theta", 0, "vision_config: rope_theta is 0.0, expected more than 0"),
        ("tie_word_embeddings", "no", "tie_word_embeddings: expected `bool`, got `str`"),
        ("text_config.rope_parameters.mrope_section", [], "mrope_section: expected `array` of length 3, got 0"),
        ("vision_config.embed_dim", 20, "embed_dim 20 over num_heads 2 is not a multiple of 4"),
        ("vision_config.depth", 0, "vision_config: depth is 0, expected more than 0"),
        ("vision_config.patch_size", [4, 4], r"vision_config.patch_size: expected `int`, got `array`"),
        ("vision_config.spatial_patch_size", 5, "spatial_patch_size is 5 and patch_size 4, expected the same"),
        ("vision_config.hidden_size", 16, "hidden_size of vision_config is 16, expected the decoder's 32"),
        ("vision_config.fullatt_block_indexes", [1], "unknown key 'fullatt_block_indexes'"),
        ("vision_config", [1], r"vision_config is \[1\], expected an object"),
        ("text_config", 3, "text_config is 3, expected an object"),
        ("text_config.hidden_act", "gelu", "hidden_act is 'gelu', only 'silu' is implemented"),
        (
            "text_config.num_attention_heads",
            2,
            r"mrope_section is \[1, 1, 2\], expected three counts of pairs that add",
        ),
        ("text_config.rope_parameters.mrope_section", [4], r"mrope_section: expected `array` of length 3, got 1"),
        ("text_config.vocab_size", 40, "image_token_id is 60, expected less than vocab_size 40"),
        ("text_config.head_dim", 6, "head_dim 6 times num_attention_heads 4 is not hidden_size 32"),
    ],
)
def test_configurations_that_are_refused(path: str, value: Any, line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        config_from_hf(changed(path, value), "config.json")
    assert "\n" not in str(error.value)


def test_a_number_of_layers_that_cannot_be_is_refused_at_once() -> None:
    values = {**QVQ, "use_sliding_window": True, "num_hidden_layers": 2**62}
    with pytest.raises(UserError, match=r"num_hidden_layers is 4611686018427387904, expected more than 0"):
        config_from_hf(values, "config.json")


def test_patches_come_in_squares() -> None:
    expected = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert patch_places((2, 4), 2).tolist() == expected


def test_images_that_do_not_fit_the_prompt_are_refused() -> None:
    model = make_ours(shape())
    seen = Seen(model.config, LAYOUTS[0])
    with pytest.raises(UserError, match=r"^a prompt has 5 image tokens and its images make 6: expected one for each"):
        model.place_images([[3, *[IMAGE] * 5]], [seen.patches], [seen.grids])
