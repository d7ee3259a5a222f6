"""The comparison with PyTorch runs both sides, on the same network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("torch", "diffusers", "transformers"):
    pytest.importorskip(name, reason="the peers are not installed; see requirements-dev.txt")


def test_both_sides_are_one_network(tmp_path):
    output = tmp_path / "peers.json"
    command = [sys.executable, "-m", "benchmarks.peers", "--sizes", "trial", "--only", "chunk", "--turns", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, f"--output={output}"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(output.read_text())["cases"]
    assert found["error"] < 1e-5
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {"ours": 2, "pytorch": 2}
    assert "| chunk | trial |" in done.stdout
