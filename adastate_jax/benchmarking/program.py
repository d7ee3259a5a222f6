"""What a compiled program does, read from its text: kernels, copies, products and collectives, loops multiplied out.

The compiler's own totals count the body of a loop once and a custom kernel not at all. Here every instruction is
counted as often as it runs, where the compiler knows how often its loop turns.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import jax

from adastate_jax.benchmarking.replica_groups import axes_along, extent_of

_BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|[a-z0-9]+\[[\d,]*\](?:\{[^ ]*\})?) ([a-z\-]+)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"(?:calls|to_apply|branch_computations|true_computation|false_computation)=\{?(%?[\w.\-]+(?:, ?%[\w.\-]+)*)"
)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_COPIES = ("copy", "copy-start", "transpose", "reshape", "concatenate", "pad", "slice", "dynamic-slice")
_NO_KERNEL = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "after-all")
_NO_CUSTOM_KERNEL = ("AllocateBuffer", "ConcatBitcast")
_IN_FAST_MEMORY = re.compile(r"[a-z]+\d*[a-z0-9]*\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}")
# Their `to_apply` is a scalar function, which does not count.
_REDUCERS = ("reduce", "scatter", "sort", "reduce-window", "select-and-scatter", "map", *_COLLECTIVES)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name, operation: `fusion.3` and `fusion`, say.
        shape: its result as it is written, `bf16[4,8]{1,0}`, or a tuple of such.
        line: all of it.
    """

    name: str
    operation: str
    shape: str
    line: str

    @property
    def bytes(self) -> int:
        """Of the result, of all parts of a tuple."""
        return sum(sizes(self.shape))

    @property
    def custom_target(self) -> str | None:
        """What a custom call calls."""
        found = self.operation == "custom-call" and re.search(r'custom_call_target="([^"]+)"', self.line)
        return found[1] if found else None

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.line)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Instructions that exchange data over the same mesh axes.

    Attributes:
        kind: `all-gather`, …
        axes: names of the mesh axes, see `axes_along`.
        instructions: in the program.
        runs: of them all together, per device.
        bytes: of their results, over all runs, per device.
    """

    kind: str
    axes: str
    instructions: int
    runs: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: instructions by the name of the computation that holds them.
        entry: the computation that runs.
        fused: computations that are parts of a kernel.
        unknown_turns: stands for the turns of a loop whose number only the data knows.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    fused: frozenset[str]
    unknown_turns: float = 1.0

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs; what never runs is not there."""
        counted: collections.Counter[str] = collections.Counter()

        def visit(name: str, times: float) -> None:
            counted[name] += times
            for instruction in self.computations.get(name, ()):
                if instruction.operation == "while":
                    turns = self._turns(instruction)
                    visit(instruction.attribute("body"), times * (self.unknown_turns if turns is None else turns))
                elif instruction.operation not in _REDUCERS:
                    for called in _CALLED.findall(instruction.line):
                        for callee in re.split(r", ?", called):
                            visit(callee.removeprefix("%"), times)

        visit(self.entry, 1)
        return dict(counted)

    def _turns(self, loop: Instruction) -> int | None:
        """How often a loop turns, from what the compiler notes, or from what its condition compares with."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.line):
            return int(noted[1])
        condition = loop.attribute("condition")
        names = [condition, *(i.attribute("calls") for i in self.computations[condition] if i.operation == "fusion")]
        constants = [
            int(value)
            for instruction in itertools.chain.from_iterable(self.computations.get(name, ()) for name in names)
            if instruction.operation == "constant"
            for value in re.findall(r"s32\[\][^ ]* constant\((\d+)\)", instruction.line)
        ]
        return max(constants, default=None)

    def instructions(self, fused: bool = True) -> Iterator[tuple[Instruction, float]]:
        """Every instruction that runs, and how often; `fused` ones are parts of a kernel."""
        for name, times in self.runs.items():
            if fused or name not in self.fused:
                for instruction in self.computations.get(name, ()):
                    yield instruction, times

    def kernel_bytes(self) -> float:
        """What all kernels read and write in a device's large memory, each array once per run.

        A loop's slice counts as the slice; what lies in a TPU's fast memory does not count.
        """
        total = 0.0
        for name, times in self.runs.items():
            if name in self.fused:
                continue
            shapes = {instruction.name: instruction.shape for instruction in self.computations[name]}
            for instruction in self.computations[name]:
                if instruction.operation in _NO_KERNEL or instruction.operation.endswith("-done"):
                    continue
                if instruction.custom_target in _NO_CUSTOM_KERNEL:
                    continue
                read = sum(self._seen_bytes(shape, times) for shape in _operand_shapes(instruction, shapes))
                written = instruction.shape
                if instruction.operation.endswith("-start"):  # returns what it reads, too
                    written = written.lstrip("(").partition("}, ")[0] + "}"
                total += times * (read + self._seen_bytes(written, times))
        return total

    def _seen_bytes(self, shape: str, times: float) -> float:
        """Bytes of an array, or of one slice of it where it is stacked along the turns of the loop around."""
        size = sum(sizes(_IN_FAST_MEMORY.sub("", shape)))
        leading = re.match(r"[a-z0-9]+\[(\d+),", shape)
        stacked = leading and int(leading[1]) > 1 and times >= int(leading[1]) and times % int(leading[1]) == 0
        return size / int(leading[1]) if stacked and size > 2**24 else size

    def cycles(self) -> float | None:
        """The compiler's estimate of all kernels that it has one for (TPU): none for custom kernels and collectives."""
        found = [
            (int(value[1]), times)
            for instruction, times in self.instructions(fused=False)
            if (value := re.search(r'"estimated_cycles":"(\d+)"', instruction.line)) and int(value[1]) < 2**62
        ]
        return sum(value * times for value, times in found) if found else None

    def copies(self, at_least: int) -> list[tuple[Instruction, float]]:
        """Kernels that only move data, of results of so many bytes and more, those first that move most.

        What a TPU fetches into its fast memory ahead of a kernel, or writes back, is none.
        """
        found = [
            (instruction, times)
            for instruction, times in self.instructions(fused=False)
            if max(sizes(instruction.shape), default=0) >= at_least and self._only_moves(instruction)
        ]
        return sorted(found, key=lambda item: -item[0].bytes * item[1])

    def _only_moves(self, instruction: Instruction) -> bool:
        """Whether a kernel computes nothing; a fusion that only slices is how a loop's turn gets its part, and does."""
        if instruction.operation == "fusion":
            parts = {part.operation for part in self.computations[instruction.attribute("calls")]}
            return bool(parts & {*_COPIES[:6]}) and parts <= {*_COPIES, "parameter", "constant", "bitcast", "tuple"}
        if instruction.operation == "copy-start":
            return not _IN_FAST_MEMORY.search(instruction.shape)
        return instruction.operation in _COPIES

    def products(self) -> dict[str, float]:
        """Runs of matrix products and convolutions by dtypes, and by precision where it is not the platform's default.

        `bf16 bf16 -> f32`, or `f32 f32 -> f32 highest`. Those inside custom attention kernels are not seen.
        """
        counted: collections.Counter[str] = collections.Counter()
        for name, times in self.runs.items():
            shapes = {instruction.name: instruction.shape for instruction in self.computations.get(name, ())}
            for instruction in self.computations.get(name, ()):
                if not _is_product(instruction):
                    continue
                operands = [_ARRAY.search(operand) for operand in _operand_shapes(instruction, shapes)[:2]]
                kinds = " ".join(operand[1] if operand else "?" for operand in operands)
                precision = re.search(r"operand_precision\"?[=:][{\[]\"?(\w+)", instruction.line)
                stated = f" {precision[1].lower()}" if precision and precision[1].lower() != "default" else ""
                counted[f"{kinds} -> {_ARRAY.search(instruction.shape)[1]}{stated}"] += times
        return dict(counted)

    def attention(self) -> dict[str, float]:
        """Runs of attention by backend: of kernels for `splash` and `cudnn`, of softmax exponentials for `xla`."""
        counted: collections.Counter[str] = collections.Counter()
        for instruction, times in self.instructions():
            target = instruction.custom_target or ""
            if target.startswith("__cudnn$fmha"):
                counted["cudnn"] += times
            elif target == "tpu_custom_call" and "splash" in instruction.line:
                counted["splash"] += times
            elif instruction.operation == "exponential" and "attention_xla" in instruction.line:
                counted["xla"] += times
        return dict(counted)

    def custom_kernels(self) -> dict[str, float]:
        """Runs of custom calls by target."""
        counted: collections.Counter[str] = collections.Counter()
        for instruction, times in self.instructions():
            if instruction.custom_target:
                counted[instruction.custom_target] += times
        return dict(counted)

    def collectives(self, mesh: jax.sharding.Mesh) -> list[Collective]:
        """What devices exchange, the largest first."""
        found: dict[tuple[str, str], list[float]] = {}
        for name, times in self.runs.items():
            for instruction in self.computations.get(name, ()):
                kind = instruction.operation.removesuffix("-start")
                if kind not in _COLLECTIVES:
                    continue
                axes, size = axes_along(instruction.line, mesh), _result_bytes(instruction)
                if kind == "all-reduce" and name in self.fused and "from-cross-replica-sharding" in instruction.line:
                    kind = "reduce-scatter"  # as the TPU's compiler fuses it: the part is cut out after
                    size /= extent_of(axes, mesh)
                row = found.setdefault((kind, axes), [0, 0, 0])
                row[:] = row[0] + 1, row[1] + times, row[2] + times * size
        rows = [Collective(*key, int(count), runs, size) for key, (count, runs, size) in found.items()]
        return sorted(rows, key=lambda row: -row.bytes)


def sizes(shape: str) -> list[int]:
    """Bytes of each array in a shape as programs write it."""
    found = []
    for kind, dimensions in _ARRAY.findall(shape):
        digits = re.match(r"[a-z]+(\d+)", kind)
        if kind in _BITS or digits:
            bits = _BITS[kind] if kind in _BITS else int(digits[1])
            found.append(math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8)
    return found


def _result_bytes(exchange: Instruction) -> int:
    """Of a collective's results. What is started returns operands beside them: `((a, b), (c, d))` or `((a), c)`."""
    if not exchange.operation.endswith("-start") or exchange.operation == "all-reduce-start":
        return exchange.bytes
    if exchange.shape.startswith("(("):
        return sum(sizes(exchange.shape.partition("), ")[2]))
    return sizes(exchange.shape)[1]


def received_bytes(exchange: Collective, mesh: jax.sharding.Mesh) -> float:
    """What a device receives of others at least, where no link carries anything twice: that of a ring."""
    extent = extent_of(exchange.axes, mesh)
    if exchange.kind == "collective-permute":
        return exchange.bytes
    times = {"all-reduce": 2, "reduce-scatter": extent}.get(exchange.kind, 1)
    return exchange.bytes * times * (extent - 1) / extent


def read_program(text: str, unknown_turns: float = 1.0) -> Program:
    """The program of `jax.stages.Compiled.as_text()`.

    Args:
        unknown_turns: what a loop whose turns the compiler does not know is counted with.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(Instruction(found[1], found[3], found[2], line))
        elif current:  # the attributes of a custom call have line breaks
            current[-1] = dataclasses.replace(current[-1], line=f"{current[-1].line} {line}")
    if entry is None:
        raise ValueError("not the text of a compiled program: it has no entry computation")
    fused = {
        instruction.attribute("calls")
        for instructions in computations.values()
        for instruction in instructions
        if instruction.operation == "fusion"
    }
    return Program({name: tuple(found) for name, found in computations.items()}, entry, frozenset(fused), unknown_turns)


def _is_product(instruction: Instruction) -> bool:
    """Whether it is a matrix product or a convolution, by the compiler's own kernels or a GPU library's."""
    target = instruction.custom_target or ""
    return instruction.operation in ("dot", "convolution") or target.startswith(("__cublas$", "__cudnn$conv"))


def _operand_shapes(instruction: Instruction, shapes: Mapping[str, str]) -> list[str]:
    """The operands' shapes, as they are written in place or where they are made, which `shapes` has by name."""
    found = re.search(re.escape(instruction.operation) + r"\((.*?)\)(?:,|$)", instruction.line)
    named = re.findall(r"(?:^|, )(?:/\*.*?\*/)?([^%]*?)%([\w.\-]+)", found[1]) if found else []
    return [written.strip() or shapes.get(name, "") for written, name in named]
