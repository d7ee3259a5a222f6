"""Laws of the sequential builder: shards of bounded size that read back in the order of generation."""

import pathlib

import numpy as np

from adastate_jax.data import builder
from adastate_jax.data.batches import open_source, read_batch
from adastate_jax.data.worlds import WorldConfig, render_world, worlds


def test_examples_keep_their_order_across_shards(tmp_path, monkeypatch):
    config = WorldConfig(height=8, width=8, num_frames=8)
    monkeypatch.setattr(builder, "_SHARD_BYTES", 3 * (8 * 8 * 8 * 3 + 100))
    dataset = worlds(config, num_train=8, num_validation=1, seed=0)
    source = open_source(dataset, tmp_path, "train")
    shards = list(pathlib.Path(dataset(data_dir=tmp_path).data_dir).glob("worlds-train.array_record-*"))
    assert len(shards) == 3  # of three, three and two videos
    captions = read_batch(source, np.arange(8))["caption"]
    assert captions == [render_world(config, 0, index).caption for index in range(8)]
