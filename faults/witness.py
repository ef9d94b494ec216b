"""`python -m faults.witness COMMAND ...`: a command of the trainer's that writes down what each trained image was.

One JSON line an image, in a file of this process's under the folder that the environment names: where it stands in the
order, its row, what was drawn for it, whether picture and caption were dropped, and a hash of what the encoders get.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FOLDER = "FAULTS_WITNESS"


def seen(folder: Path) -> list[str]:
    """All lines of all processes, in order of their text."""
    return sorted(line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines())


def _hash(tensor: Any) -> str:
    return hashlib.blake2b(tensor.contiguous().cpu().numpy().tobytes(), digest_size=8).hexdigest()


def _watch() -> None:
    """Has every micro batch of training written down; validation draws by itself and is not."""
    from ip_adapter_trainer.train.step import Step

    own, file = Step.__call__, Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl"

    def watched(self: Step, batch: Any) -> Any:
        """Writes, then trains."""
        inputs, indices = batch.inputs, batch.index.tolist()
        shown = inputs.pixels if hasattr(inputs, "pixels") else inputs.moments
        shape = self.model.codec.latent_shape(*shown.shape[-2:]) if hasattr(inputs, "pixels") else _half(shown)
        noise, timesteps = self.process.draw(self.seed, indices, shape)
        with file.open("a") as lines:
            for number, index in enumerate(indices):
                facts = [index, int(batch.row[number]), batch.text[number], bool(batch.drop_image[number])]
                drawn = [_hash(noise[number]), int(timesteps[number]), _hash(shown[number])]
                lines.write(json.dumps(facts + drawn) + "\n")
        return own(self, batch)

    Step.__call__ = watched  # type: ignore[method-assign]


def _half(moments: Any) -> tuple[int, int, int]:
    return moments.shape[1] // 2, moments.shape[2], moments.shape[3]


if __name__ == "__main__":
    from ip_adapter_trainer.cli import main

    _watch()
    main()
