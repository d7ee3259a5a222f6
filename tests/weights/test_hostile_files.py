"""Mutated checkpoints: refused with one line, or the same weights as before; nothing is executed, nothing grows.

The counts add up to what CI tries; seeds are fixed.
"""

import dataclasses
import json
import os
import resource
import struct
import zlib

import jax
import numpy as np
import pytest
import torch_files
from mutations import HOSTILE_VALUES, damaged_bytes, damaged_json, damaged_value, tried
from safetensors.numpy import save_file

from adastate_jax.config.files import parse_config
from adastate_jax.convert import main
from adastate_jax.generation.trained import Trained, load_bundle, write_bundle
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.patch_codec import PatchCodec
from adastate_jax.models.text import TextConfig
from adastate_jax.sharding import make_mesh
from adastate_jax.training.frozen import Frozen, abstract_dit, abstract_frozen
from adastate_jax.weights.converted import open_converted
from adastate_jax.weights.identify import identify
from adastate_jax.weights.kinds import KINDS
from adastate_jax.weights.lora import merge_lora
from adastate_jax.weights.safetensors_file import SafeTensors, write_safetensors
from adastate_jax.weights.sources import open_source
from adastate_jax.weights.tensors import finite_blocks

CONFIGS = {
    "transformer": DiTConfig(
        dim=128, ffn_dim=8, num_heads=1, num_layers=1, in_channels=2, out_channels=2, text_dim=4, freq_dim=4
    ),
    "text_encoder": TextConfig(
        vocab_size=9, dim=4, dim_attention=6, ffn_dim=8, num_heads=3, num_layers=1, num_buckets=8
    ),
}
COUNTS = {
    "safetensors": 500,
    "bits of safetensors": 100,
    "pytorch": 500,
    "pickles": 300,
    "indexes": 200,
    "converted": 300,
    "bundles": 150,
    "adapters": 200,
}
CANARY = "ADASTATE_CANARY"

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # of a damaged string


def test_there_are_enough():
    assert sum(COUNTS.values()) >= 2000


@pytest.fixture(autouse=True)
def nothing_happens(tmp_path):
    """No canary sings, and no size that a file states is allocated."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert CANARY not in os.environ
    assert not (tmp_path / CANARY).exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB; JAX itself takes some of it


def draw(kind):
    rng = np.random.default_rng(0)
    slots = KINDS[kind].slots(CONFIGS[kind])
    return {name: rng.standard_normal(slot.shape).astype(np.float32) for name, slot in slots.items()}


def digest(network):
    """All that a network is: its configuration and its numbers."""
    checksum = 0
    for name, tensor in network.tensors.items():
        for _, rows in finite_blocks(name, tensor, np.dtype(np.float32)):
            checksum = zlib.crc32(np.ascontiguousarray(rows).reshape(-1).view(np.uint8), checksum)
    return network.config, checksum


def opened(path):
    return digest(identify(open_source(path)))


def check(count, mutate, read, expected, least_refused, path=None):
    """Tries so many mutations: each is refused with a line that names the file, or changes nothing."""
    refused = 0
    for _ in range(count):
        mutate()
        found, line = tried(read)
        if line is None:
            assert found == expected
        else:
            assert path is None or str(path) in line, line
        refused += line is not None
    assert least_refused <= refused <= count


# --- .safetensors -----------------------------------------------------------------------------------------------------


def split(content):
    """Header as a value, and the elements."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, elements):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + elements


def hostile_header(header, rng):
    """A header whose tensors have other types, shapes, places or names than the elements."""
    header = json.loads(json.dumps(header))
    names = [name for name in header if name != "__metadata__"]
    name, other = (names[i] for i in rng.choice(len(names), 2, replace=False))
    entry = header[name]
    match rng.integers(9):
        case 0:
            kinds = ["F64", "I32", "U32", "I8", "BOOL", "F8_E4M3", "F4", "C64", "F8_E8M0", "x", ""]
            entry["dtype"] = kinds[rng.integers(len(kinds))]
        case 1:
            entry["shape"] = [[0], [2**63], [-1], [2**32, 2**32], [], [1] * 5000, [1.5], ["4"]][rng.integers(8)]
        case 2:
            entry["shape"] = [*entry["shape"], 1]
        case 3:
            entry["data_offsets"] = header[other]["data_offsets"]  # two tensors of the same bytes
        case 4:
            start, end = entry["data_offsets"]
            entry["data_offsets"] = [[start + 4, end + 4], [end, start], [-4, end], [start, 2**64], [start], {}][
                rng.integers(6)
            ]
        case 5:
            header[f"{name}\x1b[31m"] = header.pop(name)
        case 6:
            header[other] = header.pop(name)
        case 7:
            header["__metadata__"] = HOSTILE_VALUES[rng.integers(len(HOSTILE_VALUES))]
        case 8:
            return damaged_value(header, rng)
    return header


@pytest.mark.parametrize("kind", CONFIGS)
def test_safetensors(tmp_path, kind):
    rng = np.random.default_rng(1)
    path = tmp_path / "x.safetensors"
    save_file(draw(kind), path, {"format": "pt"})
    whole, expected = path.read_bytes(), opened(path)
    header, elements = split(whole)
    head = len(whole) - len(elements)

    def mutate():
        match rng.integers(5):
            case 0 | 1 | 2:
                path.write_bytes(joined(hostile_header(header, rng), elements))
            case 3:
                path.write_bytes(damaged_bytes(whole, rng, stop=head))
            case 4:
                other = whole[: int(rng.integers(len(whole)))], whole + bytes(int(rng.integers(1, 9)))
                path.write_bytes(other[rng.integers(2)])

    check(COUNTS["safetensors"] // 2, mutate, lambda: opened(path), expected, 200, path)


def test_bits_of_safetensors(tmp_path):
    """The format has no checksums: a flipped bit of a number gives another number, but never one that is none."""
    rng = np.random.default_rng(2)
    path = tmp_path / "x.safetensors"
    save_file(draw("text_encoder"), path)
    whole = path.read_bytes()
    head = len(whole) - len(split(whole)[1])
    refused = 0
    for _ in range(COUNTS["bits of safetensors"]):
        data = bytearray(whole)
        # The exponent's high bits, that NaN and infinity come about.
        data[head + 4 * int(rng.integers((len(whole) - head) // 4)) + 3] |= 0x7F
        data[head + 4 * int(rng.integers((len(whole) - head) // 4)) + 2] |= 0x80
        path.write_bytes(data)
        found, line = tried(lambda: opened(path))
        assert (line is None and found[0] == opened_config(whole, tmp_path)) or "holds NaN, infinity" in line
        refused += line is not None
    assert refused > 20


def opened_config(whole, tmp_path):
    (tmp_path / "whole.safetensors").write_bytes(whole)
    return identify(open_source(tmp_path / "whole.safetensors")).config


# --- what torch.save writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_pytorch_files(tmp_path, kind):
    rng = np.random.default_rng(3)
    path = torch_files.save(tmp_path / "x.pt", {"generator": torch_files.tensors(draw(kind)), "step": 3})
    whole, expected = path.read_bytes(), opened(path)
    directory = whole.index(b"PK\x01\x02")

    def mutate():
        start = (0, directory)[rng.integers(2)]
        path.write_bytes(damaged_bytes(whole, rng, start))

    check(COUNTS["pytorch"] // 2, mutate, lambda: opened(path), expected, 180, path)


def word(text):
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def hostile_code(rng, tmp_path):
    """Instructions that would run something in Python's own unpickler, or that do not fit together."""
    canary = tmp_path / CANARY
    touch = f"open({str(canary)!r}, 'w')"
    calls = [
        torch_files.name("builtins", "exec") + word(touch) + b"\x85R",
        torch_files.name("builtins", "eval") + word(touch) + b"\x85R",
        torch_files.name("os", "system") + word(f"touch {canary}") + b"\x85R",
        torch_files.name("os", "putenv") + word(CANARY) + word("1") + b"\x86R",
        torch_files.name("subprocess", "Popen") + word(f"touch {canary}") + b"\x85R",
        torch_files.name("pathlib", "Path") + word(str(canary)) + b"\x85R" + torch_files.name("x", "y") + b"R",
        torch_files.name("torch", "load") + word(str(canary)) + b"\x85R",
        torch_files.name("torch.hub", "load_state_dict_from_url") + word("http://x") + b"\x85R",
        torch_files.name("torch._utils", "_rebuild_tensor_v2.__globals__") + b")R",
        word("builtins") + word("exec") + b"\x93" + word(touch) + b"\x85R",
        word("os") + word("system") + b"\x93" + word(f"touch {canary}") + b"\x85R",
        b"(" + word(touch) + b"ibuiltins\nexec\n",
        b"(" + torch_files.name("builtins", "exec") + word(touch) + b"o",
        torch_files.name("builtins", "exec") + word(touch) + b"\x85\x81",
        b"Pos.system\n",
        word("os.system") + b"Q",
        b"\x82\x01",
    ]
    noise = bytes(
        rng.choice(list(b"()]}N\x88\x89K\x00K\x01K\x05tles0a2bR\x85\x86\x87q\x00h\x00X\x01\x00\x00\x00\xc3"), 12)
    )
    code = calls[rng.integers(len(calls))]
    match rng.integers(5):
        case 0:
            return code
        case 1:
            return noise[: rng.integers(12)] + code
        case 2:
            return code + noise[: rng.integers(12)]
        case 3:
            return b"]" + code + b"a"
        case _:
            return noise


def test_pickles(tmp_path):
    rng = np.random.default_rng(4)
    path = tmp_path / "x.pt"
    tensors = torch_files.tensors(draw("text_encoder"))
    torch_files.save(path, {"model": tensors})
    expected = opened(path)

    def mutate():
        hostile = torch_files.Raw(hostile_code(rng, tmp_path))
        place = ("beside", "inside", "instead")[rng.integers(3)]
        if place == "beside":
            torch_files.save(path, {"args": hostile, "model": tensors})
        elif place == "inside":
            torch_files.save(path, {"model": {**tensors, "config": hostile}})
        else:
            torch_files.save(path, hostile)

    check(COUNTS["pickles"], mutate, lambda: opened(path), expected, 220, path)


# --- folders of several files -----------------------------------------------------------------------------------------


def test_indexes(tmp_path):
    rng = np.random.default_rng(5)
    tensors = [*draw("text_encoder").items()]
    for number in range(2):
        save_file(dict(tensors[number::2]), tmp_path / f"model-{number}.safetensors")
    files = {name: f"model-{index % 2}.safetensors" for index, (name, _) in enumerate(tensors)}
    index = tmp_path / "model.safetensors.index.json"
    good = json.dumps({"metadata": {"total_size": 1}, "weight_map": files})
    index.write_text(good)
    expected = opened(tmp_path)
    config = tmp_path / "config.json"
    settings = json.dumps({"architectures": ["UMT5EncoderModel"], "num_heads": 3, "layer_norm_epsilon": 1e-6})

    def mutate():
        index.write_bytes(damaged_json(good, rng) if rng.integers(4) else good.encode())
        config.write_bytes(damaged_json(settings, rng))

    refused = 0
    for _ in range(COUNTS["indexes"]):
        mutate()
        # A config.json may say what it likes of a network, as long as the network can be so.
        found, line = tried(lambda: opened(tmp_path))
        assert line is not None or found[1] == expected[1]
        assert line is None or str(tmp_path) in line
        refused += line is not None
    assert refused > 100


# --- what this package wrote ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_converted_folders(tmp_path, kind):
    rng = np.random.default_rng(6)
    save_file(draw(kind), tmp_path / "x.safetensors")
    folder = tmp_path / "converted"
    main([f"--source={tmp_path / 'x.safetensors'}", f"--output={folder}"])
    description, file = folder / "converted.json", folder / "weights.safetensors"
    text, whole = description.read_text(), file.read_bytes()
    expected = digest(open_converted(folder))

    def mutate():
        description.write_text(text)
        file.write_bytes(whole)
        if rng.integers(2):
            description.write_bytes(damaged_json(text, rng))
        else:
            file.write_bytes(damaged_bytes(whole, rng, (0, len(whole) // 2)[rng.integers(2)]))

    check(COUNTS["converted"] // 2, mutate, lambda: digest(open_converted(folder)), expected, 110, folder)


def small_run():
    """Configuration and networks of random numbers, as a finished run leaves them."""
    sizes = ["codec.patch=2", "codec.channels=2", "model.in_channels=2", "model.out_channels=2", "model.dim=8"]
    sizes += ["model.ffn_dim=8", "model.num_heads=1", "model.num_layers=1", "model.freq_dim=4", "model.text_dim=4"]
    sizes += ["text.dim=4", "text.dim_attention=4", "text.ffn_dim=4", "text.num_heads=1", "text.num_layers=1"]
    config = parse_config(["--config=configs/tiny.py", *(f"--config.{line}" for line in sizes)])
    rng = np.random.default_rng(0)
    draw = lambda tree: jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), tree)  # noqa: E731
    frozen = abstract_frozen(config)
    codec = PatchCodec(*(rng.standard_normal(leaf.shape, np.float32) for leaf in jax.tree.leaves(frozen.codec)))
    return config, Trained(draw(abstract_dit(config)), Frozen(codec, draw(frozen.text_encoder)))


def test_bundles(tmp_path):
    rng = np.random.default_rng(7)
    path, mesh = tmp_path / "x.safetensors", make_mesh()
    write_bundle(*small_run(), path)
    whole = path.read_bytes()
    header, elements = split(whole)
    head = len(whole) - len(elements)

    def read():
        config, trained = load_bundle(path, mesh)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(trained)]
        return config, [zlib.crc32(leaf.tobytes()) for leaf in leaves]

    expected = read()

    def mutate():
        match rng.integers(4):
            case 0:
                changed = json.loads(json.dumps(header))
                text = damaged_json(changed["__metadata__"]["config"], rng).decode(errors="replace")
                changed["__metadata__"]["config"] = text
                path.write_bytes(joined(changed, elements))
            case 1:
                path.write_bytes(joined(hostile_header(header, rng), elements))
            case 2:
                path.write_bytes(damaged_bytes(whole, rng, stop=head))
            case 3:
                path.write_bytes(damaged_bytes(whole, rng, start=head))

    check(COUNTS["bundles"], mutate, read, expected, 120, path)


def test_bundles_without_a_checksum_state_no_size_that_is_believed(tmp_path):
    """A hostile file needs none: sizes of 10^11 in its configuration are compared with what it holds."""
    path, mesh = tmp_path / "x.safetensors", make_mesh()
    config, trained = small_run()
    write_bundle(config, trained, path)
    opened = SafeTensors(path)
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in opened.items()}
    for group, field in (
        *(("model", name) for name in ("dim", "ffn_dim", "num_layers", "freq_dim", "num_heads")),
        *(("text", name) for name in ("vocab_size", "ffn_dim", "num_layers", "dim_attention")),
        *(("codec", name) for name in ("patch", "channels")),
    ):
        fields = json.loads(opened.metadata["config"])
        fields[group][field] = 10**11
        write_safetensors(path, layout, [np.array(x) for x in opened.values()], {"config": json.dumps(fields)})
        _, line = tried(lambda: load_bundle(path, mesh))
        assert line is not None
        assert "x.safetensors" in line


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters(tmp_path):
    rng = np.random.default_rng(8)
    save_file(draw("transformer"), tmp_path / "base.safetensors")
    base = identify(open_source(tmp_path / "base.safetensors"))
    down, up = rng.standard_normal((2, 128)).astype(np.float32), rng.standard_normal((128, 2)).astype(np.float32)
    name = "diffusion_model.blocks.0.self_attn.q"
    adapter = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.float32([2])}
    adapter |= {f"{name}.diff_b": np.ones(128, np.float32)}
    path, settings = tmp_path / "lora.safetensors", tmp_path / "adapter_config.json"
    save_file(adapter, path)
    header, elements = split(path.read_bytes())
    told = json.dumps({"r": 2, "lora_alpha": 2, "use_rslora": False, "alpha_pattern": {}, "rank_pattern": {}})

    def read():
        return digest(merge_lora(base, path))

    expected = read()

    def mutate():
        settings.write_text(told)
        path.write_bytes(joined(header, elements))
        match rng.integers(4):
            case 0:
                settings.write_bytes(damaged_json(told, rng))
            case 1 | 2:
                path.write_bytes(joined(hostile_header(header, rng), elements))
            case 3:
                path.write_bytes(damaged_bytes(joined(header, elements), rng, stop=len(joined(header, b""))))

    check(COUNTS["adapters"], mutate, read, expected, 100, tmp_path)


def test_numbers_that_are_none(tmp_path):
    """Every tensor of a network and an adapter, with one NaN or infinity in it."""
    tensors = draw("text_encoder")
    for value in (np.nan, np.inf, -np.inf):
        for name in tensors:
            bad = tensors | {name: np.array(tensors[name])}
            bad[name].flat[-1] = value
            save_file(bad, tmp_path / "x.safetensors")
            _, line = tried(lambda: opened(tmp_path / "x.safetensors"))
            assert f"{name} holds NaN, infinity" in line


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_of_any_network_is_bounded_by_its_file(tmp_path, kind):
    """What a network's shapes do not tell may be overridden, but not into what the file cannot be."""
    save_file(draw(kind), tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    for field in dataclasses.fields(CONFIGS[kind]):
        for value in HOSTILE_VALUES:
            found, line = tried(lambda field=field, value=value: identify(source, {field.name: value}))
            expected = tuple(value) if isinstance(value, list) else value
            assert line is not None or getattr(found.config, field.name) == expected
