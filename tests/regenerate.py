"""Has a target answer, as a process of its own: ``python -m tests.regenerate RUN.json``."""

import sys
from pathlib import Path

from torchspec_lib.config.run import RunConfig
from torchspec_lib.regeneration.regenerate import regenerate
from torchspec_lib.target import read_target

if __name__ == "__main__":
    run = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
    regenerate(run, read_target(run.model))
