"""What the stages hand to the loop."""

import dataclasses

import numpy as np
import pytest
from conftest import SMALL

from adastate_jax.config.run import Config, DataConfig
from adastate_jax.config.stages import DistillConfig
from adastate_jax.models.patch_codec import PatchCodecConfig
from adastate_jax.models.text import TextConfig
from adastate_jax.sharding import make_mesh
from adastate_jax.training.stages import distill as distill_stage
from adastate_jax.training.stages.run import Run

TEXT = TextConfig(vocab_size=259, dim=12, dim_attention=8, ffn_dim=16, num_heads=2, num_layers=1, text_length=16)
CONFIG = Config(
    text=TEXT,
    codec=PatchCodecConfig(patch=8, channels=4),
    model=dataclasses.replace(SMALL, text_length=16),
    data=DataConfig(num_worlds=4),
    distill=DistillConfig(batch_size=2, critic_ratio=3),
)


@pytest.fixture
def read(monkeypatch, tmp_path):
    """How the distillation reads a step's batch, from eight prompts that are told apart by their letter."""
    found = {}
    monkeypatch.setattr(Run, "network", lambda *_: None)
    monkeypatch.setattr(
        Run, "run_stage", lambda run, name, create, step_function, read, steps, compiling, like: found.update(read=read)
    )
    nothing = dict.fromkeys(("clips", "captions", "critic_prompts", "frozen", "empty_text", "negative_text", "metrics"))
    distill_stage.distill(Run(CONFIG, tmp_path, make_mesh(), prompts=list("abcdefgh"), **nothing))
    return found["read"]


def test_student_and_critic_read_prompts_of_their_own(read):
    """One batch of prompts after another, whichever network they are for: an epoch shows every prompt once."""
    batches = [read(step) for step in range(3)]
    assert [list(batch) for batch in batches] == [["student", "critic"], ["critic"], ["critic"]]
    prompts = [chr(row[0]) for batch in batches for tokens in batch.values() for row in tokens["token_ids"] - 3]
    assert sorted(prompts) == list("abcdefgh")


def test_prompts_are_a_function_of_the_step(read):
    """So a run that is resumed reads what the run that was not interrupted reads."""
    for step in (6, 0, 7):
        first, again = read(step), read(step)
        assert first.keys() == again.keys()
        for network in first:
            np.testing.assert_array_equal(first[network]["token_ids"], again[network]["token_ids"])
    assert not np.array_equal(read(6)["student"]["token_ids"], read(6)["critic"]["token_ids"])
