"""SmolLM2-135M-Instruct, the one real checkpoint that a package ships (GGUF, Q4_1), against Transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checks import load_theirs

import openbook
from openbook.checkpoint.convert import convert_model
from openbook.checkpoint.locate import locate

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.\n\nThen one about  the  sky 🌊.",
    "def fibonacci(n):\n    '''Return the n-th number.'''",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder in float32."""
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    assert convert_model(locate("smollm2"), out) == "float32"
    return out


def test_the_converted_folder_gives_the_same_logits_in_transformers(folder: Path) -> None:
    model = openbook.load("smollm2", profile="fast")  # weights expanded to float32, as in the folder
    reference = load_theirs(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        ids = model.prompt_ids(prompt)
        theirs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        assert ids == theirs
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits.numpy()
        np.testing.assert_allclose(model.logits([ids]), expected, atol=1e-4, rtol=1e-4)


def test_it_answers(folder: Path) -> None:
    assert "Paris" in openbook.load("smollm2").chat(PROMPTS[0], max_tokens=12).text
    answer = openbook.load("smollm2", profile="fast").chat(PROMPTS[0], max_tokens=12)
    assert openbook.load(folder).chat(PROMPTS[0], max_tokens=12).token_ids == answer.token_ids
