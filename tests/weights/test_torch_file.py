"""Files of `torch.save`, read without PyTorch: all that a state dict holds, and nothing that is not one."""

import os
import struct
import tracemalloc
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from torch_files import Raw, Tensor, Writer, name, save, tensors

from adastate_jax.errors import UserError
from adastate_jax.weights.tensors import StoredTensor
from adastate_jax.weights.torch_file import load_torch_file

RNG = np.random.default_rng(0)
CRC32 = zlib.crc32


def refusal(path):
    with pytest.raises(UserError) as caught:
        load_torch_file(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_tensors_of_all_dtypes_come_back(tmp_path, dtype):
    array = (RNG.standard_normal((3, 5)) * 50).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    content = load_torch_file(save(tmp_path / "x.pt", tensors({"a": array, "b": array[0]})))
    assert list(content) == ["a", "b"]
    assert content["a"].dtype == array.dtype
    assert np.array_equal(content["a"].read(), array)
    assert np.array_equal(content["b"].read(), array[0])


def test_strides_offsets_and_shared_storages(tmp_path):
    base = np.arange(60, dtype=np.float32)
    value = {
        "transposed": Tensor(base, (3, 4), (1, 3), key="0"),
        "part": Tensor(base, (2, 3), (20, 2), 7, key="0"),
        "scalar": Tensor(base, (), (), 59, key="0"),
        "empty": Tensor(base, (0, 4), (4, 1), key="0"),
    }
    content = load_torch_file(save(tmp_path / "x.pt", value))
    assert np.array_equal(content["transposed"].read(), base[:12].reshape(4, 3).T)
    assert np.array_equal(content["part"].read(), np.stack([base[7:13:2], base[27:33:2]]))
    assert content["scalar"].read() == 59
    assert content["empty"].read().shape == (0, 4)
    assert np.array_equal(content["part"].rows(1, 2), base[None, 27:33:2])
    assert np.array_equal(content["transposed"][-1:].read(), base[None, 2:12:3])


def test_plain_values_and_nesting(tmp_path):
    parameter = name("torch._utils", "_rebuild_parameter")
    tensor = Writer()
    inner = tensor._tensor(Tensor(np.ones(2, np.float32)))
    size = Raw(name("torch", "Size") + b"(K\x02K\x03t\x85R")
    value = {
        "step": 7,
        "rate": 0.5,
        "big": 2**62,
        "none": None,
        "flag": True,
        "words": ["a", ("b", -1)],
        "size": size,
        "parameter": Raw(parameter + b"(" + inner + b"\x89NtR"),
        3: {"x": Tensor(np.zeros(2, np.float32), key="0")},
    }
    content = load_torch_file(save(tmp_path / "x.pt", value))
    assert isinstance(content["parameter"], StoredTensor)
    assert isinstance(content[3]["x"], StoredTensor)
    del content["parameter"], content[3]
    assert content == {
        "step": 7,
        "rate": 0.5,
        "big": 2**62,
        "none": None,
        "flag": True,
        "words": ["a", ("b", -1)],
        "size": (2, 3),
    }


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    path = save(tmp_path / "x.pt", tensors({"a": np.ones(4, np.float32)}))
    tensor = load_torch_file(path)["a"]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        tensor.read()


# What a hostile pickle would run leaves a mark in the environment.
MARK = "ADASTATE_HOSTILE"
PAYLOAD = b"X" + struct.pack("<I", 28) + b"os.environ['%s']='1' #" % MARK.encode()
PAYLOAD = b"X" + struct.pack("<I", len(PAYLOAD) - 5) + PAYLOAD[5:]


@pytest.mark.parametrize(
    ("code", "culprit"),
    [
        (name("builtins", "exec") + PAYLOAD + b"\x85R", "builtins.exec"),
        (name("builtins", "eval") + PAYLOAD + b"\x85R", "builtins.eval"),
        (name("os", "system") + b"X\x04\x00\x00\x00true\x85R", "os.system"),
        (name("torch", "load") + b"X\x01\x00\x00\x00x\x85R", "torch.load"),
        (name("torch._utils", "_rebuild_qtensor") + b")R", "_rebuild_qtensor"),
        (name("collections", "OrderedDict.__reduce__") + b")R", "OrderedDict.__reduce__"),
        (name("numpy.core.multiarray", "scalar") + b")R", "numpy.core.multiarray.scalar"),
        (name("torch.distributed.tensor", "DTensor") + b")\x81", "DTensor"),
        (b"X\x08\x00\x00\x00builtinsX\x04\x00\x00\x00exec\x93" + PAYLOAD + b"\x85R", "builtins.exec"),
        (b"(" + PAYLOAD + b"ibuiltins\nexec\n", "INST"),
        (b"(" + name("collections", "OrderedDict") + b"o", "OBJ"),
        (name("collections", "OrderedDict") + b")\x81", "NEWOBJ"),
        (b"\x82\x01", "EXT1"),
        (b"Pabc\n", "PERSID"),
        (name("collections", "OrderedDict") + b"}b", "changes an object"),
        (b"]}b", "changes an object"),
        (name("torch", "float32") + b")R", "unknown arguments"),
        (b"X\x01\x00\x00\x00a)R", "no known function"),
        (name("collections", "OrderedDict") + b"(K\x01tR", "unknown arguments"),
        (b"})K\x01s", "key of type tuple"),
        (b"X\x01\x00\x00\x00aQ", "no tensor storage"),
    ],
)
def test_hostile_pickles_are_refused_and_not_run(tmp_path, code, culprit):
    path = save(tmp_path / "x.pt", {"weight": Raw(code)})
    message = refusal(path)
    assert culprit in message
    assert "nothing in the file was executed" in message
    assert MARK not in os.environ


def test_a_bomb_of_references_is_harmless(tmp_path):
    # Each level is a pair of the level below, twice the same: 2^60 empty lists for whoever looks at all of them.
    laughs = b"]" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    size = name("torch", "Size") + laughs + b"\x85R"
    assert "no natural number" in refusal(save(tmp_path / "x.pt", {"size": Raw(size)}))
    assert "without a name" in refusal(save(tmp_path / "x.pt", {"x": Raw(laughs + laughs + b"\x93")}))


def test_a_list_is_not_copied_for_each_of_its_names(tmp_path):
    # One list of 10⁴ zeros, and 10⁴ times six bytes that would copy it.
    zeros = b"](" + b"K\x00" * 10_000 + b"e\x85q\x01"
    copies = name("torch", "Size") + b"q\x020(" + b"h\x02h\x01R" * 10_000 + b"l"
    path = save(tmp_path / "x.pt", {"sizes": Raw(zeros + b"0" + copies)})
    tracemalloc.start()
    try:
        assert "10000 axes" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 50 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_no_tensor_has_more_axes_than_numpy_had(tmp_path):
    most = Tensor(ARRAY, (1,) * 32, (1,) * 32)
    assert load_torch_file(save(tmp_path / "x.pt", {"weight": most}))["weight"].read().shape == (1,) * 32
    # Multiplying these takes seconds and showing them megabytes, and a file has room for a hundred times as many.
    huge = [2**61] * 30_000
    for shape in ((1,) * 33, huge, tuple(huge)):
        message = refusal(save(tmp_path / "x.pt", {"weight": Tensor(ARRAY, shape, shape)}))
        assert f"{len(shape)} axes" in message
        assert len(message) < 300


def test_a_large_index_is_refused_unread(tmp_path):
    assert "are allowed" in refusal(save(tmp_path / "x.pt", {"x": Raw(b"]0" * (1 << 23) + b"N")}))


ARRAY = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize(
    ("tensor", "culprit"),
    [
        (Tensor(ARRAY, (3, 5), (5, 1)), "does not fit"),
        (Tensor(ARRAY, (3, 4), (4, 1), 1), "does not fit"),
        (Tensor(ARRAY, (2,), (12,)), "does not fit"),
        (Tensor(ARRAY, (2**40, 2**20), (0, 0)), "does not fit"),
        (Tensor(ARRAY, (3, -4), (4, 1)), "no natural number"),
        (Tensor(ARRAY, (3, 4), (-4, 1)), "no natural number"),
        (Tensor(ARRAY, (3, 4), (4, 1), -1), "no natural number"),
        (Tensor(ARRAY, (3, 4.0), (4, 1)), "no natural number"),
        (Tensor(ARRAY, (3, True), (4, 1)), "no natural number"),
        (Tensor(ARRAY, (12,), (1, 1)), "1 sizes and 2 strides"),
        (Tensor(ARRAY, length=13), "has 48 bytes, which are not 13 float32"),
        (Tensor(ARRAY, length=11), "has 48 bytes, which are not 11 float32"),
        (Tensor(ARRAY, storage="BFloat16Storage"), "has 48 bytes, which are not 12 bfloat16"),
        (Tensor(ARRAY, storage="QInt8Storage"), "torch.QInt8Storage"),
        (Tensor(ARRAY, length=-12), "not -12 float32"),
        (Tensor(ARRAY, rebuild="torch._utils _rebuild_tensor_v3"), "unknown arguments"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path, tensor, culprit):
    assert culprit in refusal(save(tmp_path / "x.pt", {"weight": tensor}))


@pytest.mark.parametrize("key", ["../0", "/etc/passwd", "0/../0", "", "x", "٣"])
def test_storage_names_that_lead_elsewhere_are_refused(tmp_path, key):
    message = refusal(save(tmp_path / "x.pt", {"weight": Tensor(ARRAY, key=key)}))
    assert "is missing" in message


def test_a_storage_of_two_types_is_refused(tmp_path):
    value = {"a": Tensor(ARRAY, key="0"), "b": Tensor(ARRAY.view(np.int32), key="0", storage="IntStorage")}
    assert "of two types" in refusal(save(tmp_path / "x.pt", value))


def test_a_missing_storage_is_named(tmp_path):
    path, cut = save(tmp_path / "x.pt", tensors({"a": ARRAY, "b": ARRAY})), tmp_path / "cut.pt"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(cut, "w") as archive:
        for info in whole.infolist():
            if not info.filename.endswith("data/1"):
                archive.writestr(info, whole.read(info))
    assert "the storage '1' is missing" in refusal(cut)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [({"compress_type": zipfile.ZIP_DEFLATED}, "compressed"), ({"compress_type": zipfile.ZIP_BZIP2}, "compressed")],
)
def test_compressed_records_are_refused(tmp_path, options, culprit):
    assert culprit in refusal(save(tmp_path / "x.pt", tensors({"a": ARRAY}), **options))


def test_other_layouts_are_refused_with_the_way_out(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"\x80\x02M\xe9\x03.")
    assert "before 1.6" in refusal(path)
    path.write_bytes(b"\x80\x02}.")
    assert "no zip archive" in refusal(path)
    path.write_bytes(b"")
    assert "no zip archive" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "0 parts named data.pkl" in refusal(path)
    save(path, {}, extra={"constants.pkl": b"\x80\x02)."})
    assert "TorchScript" in refusal(path)
    save(path, {}, extra={"copy/data.pkl": b"\x80\x02)."})
    assert "2 parts named data.pkl" in refusal(path)
    save(path, {}, extra={"byteorder": b"big"})
    assert "little-endian" in refusal(path)
    assert "no such file" in refusal(tmp_path / "missing.pt")


def test_two_records_of_one_name_are_refused(tmp_path):
    path = save(tmp_path / "x.pt", tensors({"a": ARRAY}))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", b"\0" * 48)
    assert "twice" in refusal(path)


def test_overlapping_records_are_refused(tmp_path):
    """Two entries of the directory that share bytes, the trick of archives that unpack to more than they hold."""
    path = save(tmp_path / "x.pt", tensors({"a": ARRAY, "b": ARRAY}))
    data = bytearray(path.read_bytes())
    # The local header of data/1, name and all, written over the elements of data/0, where the directory then points.
    first, second = (data.index(f"archive/data/{key}".encode()) for key in "01")
    length = len("archive/data/1")
    start = first + length + 1
    data[start : start + 30 + length] = data[second - 30 : second + length]
    entry = data.rindex(b"archive/data/1") - 46
    data[entry + 42 : entry + 46] = struct.pack("<I", start)
    path.write_bytes(data)
    assert "overlaps" in refusal(path)


def test_every_cut_is_noticed(tmp_path):
    whole = save(tmp_path / "whole.pt", tensors({"a": ARRAY, "b": ARRAY})).read_bytes()
    path = tmp_path / "x.pt"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(path)


def test_a_flipped_bit_of_any_record_is_noticed(tmp_path):
    path = save(tmp_path / "x.pt", tensors({"a": ARRAY, "b": ARRAY + 1}))
    whole = path.read_bytes()
    for key in ("a", "b"):
        place = load_torch_file(path)[key].offset
        for bit in range(0, 8 * ARRAY.nbytes, 17):
            damaged = bytearray(whole)
            damaged[place + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            content = load_torch_file(path)
            with pytest.raises(UserError, match=r"x\.pt: damaged: 48 bytes from \d+ on do not match their checksum"):
                content[key][1:2].read()
            assert np.array_equal(content["b"].read() if key == "a" else content["a"].read() + 1, ARRAY + 1)
        path.write_bytes(whole)
    damaged = bytearray(whole)
    damaged[whole.index(b"_rebuild_tensor_v2")] ^= 32
    path.write_bytes(damaged)
    assert "its index does not match its checksum" in refusal(path)


def test_a_storage_is_checked_once_however_many_tensors_share_it(tmp_path, monkeypatch):
    value = {str(row): Tensor(ARRAY, (3,), (1,), 3 * row, key="0") for row in range(4)}
    content = load_torch_file(save(tmp_path / "x.pt", value))
    sums = []
    monkeypatch.setattr(zlib, "crc32", lambda data, value=0: (sums.append(len(data)), CRC32(data, value))[1])
    assert [content[str(row)].read().tolist() for row in range(4)] == ARRAY.reshape(4, 3).tolist()
    assert sums == [ARRAY.nbytes]


@pytest.mark.parametrize("with_checksums", [True, False])
def test_files_that_pytorch_wrote_with_checksums_and_without(tmp_path, with_checksums):
    torch = pytest.importorskip("torch")
    weights = {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.ones(3, dtype=torch.bfloat16)}
    torch.serialization.set_crc32_options(with_checksums)
    try:
        torch.save(weights, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    content = load_torch_file(tmp_path / "x.pt")
    assert np.array_equal(content["a"].read(), weights["a"].numpy())
    assert np.array_equal(content["b"].read().astype(np.float32), np.ones(3))
