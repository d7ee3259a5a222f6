"""What each of two or four processes does in `test_processes.py`: agreement, and checkpoints of all.

Arguments: a folder with checkpoints of `tree()`, all of which are loaded; and the name of one that is written.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from adastate_jax import distributed
from adastate_jax.errors import UserError


def tree(mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Arrays split over the processes, and whole on each."""
    weights, count = np.arange(96, dtype=np.float32).reshape(8, 12) / 7, np.int32(5)
    split, whole = jax.NamedSharding(mesh, jax.P("fsdp")), jax.NamedSharding(mesh, jax.P())
    columns = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    return {
        "split": jax.make_array_from_callback(weights.shape, split, lambda index: weights[index]),
        "other": jax.make_array_from_callback((12, 8), columns, lambda index: weights.T[index]),
        "whole": jax.make_array_from_callback((), whole, lambda _: count),
    }


def same(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> bool:
    """Whether this process holds the same parts of the same arrays, to the bit."""
    return a.keys() == b.keys() and all(
        len(x.addressable_shards) == len(y.addressable_shards)
        and all(
            one.index == two.index and np.asarray(one.data).tobytes() == np.asarray(two.data).tobytes()
            for one, two in zip(x.addressable_shards, y.addressable_shards, strict=True)
        )
        for x, y in ((a[name], b[name]) for name in a)
    )


def raising(error: Exception) -> Callable[[], None]:
    def function():
        raise error

    return function


def only_the_second_fails() -> None:
    with distributed.together():
        if distributed.index() == 1:
            raise UserError("of the second")


def error_of(function: Callable, *arguments) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(folder: Path, name: str) -> None:
    distributed.start()
    from adastate_jax.checkpoint import Checkpoints, load_tree, save_tree
    from adastate_jax.sharding import fetch, local_rows, make_mesh, shard_batch

    count, index = distributed.count(), distributed.index()
    assert (count, index) == (jax.process_count(), jax.process_index())
    mesh = make_mesh(fsdp=4)

    # agreement
    assert distributed.gather(index * 10) == [10 * other for other in range(count)]
    assert distributed.from_first(lambda: f"of {index}") == "of 0"
    assert error_of(distributed.from_first, raising(UserError("a.txt: damaged"))) == "UserError: a.txt: damaged"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error_of(distributed.from_first, raising(full)) == "OSError: [Errno 28] No space left on device"
    assert error_of(only_the_second_fails) == "UserError: of the second"

    # rows: each process reads its own, and the batch is that of one process
    rows = local_rows(8, mesh)
    assert rows.tolist() == list(range(8))[8 // count * index :][: 8 // count]
    assert fetch(shard_batch(rows.astype(np.float32), mesh)).tolist() == list(range(8))
    order = [0, 2, 1, 3] if count == 2 else [0, 1, 2, 3]
    across = make_mesh(data=2, model=2, devices=[jax.devices()[i] for i in order])  # `model` spans processes
    expected = list(range(8)) if count == 2 else [[0, 1, 2, 3], [4, 5, 6, 7]][index // 2]
    assert local_rows(8, across).tolist() == expected  # those that share an example read the same rows
    assert fetch(shard_batch(np.asarray(expected, np.float32), across)).tolist() == list(range(8))

    # checkpoints
    made = tree(mesh)
    for other in distributed.from_first(lambda: sorted(path.name for path in folder.iterdir())):
        assert same(load_tree(folder / other, made), made)
    save_tree(folder / name, made)
    assert same(load_tree(folder / name, made), made)
    save_tree(folder / name, made)  # in the place of the one before
    save_tree(folder / "own", {"a": np.float32(7 + index)})  # what each has for itself is saved as the first has it
    like = jax.ShapeDtypeStruct((), np.float32, sharding=made["whole"].sharding)
    assert np.asarray(load_tree(folder / "own", {"a": like})["a"]) == 7
    with Checkpoints(folder / "numbered", keep=1) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, made)
        checkpoints.wait()
        assert same(checkpoints.load(made), made)
    with distributed.alone():
        if index == 0:
            whole = jax.NamedSharding(make_mesh(devices=jax.local_devices()[:1]), jax.P())
            like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for name, x in made.items()}
            assert np.asarray(load_tree(folder / name, like)["whole"]) == 5
    distributed.gather("done")
    if index == 0:
        assert [path.name for path in (folder / "numbered").iterdir()] == ["4"]
        for other in ("numbered", "own"):
            shutil.rmtree(folder / other)
    print(f"process {index} is done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
