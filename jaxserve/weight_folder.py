"""A folder that somebody asks to take weights from: is it one for the model that is served?"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jaxserve import checksums
from jaxserve.models.config import ModelConfig
from jaxserve.models.load_format import open_checkpoint
from jaxserve.models.safetensors_file import SafetensorsFile
from jaxserve.tokenizer_identity import TokenizerIdentity
from jaxserve.weights_root import WeightsRoot

MOST_CHARACTERS = 500  # of a value in a message
SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")


@dataclasses.dataclass(frozen=True)
class Served:
    """What a folder is compared with."""

    config: ModelConfig
    context_length: int | None  # as asked for at the start
    overrides: Mapping[str, Any]  # laid over each config.json
    tokenizer: TokenizerIdentity | None


class WeightFolder:
    """Opened once: what is checked is what is read."""

    def __init__(
        self,
        name: str,
        folder: pathlib.Path,
        root: WeightsRoot,
        load_format: str,
        abstract: nnx.State,
    ):
        """Args:
          name: what it is called in messages.
          folder, root: from `WeightsRoot.find`.
          load_format, abstract: as in `open_checkpoint`.

        Raises FileNotFoundError, ValueError, OSError: there are no weights, or not below the root,
        or their headers are not sound.
        """
        self.path = folder
        self._name, self._root = name, root
        self.checkpoint = open_checkpoint(
            folder, load_format, abstract, name=name, open_file=root.open
        )

    @property
    def weights(self) -> pathlib.Path:
        """The folder that holds them: this one, or that of the orbax checkpoint in it."""
        path = self.checkpoint.files[0].path
        return path if path.is_dir() else self.path

    def check(self, served: Served, *, keep_tokenizer: bool) -> None:
        """Compares the configuration and the tokenizer, where the folder has any.

        Args:
          keep_tokenizer: another tokenizer, and other end-of-sequence ids, are no obstacle; those
            that run stay.

        Raises:
          ValueError: names what differs.
        """
        shards = [file for file in self.checkpoint.files if isinstance(file, SafetensorsFile)]
        if shards:
            _check_shards(self.path, shards)
        differences = self._config_differences(served, keep_tokenizer)
        if not keep_tokenizer and served.tokenizer is not None:
            names = served.tokenizer.differences(self.path, self._root.read_text)
            hint = "is another (keep_tokenizer accepts it, and keeps the one that runs)"
            differences += [f"{name} {hint}" for name in names]
        if differences:
            raise ValueError(f"{self._name} is another model: {'; '.join(differences)}")

    def verify(self, on_bytes: Callable[[int], None]) -> bool:
        """Compares the files with the checksums beside them; False where there are none.

        Raises ValueError, OSError.
        """
        files = self.checkpoint.descriptors()
        return checksums.verify(self.path, files, on_bytes, self._root.read_text)

    def _config_differences(self, served: Served, keep_tokenizer: bool) -> list[str]:
        if not (self.path / "config.json").exists():
            return []
        found = ModelConfig.from_pretrained(
            self.path, served.context_length, served.overrides, read_text=self._root.read_text
        )
        # Pooling is what the start says; of a folder only the shapes of its tensors count.
        ignored = {"dtype", "pooling"} | ({"eos_token_ids"} if keep_tokenizer else set())
        if found.num_layers != served.config.num_layers:
            ignored.add("windows")  # one of each layer: nothing new
        names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in ignored]
        return [
            f"config.json: {name} is {_short(theirs)}, serving {_short(ours)}"
            for name in names
            if (theirs := getattr(found, name)) != (ours := getattr(served.config, name))
        ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def _check_shards(folder: pathlib.Path, files: list[SafetensorsFile]) -> None:
    """What one save leaves and the next does not overwrite may not become part of a model."""
    used = {file.path.name for file in files}
    left = [path.name for path in folder.glob("*.safetensors") if path.name not in used]
    if extra := sorted(name for name in left if SHARD.fullmatch(name)):
        raise ValueError(f"the index does not name {', '.join(extra)}")
    owners: dict[str, str] = {}
    for file in files:
        for name in file.tensors:
            other = owners.setdefault(name, file.path.name)
            if other != file.path.name:
                raise ValueError(f"{name} is in both {other} and {file.path.name}")
