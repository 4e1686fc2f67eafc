"""Run a recipe: its stages in order, each left as a whole folder, none run twice without a reason.

What a run leaves is files: `run.json` (the recipe and where the run stands) and one folder a stage
(`luthier.recipe.manifest`). A reader of them needs no running process, and a run that was killed goes on from
them. Nothing heavy is imported before the recipe, the folder, the disk and the plan are found good.
"""

import dataclasses
import errno
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import checks
from luthier.errors import LuthierError, RecipeError, ResourceError, did_you_mean
from luthier.recipe import stages
from luthier.recipe.inputs import Trail, Upstream, stage_identity
from luthier.recipe.manifest import (
    Manifest,
    StageFolder,
    damage,
    differences,
    locked,
    read_json,
    record_artefacts,
    versions,
    write_json,
)
from luthier.recipe.schema import Recipe
from luthier.recipe.source import load_recipe
from luthier.resources import (
    PeakMemory,
    environment,
    explain,
    is_out_of_memory,
    is_resource,
    release_memory,
    require_space,
    require_writable,
)

if TYPE_CHECKING:
    from luthier.models.placement import Placement
    from luthier.recipe.context import Models

log = logging.getLogger("luthier.recipe")


@dataclass
class StageRun:
    """One stage of a finished run.

    Attributes:
        folder: the stage's folder, with its artefacts.
        status: 'done' (it ran), 'unchanged' (its former result holds) or 'shared' (taken from another run).
        reason: why it ran, or where its result is from.
    """

    folder: Path
    status: str
    reason: str
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def kind(self) -> str:
        return self.manifest.stage

    @property
    def artefact(self) -> Path | None:
        """Its `model/`, `adapter/` or `prompt/` folder."""
        return _artefact(self.folder)


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: `<output>/<name>`.
        stages: in order.
        report: the HTML page.
    """

    name: str
    folder: Path
    stages: list[StageRun] = field(default_factory=list)
    report: Path | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """{name: {value, low, high, n}} of the last evaluation."""
        found = [s.manifest.metrics for s in self.stages if s.kind == "evaluate"]
        return found[-1] if found else {}

    @property
    def artefact(self) -> Path | None:
        """The model, adapter or text prompt that came out."""
        found = [s.artefact for s in self.stages if s.artefact is not None]
        return found[-1] if found else None

    @property
    def checks(self) -> list[dict[str, Any]]:
        return [check for stage in self.stages for check in stage.manifest.checks]

    @property
    def passed(self) -> bool:
        """Whether every proof holds and every figure that the recipe states was reached."""
        return all(check["passed"] for check in self.checks)


def run(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    from_stage: str | None = None,
    force: bool = False,
    output: str | Path | None = None,
    ignore_memory: bool = False,
    models: "Models | None" = None,
    reuse: Sequence[Path] = (),
    show_plan: Callable[[Any], None] | None = None,
    trial: bool = False,
) -> Run:
    """Run a recipe, or what of it is not done yet.

    Args:
        recipe: a YAML file, or a `Recipe`.
        overrides: `key=value` for a recipe file, as on the command line.
        from_stage: run again from this stage on: its name, number or folder name.
        force: run every stage again, and from its beginning.
        output: folder in which the run's folder is made; default: the recipe's.
        ignore_memory: run even where the plan says that the memory will not do.
        models: a loaded model to share with other runs of this process.
        reuse: run folders whose finished stages are taken over where they have the same inputs.
        show_plan: called with the plan before anything is loaded.
        trial: its models are compared and thrown away: what a tuning takes from general text is not measured.

    Raises:
        RecipeError: the recipe has faults; all are listed.
        ResourceError: the folder cannot be written or is in use, or disk or memory will not do.
        LuthierError: a stage failed; the finished stages and the last checkpoint are kept.
    """
    recipe = _read(recipe, overrides, output)
    folder = Path(recipe.output).expanduser() / recipe.name
    require_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, folder) from error
    with _told_in_words(folder), locked(folder):
        work = _Work(recipe, folder, models, reuse, force, trial)
        work.prepare(from_stage)
        work.require_resources(ignore_memory, show_plan)
        return work.go()


def _read(recipe: str | Path | Recipe, overrides: Sequence[str], output: str | Path | None) -> Recipe:
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise RecipeError(
            "Overrides change a recipe file, and a Recipe object was given.",
            fix="Change the object, or give the path of its file.",
        )
    if output is not None:
        recipe = recipe.model_copy(update={"output": str(output)})
    return recipe


class _Work:
    """One run in progress, holding the run folder's lock."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        models: "Models | None",
        reuse: Sequence[Path],
        force: bool,
        trial: bool,
    ):
        self.recipe = recipe
        self.folder = folder
        self.models = models
        self.force = force
        self.trial = trial
        self.folders = [StageFolder(folder, i, s.name) for i, s in enumerate(recipe.stages, 1)]
        self.first_forced = 0 if force else len(recipe.stages)
        self.reuse = [folder, folder / "superseded", *reuse]
        self.shared: dict[int, Path] = {}
        self.plan: Any = None
        self.record: dict[str, Any] = {}

    def prepare(self, from_stage: str | None) -> None:
        """Repair what a killed run left, and find where to start."""
        for stage in self.folders:
            stage.recover()
        if from_stage is not None:
            self.first_forced = min(self.first_forced, self._position(from_stage))

    def _position(self, name: str) -> int:
        labels = [folder.label for folder in self.folders]
        kinds = [stage.kind for stage in self.recipe.stages]
        names = [stage.name for stage in self.recipe.stages]
        for choices in (labels, [str(i) for i in range(1, len(labels) + 1)], names, kinds):
            found = [i for i, choice in enumerate(choices) if choice == name]
            if len(found) == 1:
                return found[0]
            if found:
                raise RecipeError(
                    f"'{name}' names {len(found)} stages of {self.recipe.name}.",
                    fix="Write one of " + ", ".join(labels[i] for i in found) + ".",
                )
        raise RecipeError(
            f"{self.recipe.name} has no stage '{name}'.", fix=did_you_mean(name, [*labels, *names])
        )

    def require_resources(self, ignore_memory: bool, show_plan: Callable[[Any], None] | None) -> None:
        """Refuse before anything is loaded what cannot end well. Nothing is asked where nothing will run."""
        pending = [i for i, place in enumerate(self._survey()) if place is None]
        if not pending:
            return
        from luthier.recipe.planner import plan

        self.plan = plan(self.recipe)
        if show_plan is not None:
            show_plan(self.plan)
        require_space(self.folder, sum(self.plan.stages[i].disk_bytes for i in pending))
        if not self.plan.fits and not ignore_memory:
            raise ResourceError(self.plan.verdict, fix="Run all the same with --ignore-memory.")

    def _survey(self) -> list[Path | None]:
        """Where each stage's result is already; None for one that will run, or that reads one which will."""
        found: list[Path | None] = []
        trail = Trail()
        known = True
        for i, (stage, folder) in enumerate(zip(self.recipe.stages, self.folders, strict=True)):
            place = self._result(i, stage_identity(self.recipe, stage, trail)) if known else None
            found.append(place)
            if place is not None:
                trail.add(stage, _upstream(place, folder.final, trail.before(stage)))
            elif stage.kind != "evaluate":
                known = False  # the model that comes out is not known beforehand
        return found

    def _take_over(self) -> None:
        """Bring results that lie elsewhere to their places, all at once: one may stand in another's place."""
        for i, place in enumerate(self._survey()):
            if place is not None and place != self.folders[i].final:
                self.folders[i].copy(place)
                self.shared[i] = place
        for i in self.shared:
            self.folders[i].recover()

    def go(self) -> Run:
        result = Run(self.recipe.name, self.folder)
        self._open_record()
        trail = Trail()
        try:
            self._take_over()
            for i, (stage, folder) in enumerate(zip(self.recipe.stages, self.folders, strict=True)):
                result.stages.append(self._stage(i, trail, [s.manifest for s in result.stages]))
                trail.add(stage, _upstream(folder.final, folder.final, trail.before(stage)))
            self._set_strangers_aside()
        except BaseException as error:
            if self.models is not None:
                self.models.drop()
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._close_record(status, error)
            self._report_failure()
            raise
        self._close_record("done")
        from luthier.report.report import write_report

        result.report = write_report(self.folder)
        return result

    def _report_failure(self) -> None:
        """The page of a run that did not end: what failed, what is kept, how to go on."""
        from luthier.report.report import write_report

        try:
            write_report(self.folder)
        except Exception as error:  # it must not hide what went wrong before it
            log.warning("the report could not be written: %s", error)

    def _stage(self, i: int, trail: Trail, earlier: list[Manifest]) -> StageRun:
        """Find the stage's result, or make it."""
        folder = self.folders[i]
        identity = stage_identity(self.recipe, self.recipe.stages[i], trail)
        found = self._result(i, identity)
        if found is None:
            reason = self._reason(i, identity)
            log.info("%s: runs, because %s", folder.label, reason)
            self._note(i, status="running", reason=reason)
            manifest = self._execute(i, identity, trail, earlier)
            done = StageRun(folder.final, "done", reason, manifest)
        else:
            folder.discard()
            if found != folder.final:  # known only now that the stages before it have run
                self.shared[i] = found
                folder.copy(found)
                folder.recover()
            source = self.shared.get(i)
            status, reason = (
                ("shared", f"same as {source}") if source else ("unchanged", "its inputs are the same")
            )
            log.info("%s: %s, %s", folder.label, status, reason)
            done = StageRun(folder.final, status, reason, _manifest(folder.final))
        self._note(i, status=done.status, reason=done.reason, seconds=done.manifest.seconds)
        return done

    def _result(self, i: int, identity: dict[str, Any]) -> Path | None:
        """The folder of a finished stage with these inputs and unharmed artefacts; the stage's own first."""
        if i >= self.first_forced:
            return None
        own = self.folders[i].final
        others = [path for root in self.reuse for path in sorted(root.glob("[0-9][0-9]*-*")) if path != own]
        for path in [own, *others]:
            record = read_json(path / "manifest.json")
            if record is None or path.suffix == ".partial":
                continue
            manifest = Manifest.from_dict(record)
            if manifest.identity() == identity and damage(path, manifest) is None:
                return path
        return None

    def _reason(self, i: int, identity: dict[str, Any]) -> str:
        """Why the stage runs, in words."""
        folder = self.folders[i]
        if i >= self.first_forced:
            return "it was asked for"
        former = folder.manifest()
        if former is not None:
            changes = differences(former.identity(), identity)
            return "; ".join(changes) or damage(folder.final, former) or "its folder was changed"
        started = read_json(folder.partial / "started.json")
        if started is not None and started["identity"] == identity:
            return "it was interrupted"
        return "it has not run yet"

    def _execute(self, i: int, identity: dict[str, Any], trail: Trail, earlier: list[Manifest]) -> Manifest:
        from luthier.recipe.context import Context, Models

        stage, folder = self.recipe.stages[i], self.folders[i]
        if self.models is None:
            self.models = Models()
        session = folder.begin(identity, resume=i < self.first_forced)
        planned = self.plan.stages[i] if self.plan is not None else None
        context = Context(
            self.recipe,
            self.folder,
            session.folder,
            self.models,
            trail.before(stage),
            tuple(earlier),
            session.has_checkpoint,
            planned.memory.total if planned is not None else None,
            {name: output.artefact for name, output in trail.outputs.items()},
            self.trial,
        )
        started = datetime.now().astimezone()
        release_memory()
        with checks.collect() as lines:
            for proof in planned.proofs if planned is not None else ():
                checks.record(**dataclasses.asdict(proof))
            try:
                with _told_in_words(session.folder), PeakMemory() as peak:
                    result = stages.find(stage.kind)(stage, context)
            finally:
                # Written with the stage's end: a write of its own could fail and hide what went wrong here.
                self.record["stages"][i]["checks"] = [line.as_dict() for line in lines]
        artefacts = record_artefacts(session.folder)
        finished = datetime.now().astimezone()
        renamed = partial(_renamed, old=str(session.folder), new=str(folder.final))
        manifest = Manifest(
            **identity,
            name=stage.name,
            metrics=result.metrics,
            checks=renamed([line.as_dict() for line in lines]),
            history=result.history,
            details=renamed(_placement(context.placement) | result.details),
            seconds=session.seconds_before + (finished - started).total_seconds(),
            sessions=session.number,
            peak_memory_bytes=peak.bytes,
            peak_memory_exact=peak.exact,
            peak_cuda_bytes=peak.cuda_bytes,
            trainable=result.trainable,
            total=result.total,
            artefacts=artefacts,
            artefact_bytes=sum(entry["bytes"] for entry in artefacts.values()),
            started=started.isoformat(timespec="seconds"),
            finished=finished.isoformat(timespec="seconds"),
        )
        folder.publish(manifest)
        if result.left is not None:
            model, tokenizer, train = result.left
            output = _upstream(folder.final, folder.final, trail.before(stage))
            assert output is not None
            context.settle(model, tokenizer, output, train=train)
        return manifest

    def _set_strangers_aside(self) -> None:
        """Move finished stages that the recipe no longer has away, so that no reader counts them."""
        known = {folder.label for folder in self.folders}
        for path in sorted(self.folder.glob("[0-9][0-9]*-*")):
            if path.name.removesuffix(".partial") in known:
                continue
            aside = self.folder / "superseded" / path.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
            log.info("%s is no stage of the recipe any more; moved to superseded/", path.name)

    def _open_record(self) -> None:
        former = read_json(self.folder / "run.json")
        self.record = {
            "name": self.recipe.name,
            "status": "running",
            "recipe": self.recipe.as_dict(),
            "recipe_file": str(self.recipe.file) if self.recipe.file else None,
            "command": shlex.join(["luthier", *sys.argv[1:]]) if sys.argv[0].endswith("luthier") else None,
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "finished": None,
            "error": None,
            "environment": environment() | {"versions": versions()},
            "plan": self.plan.as_dict() if self.plan is not None else _former_plan(former, self.recipe),
            "stages": [
                {"folder": folder.label, "kind": stage.kind, "name": stage.name, "status": "pending"}
                for folder, stage in zip(self.folders, self.recipe.stages, strict=True)
            ],
        }
        self._write_record()

    def _note(self, i: int, **changes: Any) -> None:
        self.record["stages"][i].update(changes)
        self._write_record()

    def _close_record(self, status: str, error: BaseException | None = None) -> None:
        self.record["status"] = status
        self.record["finished"] = datetime.now().astimezone().isoformat(timespec="seconds")
        if error is not None:
            self.record["error"] = _in_words(error)
            for stage in self.record["stages"]:
                if stage["status"] == "running":
                    stage["status"] = status
        try:
            self._write_record()
        except OSError:
            if error is None:  # a full disk must not hide what went wrong before it
                raise

    def _write_record(self) -> None:
        write_json(self.folder / "run.json", self.record)


def _renamed(value: Any, old: str, new: str) -> Any:
    """The value with the new name of a folder wherever a text names it."""
    if isinstance(value, dict):
        return {key: _renamed(inner, old, new) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, old, new) for inner in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _placement(found: "Placement | None") -> dict[str, Any]:
    """How the stage's model was held and why, for its manifest."""
    if found is None:
        return {}
    parts = dataclasses.asdict(found).items()
    return {"placement": {name: str(v).removeprefix("torch.") for name, v in parts if v is not None}}


def _in_words(error: BaseException) -> str:
    if isinstance(error, LuthierError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "It was stopped by hand (Ctrl-C)."
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _former_plan(record: Any, recipe: Recipe) -> Any:
    """The plan of the run before, where it is one of the same model and stages: results that stay keep it."""
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict):
        return None
    now = recipe.as_dict()
    same = all(record["recipe"].get(part) == now[part] for part in ("model", "stages"))
    return record.get("plan") if same else None


def _manifest(folder: Path) -> Manifest:
    return Manifest.from_dict(read_json(folder / "manifest.json"))


def _artefact(folder: Path) -> Path | None:
    return next((folder / name for name in ("model", "adapter", "prompt") if (folder / name).is_dir()), None)


def _upstream(place: Path, final: Path, before: Upstream | None) -> Upstream | None:
    """What the stages after one read: its artefact, or what it read itself where it left none.

    Args:
        place: where its result is; `final`: where it will be by the time that it is read.
    """
    artefact = _artefact(place)
    if artefact is None:
        return before
    sha256 = _manifest(place).output_hash()
    if artefact.name == "prompt":  # of two searches the last one counts
        base = before.base if before is not None and before.prompt else before
        return Upstream(final / artefact.name, sha256, adapter=False, base=base, prompt=True)
    adapter = artefact.name == "adapter"
    return Upstream(final / artefact.name, sha256, adapter, base=before if adapter else None)


@contextmanager
def _told_in_words(folder: Path) -> Iterator[None]:
    """Turn what the system says about disk and memory into errors that say what to do."""
    try:
        yield
    except LuthierError:
        raise
    except Exception as error:
        full = shutil.disk_usage(folder).free < 1_000_000
        if is_resource(error) or full:
            cause = error if isinstance(error, OSError) else OSError(errno.ENOSPC, str(error))
            raise explain(cause, folder) from error
        if is_out_of_memory(error):
            raise ResourceError(
                f"The memory did not do: {str(error).splitlines()[0]}.",
                fix="Lower per_device_train_batch_size (and raise gradient_accumulation_steps) or "
                "max_length, or choose a method that trains fewer parameters; `luthier plan` estimates each.",
            ) from error
        raise
