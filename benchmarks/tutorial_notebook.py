"""Execute docs/tutorial.ipynb and write its outputs back, without what libraries say to stderr; prints the seconds.

python benchmarks/tutorial_notebook.py
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def main() -> None:
    """Run all cells in a kernel of their own."""
    os.environ["PYTHONPATH"] = str(ROOT)
    book = nbformat.read(NOTEBOOK, 4)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        NotebookClient(
            book, km=kernel, timeout=600, startup_timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
        ).execute()
    print(f"{time.perf_counter() - started:.1f} s")
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.output_type != "stream"]
    nbformat.write(book, NOTEBOOK)


if __name__ == "__main__":
    main()
