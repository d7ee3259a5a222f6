"""Text prompts: a file with one prompt per line, or JSON lines with a "prompt" field."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import tensorflow_datasets as tfds

from adastate_jax.data.builder import Examples, SequentialBuilder, named_configuration
from adastate_jax.errors import UserError
from adastate_jax.texts import is_text, parse_json, read_text


def read_prompts(path: str | os.PathLike, blank_lines: bool = True) -> list[str]:
    """Reads the prompts of a text file, in order.

    A file named `*.jsonl` holds one JSON object per line with a string under "prompt"; any other file one prompt per
    line, where a line that begins with # is a comment. Blank lines are skipped in both, or refused without
    `blank_lines`. Raises `UserError`, with the line's number, for a file that is missing, empty, not text (see
    `texts.read_text`) or not such JSON.
    """
    path = pathlib.Path(path)
    prompts = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        text = line.strip()
        if not text:
            if not blank_lines:
                raise UserError(f"{path}: line {number} is empty; write a prompt there, or remove it")
            continue
        if path.suffix == ".jsonl":
            prompts.append(_prompt_of(text, path, number))
        elif not text.startswith("#"):
            prompts.append(text)
    if not prompts:
        raise UserError(f"{path}: has no prompts; write one per line")
    return prompts


def _prompt_of(text, path, number):
    where = f"{path}: line {number}"
    record = parse_json(text, where)
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not is_text(prompt) or not prompt.strip():
        raise UserError(f'{where} has no text under "prompt"; write {{"prompt": "..."}}')
    return prompt.strip()


@dataclasses.dataclass
class PromptsConfig(tfds.core.BuilderConfig):
    """The prompts themselves: a dataset does not go back to the file."""

    prompts: tuple[str, ...] = ()


class Prompts(SequentialBuilder):
    """TFDS builder of prompts; make one with `prompts`. Feature: `prompt`; split: `train`, in the file's order."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Prompts without videos.",
            features=tfds.features.FeaturesDict({"prompt": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {"train": Examples(len(self.builder_config.prompts), self._generate_examples())}

    def _generate_examples(self):
        for number, prompt in enumerate(self.builder_config.prompts):
            yield number, {"prompt": prompt}


def prompts(path: str | os.PathLike) -> Callable[..., Prompts]:
    """A dataset of the prompts in a file, for `open_source`.

    A changed file is another dataset. Raises `UserError` as `read_prompts` does.
    """
    texts = tuple(read_prompts(path))
    return functools.partial(Prompts, config=named_configuration(PromptsConfig, f"{len(texts)}", {"prompts": texts}))
