"""Made-up facts of a release, and a ledger to go with them."""

from __future__ import annotations

import math

import pytest

from openbook.release.facts import ReleaseFacts, Score, StageFacts, TaskFacts, TrainingFacts, Transcript
from openbook.train.ledger import Entry


@pytest.fixture
def facts() -> ReleaseFacts:
    stages = tuple(
        StageFacts(
            name=name,
            steps=1500,
            trained_tokens=3_000_000,
            lr=0.01,
            final_loss=0.0625,
            documents=20_000,
            tokens=2_345_678,
            padding_share=0.0123,
            tasks={"gcd": 12_000, "ab": 8_000},
            licenses={"Apache-2.0": 20_000},
            generators=("reasoning-gym 0.1.25",),
            refused=3,
            manifest_sha256="cd" * 32,
        )
        for name in ("first", "second")
    )
    scores = tuple(
        Score(
            task=task,
            difficulty=difficulty,
            effort="medium",
            seed=500_000_000,
            samples=100,
            accuracy=accuracy,
            low=max(0.0, accuracy - 0.04),
            high=min(1.0, accuracy + 0.03),
            mean_score=accuracy,
            mean_tokens=41.5,
        )
        for difficulty, task, accuracy in (
            ("easy", "gcd", 0.975),
            ("easy", "ab", 1.0),
            ("hard", "gcd", 0.5),
            ("hard", "ab", 0.0),
        )
    )
    transcript = Transcript(
        task="gcd",
        difficulty="easy",
        effort="medium",
        seed=500_000_000,
        problem="GCD of <12> & 18?",
        thinking="18 = 1 * 12 + 6\n12 = 2 * 6 + 0",
        answer="6",
        score=1.0,
    )
    return ReleaseFacts(
        name="pico",
        description="A made-up model | for tests.",
        license="Apache-2.0",
        recipe_sha256="ab" * 32,
        weights_sha256="ef" * 32,
        num_parameters=1_234_567,
        model={
            "model_type": "qwen3",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 1024,
            "max_position_embeddings": 2048,
        },
        row_tokens=512,
        tasks=(
            TaskFacts(name="gcd", summary="the greatest | common divisor", documents=24_000),
            TaskFacts(name="ab", summary="rewrite a program of A::B", documents=16_000),
        ),
        stages=stages,
        scores=scores,
        training=TrainingFacts(
            profile="fast",
            precision="float32",
            optimizer="muon",
            device="cpu",
            is_compiled=True,
            machine="A processor, 2 cores",
            threads=2,
            isa="",
            num_trainers=1,
            seconds=1234.0,
            versions={"torch": "2.13.0"},
        ),
        transcripts=(transcript, transcript),
    )


@pytest.fixture
def entries() -> list[Entry]:
    return [
        Entry(
            step=step,
            stage="first" if step < 1500 else "second",
            batch="0123456789abcdef",
            lr=0.01 * min(1.0, (step + 1) / 100),
            loss=3 * math.exp(-step / 400) + 0.01 * (1 + step % 7),
            grad_norm=1.0 + (step % 13) / 10,
            tokens=2000,
        )
        for step in range(3000)
    ]
