"""What one gets in a notebook: short reprs, escaped HTML, an opened run, and the tutorial notebook executed as it
stands."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_control import CodeUsage, Generation, LatentActionLM
from latent_control.records import GenerationText
from pipeline import open_run

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def generation() -> Generation:
    return Generation(
        tokens=torch.tensor([[5, 6, 0], [7, 8, 9]]),
        actions=torch.tensor([[1, 2, -1], [0, 0, 3]]),
        action_logp=torch.tensor([[-0.1, -0.7, 0.0], [0.0, -1.0, -2.0]]),
        lengths=torch.tensor([2, 3]),
        finish_reasons=("stop", "length"),
        versions=torch.zeros(2, 3, dtype=torch.int64),
    )


class TestReprs:
    def test_a_model_is_a_few_lines(self, model: LatentActionLM) -> None:
        lines = repr(model).splitlines()
        assert len(lines) < 12 and "  codes: 8, each for 1 token" in lines
        text = Tags(model._repr_html_()).text
        for part in ("LlamaForCausalLM", "4 blocks, width 32", "policy", "merge", "inverse dynamics"):
            assert part in text

    def test_a_generation_is_counts_and_coloured_tokens(self) -> None:
        out = generation()
        assert repr(out) == "Generation(2 rows of 2 to 3 tokens, 1 stopped by themselves, 1 cut)"
        assert out.rows()[0] == [(5, 1, pytest.approx(-0.1)), (6, 2, pytest.approx(-0.7))]
        html = out._repr_html_()
        assert Tags(html).text.endswith("51627080" + "93")
        assert html.count("hsl(0 75% 82%)") == 2, "both tokens of code 0 have one colour"
        assert "code 2, probability 0.50" in html

    def test_hostile_text_stays_text(self) -> None:
        evil = "<script>alert('x')</script>"
        html = GenerationText(rows=[[(evil, 3, -0.5)]], texts=[evil], title=evil)._repr_html_()
        assert "script" not in Tags(html).tags and evil in Tags(html).text

    def test_usage(self) -> None:
        usage = CodeUsage.of(torch.tensor([[0, 0, 2], [2, 3, -1]]), 4)
        assert usage.counts == (2, 0, 2, 1) and usage.alive == 3
        assert usage.top(2) == [(0, 2), (2, 2)] and 2.8 < usage.perplexity < 3
        assert repr(usage).startswith(
            "CodeUsage(3 of 4 codes active, perplexity 2.9, 5 choices; most often: 0 40%, 2 40%, 3 20%"
        )
        assert "aria-label='3 of 4 codes active" in usage._repr_html_()
        assert CodeUsage.of([], 4).alive == 0 and "choices)" in repr(CodeUsage.of([], 4))
        with pytest.raises(ValueError, match="code 7 is not one of 4"):
            CodeUsage.of([7], 4)


class TestOpenRun:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "config.yaml").write_text((ROOT / "configs" / "quickstart.yaml").read_text())
        lines: list[dict[str, Any]] = [{"stage": "clone", "step": s, "time": 1.0, "loss": 1 / s} for s in (1, 2)]
        lines += [{"stage": "improve", "step": s, "time": 2.0, "reward": s / 10} for s in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    def test_curves_come_by_stage(self, folder: Path) -> None:
        run = open_run(folder)
        assert run.metrics("improve").reward.to_dict() == {1: 0.1, 2: 0.2, 3: 0.3}
        assert "loss" not in run.metrics("improve") and len(run.metrics()) == 5
        assert run.config.improve is not None and run.config.improve.updates == 80
        assert "interrupted, improve 3/80" in repr(run) and Tags(run._repr_html_()).text.startswith("Run run")

    def test_errors_name_the_value_and_the_remedy(self, folder: Path, tmp_path: Path) -> None:
        run = open_run(folder)
        for wrong, said in (
            (lambda: open_run(tmp_path / "rn"), r"rn does not exist; did you mean .*run\?"),
            (lambda: open_run(tmp_path), r"is not a run folder: it has no config\.yaml"),
            (lambda: run.metrics("imprve"), r"stage 'imprve' logged nothing in run; these did: clone, improve"),
            (run.rollouts, "stored no rollouts"),
            (run.model, "no latent policy yet"),
            (lambda: run.model("evaluate"), "no latent policy after stage 'evaluate'; this run has: none yet"),
        ):
            with pytest.raises(ValueError, match=said):
                wrong()  # type: ignore[operator]

    def test_importing_the_package_loads_nothing_heavy(self) -> None:
        code = (
            "import sys, pipeline; print([m for m in ('torch', 'ray', 'pandas', 'pyarrow', 'pydantic') if m in "
            "sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.strip() == "[]"


def results_of(cell: Any) -> list[str]:
    """Kinds of a cell's outputs; what libraries say to stderr is not committed."""
    return [output.output_type for output in cell.outputs if output.output_type != "stream"]


@pytest.mark.slow
def test_the_tutorial_runs_and_shows_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[dev]' brings nbclient and ipykernel")
    client = pytest.importorskip("nbclient")
    manager = pytest.importorskip("jupyter_client.manager")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(NOTEBOOK, 4)
    assert NOTEBOOK.stat().st_size < 150_000, "committed outputs are to be small"
    committed = [results_of(cell) for cell in book.cells if cell.cell_type == "code"]
    # A socket file instead of ports; an error in a cell is an error here.
    kernel = manager.AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(tmp_path / "kernel"))
    client.NotebookClient(
        book, km=kernel, timeout=500, startup_timeout=400, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [results_of(cell) for cell in cells] == committed, "run it again: docs/notebook.md"
    shown = {key for cell in cells for output in cell.outputs for key in output.get("data", {})}
    assert {"text/html", "image/png", "text/plain"} <= shown
    results = [output.data["text/plain"] for cell in cells for output in cell.outputs if "data" in output]
    assert any(text.startswith("LatentActionLM(") for text in results) and any("CodeUsage(" in text for text in results)
