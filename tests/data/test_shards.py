"""Laws of data sets made shard by shard: what was interrupted ends as what was not, and damage is found."""

import json
import random

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_full_disks import refused

from adastate_jax.data.batches import read_examples
from adastate_jax.data.shards import Plan, open_data_set, shard_lengths, write_data_set
from adastate_jax.errors import UserError

COUNT = 11


def features(dtype=ml_dtypes.bfloat16):
    return tfds.features.FeaturesDict(
        {
            "prompt": tfds.features.Text(),
            "embedding": tfds.features.Tensor(shape=(None, 6), dtype=dtype, encoding="bytes"),
        }
    )


def plan(origin=3, shards=(4, 4, 3)):
    return Plan("embeddings", features(), {"seed": origin}, {"train": shards, "other": (1,)}, {"names.jsonl": "{}\n"})


def example(split, number):
    rng = np.random.default_rng((number, split == "train"))
    bits = rng.integers(0, 2**16, (1 + number, 6), dtype=np.uint16)  # NaN of all kinds among them
    return {"prompt": f"é {number}", "embedding": bits.view(ml_dtypes.bfloat16)}


def make(split, first, count):
    return (example(split, number) for number in range(first, first + count))


def write(folder, plan=plan(), make=make, kept=lambda count: None):  # noqa: B008
    return write_data_set(folder, plan, make, 0, kept)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_read_is_what_was_written_to_the_bit(tmp_path):
    assert write(tmp_path / "a")
    data_set = open_data_set(tmp_path / "a", "embeddings")
    assert data_set.manifest["seed"] == 3
    assert {split: len(source) for split, source in data_set.splits.items()} == {"train": COUNT, "other": 1}
    order = [7, 0, 10, 3]
    for number, found in zip(order, read_examples(data_set.splits["train"], order), strict=True):
        wanted = example("train", number)
        assert found["prompt"].decode() == wanted["prompt"]
        assert found["embedding"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found["embedding"].view(np.uint16), wanted["embedding"].view(np.uint16))


def test_an_interrupted_data_set_goes_on_and_ends_with_the_same_bytes(tmp_path):
    write(tmp_path / "whole")
    made = []
    for stop in range(COUNT + 1):

        def interrupted(split, first, count, stop=stop):
            for number in range(first, first + count):
                if number == stop or (split == "other" and stop == COUNT):
                    raise KeyboardInterrupt
                made.append(number)
                yield example(split, number)

        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "a", make=interrupted)
        assert not (tmp_path / "a").exists()
    kept = []
    write(tmp_path / "a", kept=kept.append)
    assert kept == [4, 4, 3]
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")
    assert max(map(made.count, range(4))) == 4  # shards that were whole were not made again
    assert not list(tmp_path.glob("*incomplete"))
    assert not write(tmp_path / "a")  # it is there


def test_other_input_does_not_go_on(tmp_path):
    def stopped(split, first, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", make=stopped)
    with pytest.raises(UserError, match=r"a\.incomplete: was made with other input \(seed is 3 there, now it is 4\)"):
        write(tmp_path / "a", plan(origin=4))
    write(tmp_path / "a")
    with pytest.raises(UserError, match=r"a: was made with other input \(shards is "):
        write(tmp_path / "a", plan(shards=(6, 5)))


def test_two_processes_do_not_write_one_data_set(tmp_path):
    def another(split, first, count):
        with pytest.raises(UserError, match=r"incomplete: another process is at work there"):
            write(tmp_path / "a")
        return make(split, first, count)

    assert write(tmp_path / "a", make=another)


def test_a_full_disk_leaves_whole_shards_and_with_room_all_goes_on(tmp_path):
    write(tmp_path / "whole")
    limits = [limit for limit in (0, 60, 400, 5000, 100_000) if refused(lambda: write(tmp_path / "a"), limit)]
    assert len(limits) == 5
    write(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")
    with pytest.raises(UserError, match=r"b\.incomplete: needs 1e\+09 GB, .* GB are free there"):
        write_data_set(tmp_path / "b", plan(), make, 10**18, lambda count: None)


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [remove, cut])
def test_a_file_that_is_missing_or_cut_is_named_when_the_data_set_is_opened(tmp_path, damage):
    write(tmp_path / "a")
    for name in contents(tmp_path / "a"):
        before = (tmp_path / "a" / name).read_bytes()
        damage(tmp_path / "a" / name)
        with pytest.raises(UserError, match=r"^.*/a(/[\w.-]+)?: (missing|damaged|is no data set)"):
            open_data_set(tmp_path / "a", "embeddings")
        (tmp_path / "a" / name).write_bytes(before)
    open_data_set(tmp_path / "a", "embeddings")


def test_no_changed_bit_is_read(tmp_path):
    """Every example is read as it was written, or refused by name."""
    write(tmp_path / "a")
    (shard, *_) = sorted((tmp_path / "a").glob("*train*"))
    before, rng, refusals = shard.read_bytes(), random.Random(0), 0
    used = [position for position, byte in enumerate(before) if byte]
    for position in rng.sample(used, 60):
        changed = bytearray(before)
        changed[position] ^= 1 << rng.randrange(8)
        shard.write_bytes(changed)
        source = open_data_set(tmp_path / "a", "embeddings").splits["train"]
        for number in range(4):
            try:
                (found,) = read_examples(source, [number])
            except UserError as error:
                refusals += str(tmp_path / "a") in str(error)
            else:
                wanted = example("train", number)["embedding"]
                np.testing.assert_array_equal(found["embedding"].view(np.uint16), wanted.view(np.uint16))
    assert refusals > 20


def test_what_is_no_complete_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a: no such folder; make it with python -m adastate_jax\.embed"):
        open_data_set(tmp_path / "a", "embeddings")
    (tmp_path / "a.incomplete").mkdir()
    with pytest.raises(UserError, match="a: is not complete"):
        open_data_set(tmp_path / "a", "embeddings")
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"b: is no data set that python -m adastate_jax\.encode wrote"):
        open_data_set(tmp_path / "b", "latents")
    write(tmp_path / "c")
    with pytest.raises(UserError, match="c: holds 'embeddings', not latents"):
        open_data_set(tmp_path / "c", "latents")


def test_shards_take_as_much_as_fits():
    assert shard_lengths([3, 3, 3, 9, 1, 1], 6) == [2, 1, 1, 2]
    assert shard_lengths([], 6) == []
    sizes = np.random.default_rng(0).integers(1, 50, 200).tolist()
    lengths = shard_lengths(sizes, 100)
    assert sum(lengths) == 200
    ends = np.cumsum(lengths)
    assert all(sum(sizes[end - length : end]) <= 100 for end, length in zip(ends, lengths, strict=True))


def test_a_manifest_is_what_its_seal_lists(tmp_path):
    write(tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seed": 9}))
    with pytest.raises(UserError, match="damaged"):
        open_data_set(tmp_path / "a", "embeddings")
