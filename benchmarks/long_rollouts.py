"""What windows of long rollouts, and rollouts that go on, take beside short ones: the table of docs/training.md.

python -m benchmarks.long_rollouts

Counted on the configured mesh, for the recipe of configs/adastate_wan.py; nothing is compiled.
"""

from adastate_jax.benchmarking.counting import count
from adastate_jax.config.files import parse_config

RECIPE = ["--config=configs/adastate_wan.py", "--config.mesh.fsdp=4", "--config.mesh.model=2"]
WAYS = {
    "21 frames, scored whole": {},
    "120 frames, scored whole": {"rollout_frames": 120},
    "120 frames, a window of 21": {"rollout_frames": 120, "scored_frames": 21},
    "237 frames in segments of 21 (3 of them seen again)": {
        "rollout_frames": 237,
        "scored_frames": 21,
        "overlap_frames": 3,
        "continue_rollout": "true",
        "prompt_change": "renew",
    },
}


def main() -> None:
    for name, fields in WAYS.items():
        config = parse_config([*RECIPE, *(f"--config.distill.{field}={value}" for field, value in fields.items())])
        student, critic = (count(program, config, config.network("teacher")) for program in ("student", "critic"))
        before = sum(size for part, size in student.parts.items() if part.startswith(("the cache", "rollout that")))
        sizes = (student.parts["rollout's keys and values"], before, student.bytes)
        gibibytes = " | ".join(f"{size / 2**30:.2f}" for size in sizes)
        work = " | ".join(f"{counted.flops.total / 1e15:.1f}" for counted in (student, critic))
        print(f"| {name} | {gibibytes} | {work} |")


if __name__ == "__main__":
    main()
