"""Write the folders in tests/golden/peft: ``PYTHONPATH=tests python tests/peers/make_golden.py``.

Each is what PEFT saves of a case of `programs_of_files`, and beside it in ``output.npy`` what the
adapted program computes. It needs ``pip install -e '.[peft]'`` on Python 3.11.
"""

import shutil
import warnings
from pathlib import Path

import numpy as np
import programs_of_files
import torch_programs

GOLDEN = Path(__file__).parent.parent / "golden" / "peft"


def main() -> None:
    """Write a folder for each case."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, case in programs_of_files.CASES.items():
        folder = GOLDEN / name
        model = torch_programs.adapted(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
        (folder / "README.md").unlink()  # a model card without anything in it
        np.save(folder / "output.npy", torch_programs.output(model, case))


if __name__ == "__main__":
    main()
