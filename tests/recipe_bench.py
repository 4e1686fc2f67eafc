"""A recipe whose stages are stand-ins, for tests of what runs when and of what is left on disk."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import tiny

from luthier import checks
from luthier.models.saving import save
from luthier.recipe import stages
from luthier.recipe.runner import Run, run
from luthier.recipe.stages import StageResult

RECIPE = """\
name: demo
model: {model}
output: {output}
stages:
  - evaluate: {{data: {data}, metrics: [perplexity]}}
  - export: {{dtype: {dtype}, name: out}}
  - evaluate: {{data: {data}, metrics: [perplexity], name: after}}
"""


@dataclass
class Bench:
    """A recipe whose stages are stand-ins that only note that they ran."""

    folder: Path
    ran: list[str] = field(default_factory=list)
    broken: dict[str, BaseException] = field(default_factory=dict)
    missed: bool = False
    plan: SimpleNamespace = field(default_factory=lambda: plan())

    @property
    def output(self) -> Path:
        return self.folder / "runs"

    @property
    def place(self) -> Path:
        return self.output / "demo"

    def write(self, text: str = RECIPE, **changes: Any) -> Path:
        values = {
            "model": self.folder / "base",
            "output": self.output,
            "data": self.folder / "data.jsonl",
            "dtype": "auto",
        }
        path = self.folder / "recipe.yaml"
        path.write_text(text.format(**values | changes))
        return path

    def stage(self, kind: str) -> Any:
        def work(stage: Any, context: Any) -> StageResult:
            self.ran.append(context.work.name.removesuffix(".partial"))
            checks.record("data", "seen", not self.missed, 1, 2, refuse=False)
            if stage.name in self.broken:
                raise self.broken[stage.name]
            if kind == "evaluate":
                upstream = context.upstream.artefact.parent.name if context.upstream else "base"
                return StageResult(metrics={"perplexity": {"value": 2.0}}, details={"of": upstream})
            (context.work / "model").mkdir(exist_ok=True)
            (context.work / "model" / "config.json").write_text(stage.dtype)
            return StageResult(total=7)

        return work

    def again(self, **options: Any) -> Run:
        self.ran.clear()
        return run(self.folder / "recipe.yaml", **options)


def plan(disk: int = 0, fits: bool = True) -> SimpleNamespace:
    memory = SimpleNamespace(total=0)
    parts = [SimpleNamespace(disk_bytes=disk, memory=memory, proofs=())] * 4
    return SimpleNamespace(stages=parts, fits=fits, verdict="It needs 9 GB.", as_dict=lambda: {"fits": fits})


def make(folder: Path, monkeypatch: Any) -> Bench:
    """A base model, data and recipe in `folder`; planner, report and stages replaced."""
    save(tiny.llama(), folder / "base", tiny.tokenizer())
    (folder / "data.jsonl").write_text('{"text": "one"}\n')
    made = Bench(folder)
    monkeypatch.setattr(stages, "find", made.stage)
    planner = ModuleType("planner")
    planner.plan = lambda recipe: made.plan
    monkeypatch.setitem(sys.modules, "luthier.recipe.planner", planner)
    report = ModuleType("report")
    report.write_report = report.write_comparison = lambda folder: folder / "report.html"
    monkeypatch.setitem(sys.modules, "luthier.report.report", report)
    made.write()
    return made
